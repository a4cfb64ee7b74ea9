"""A loss with a parameter of its own, which the model's optimizer must not bring to nothing."""

import torch
from torch import nn
from torchmtl import MTLModel


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, yhat, y):
        return (self.scale * (yhat - y) ** 2).mean()


torch.manual_seed(3)
model = MTLModel([{"name": "A", "layers": nn.Linear(4, 1), "loss": Scaled(), "loss_weight": 1.0}], ["A"])
X, y = torch.randn(32, 4), torch.randn(32, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(50):
    (out,), (loss,), _ = model(X)
    optimizer.zero_grad()
    loss(out, y).backward()
    optimizer.step()
result = {
    "error": (model(X)[0][0] - y).square().mean().detach(),
    "scale": loss.scale.detach(),
    "parameters": len(list(model.parameters())),
    **model.state_dict(),
}
