"""One tower for each cell type, built in a loop."""

import torch
from torch import nn
from torchmtl import MTLModel

torch.manual_seed(1)
cells = [f"cell_{i}" for i in range(24)]
layers = [{"name": "Embedding", "layers": nn.Sequential(nn.Linear(10, 12), nn.ReLU())}]
for cell in cells:
    layers.append(
        {
            "name": cell,
            "layers": nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 1)),
            "anchor_layer": ["Embedding"],
            "loss": nn.BCEWithLogitsLoss(),
            "loss_weight": 1,
        }
    )
model = MTLModel(layers, output_tasks=cells)
X, y = torch.randn(16, 10), (torch.rand(24, 16, 1) > 0.5).to(torch.get_default_dtype())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(4):
    outs, losses, weights = model(X)
    total = sum(w * loss(out, t) for out, loss, w, t in zip(outs, losses, weights, y))
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
result = {"total": total.detach(), "edges": sorted(model.g.edges), **model.Embedding.state_dict(), **model.state_dict()}
