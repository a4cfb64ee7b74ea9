"""Two inputs, a signal and clinical numbers, joined by a node declared after the tasks that use it."""

import torch
from torch import nn
from torchmtl import MTLModel
from torchmtl.wrapping_layers import Concat, SimpleSelect


class Focal(nn.Module):
    def forward(self, yhat, y):
        p = yhat.sigmoid()
        return -((1 - p) ** 2 * y * p.log() + p**2 * (1 - y) * (1 - p).log()).mean()


torch.manual_seed(0)
layers = [
    {"name": "Signal", "layers": SimpleSelect(0)},
    {"name": "Clinical", "layers": SimpleSelect(selection_axis=1)},
    {
        "name": "Conv",
        "layers": nn.Sequential(nn.Conv1d(2, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(3), nn.Flatten()),
        "anchor_layer": "Signal",
    },
    {"name": "Age", "layers": nn.Linear(16, 1), "anchor_layer": ["Join"], "loss": nn.MSELoss(), "loss_weight": 0.01},
    {"name": "AF", "layers": nn.Linear(16, 1), "anchor_layer": "Join", "loss": Focal(), "loss_weight": 1},
    {"name": "Dense", "layers": nn.Linear(3, 4), "anchor_layer": "Clinical"},
    {"name": "Join", "layers": Concat(dim=1), "anchor_layer": ["Conv", "Dense"]},
]
model = MTLModel(layers, ["Age", "AF"])
X, y = [torch.randn(8, 2, 20), torch.randn(8, 3)], [torch.rand(8, 1) * 80, (torch.rand(8, 1) > 0.5).float()]
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(6):
    out, losses, weights = model(X)
    loss = sum(w * f(o, t.to(o)) for o, f, w, t in zip(out, losses, weights, y))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
result = {"loss": loss.detach(), "join": model.outputs["Join"].detach(), **model.state_dict()}
