"""A bowtie: a sequence routed to a few vectors and back to its length."""

import torch
from torch import nn
from heinsen_routing import EfficientVectorRouting as Routing

torch.manual_seed(1)
model = nn.Sequential(Routing(12, 3, 6, 10), nn.GELU(), Routing(3, 12, 10, 6, normalize=False))
x = torch.randn(4, 12, 6)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for _ in range(5):
    loss = (model(x) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
result = {"loss": loss.detach(), **{k: p.grad for k, p in model.named_parameters()}, **model.state_dict()}
