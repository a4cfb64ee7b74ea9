"""A model whose outputs grow while it is trained."""

import torch
from torch import nn
from torchmtl import MTLModel

torch.manual_seed(6)
heads = [
    {"name": n, "layers": nn.Linear(6, 2), "anchor_layer": "body", "loss": nn.CrossEntropyLoss(), "loss_weight": w}
    for n, w in (("first", 1.0), ("second", 0.5))
]
model = MTLModel([{"name": "body", "layers": nn.Linear(3, 6)}, *heads], ["first"])
x, y = torch.randn(8, 3), torch.randint(2, (8,))
optimizer, counts = torch.optim.SGD(model.parameters(), lr=0.1), []
for epoch in range(4):
    if epoch == 2:
        model.output_tasks.append("second")
    outs, losses, weights = model(x)
    counts.append(len(outs))
    optimizer.zero_grad()
    sum(w * loss(out, y) for out, loss, w in zip(outs, losses, weights)).backward()
    optimizer.step()
result = {"counts": counts, **model.state_dict()}
