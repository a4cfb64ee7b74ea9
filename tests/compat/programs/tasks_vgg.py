"""The routed convolutions of a small VGG with a head of the user's own."""

import numpy as np
import torch
from torch import nn
from routed_vgg import make_layers

torch.manual_seed(1), np.random.seed(3)
features = make_layers([6, "M", 10, "M"], 4, 0.5, batch_norm=True)
head = nn.Linear(10, 2)
x, y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 0, 1, 1, 0])
optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], lr=1e-2)
for step in range(8):
    for m in features.modules():
        if hasattr(m, "active_task"):
            m.set_active_task(step % 4)
    loss = nn.functional.cross_entropy(head(features(x).mean((2, 3))), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
result = {"loss": loss.detach(), "names": [m.name for m in features if hasattr(m, "name")], **features.state_dict()}
