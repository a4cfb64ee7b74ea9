"""The utility that passes the triplet on, with a dispatched second layer, in evaluation, and what was selected."""

import torch
from torch import nn
from PytorchRouting.CoreLayers import Selection
from PytorchRouting.DecisionLayers import REINFORCE
from PytorchRouting.UtilLayers import Sequential

torch.manual_seed(7)
net = Sequential(
    nn.Linear(5, 6),
    REINFORCE(3, 6),
    Selection(*[nn.Linear(6, 6) for _ in range(3)]),
    nn.ReLU(),
    REINFORCE(4, 6, num_agents=3),
    Selection(*[nn.Linear(6, 2) for _ in range(4)]),
)
net.eval()
for m in net.modules():
    if isinstance(m, Selection):
        m.start_logging_selections()
y, meta = net(torch.randn(12, 5))
used = [m.stop_logging_and_get_selections() for m in net.modules() if isinstance(m, Selection)]
result = {"y": y, "used": used, "steps": [[int(s["actions"]) for s in m.steps] for m in meta], **net.state_dict()}
