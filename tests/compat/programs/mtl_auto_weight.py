"""The README's manner: a learned weight among fixed ones."""

import torch
from torch import nn
from torchmtl import MTLModel
from torchmtl.wrapping_layers import Concat

torch.manual_seed(2)
tasks = [
    {"name": "A", "layers": nn.Linear(6, 5)},
    {"name": "B", "layers": nn.Linear(6, 5)},
    {"name": "AB", "layers": Concat(dim=1), "anchor_layer": ["A", "B"]},
    {"name": "One", "layers": nn.Linear(5, 1), "anchor_layer": "A", "loss": nn.MSELoss(), "loss_weight": 1.0},
    {
        "name": "Two",
        "layers": nn.Linear(10, 1),
        "anchor_layer": "AB",
        "loss": nn.L1Loss(),
        "loss_weight": "auto",
        "loss_init_val": 0.5,
    },
]
model = MTLModel(tasks, output_tasks=["Two", "One", "One"])
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
X, y = torch.randn(8, 6), torch.randn(8, 1)
trace = []
for _ in range(10):
    optimizer.zero_grad()
    y_hat, l_funcs, l_weights = model(X)
    loss = None
    for i in range(len(y_hat)):
        term = (l_weights[i] * l_funcs[i](y_hat[i], y)).reshape(1)
        loss = term if loss is None else loss + term
    loss.backward()
    optimizer.step()
    trace.append(loss.detach())
result = {"trace": torch.cat(trace), "keys": list(model.state_dict()), **model.state_dict()}
