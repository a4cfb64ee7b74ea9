"""A residual block in which the router writes into what the skip connection sees."""

import numpy as np
import torch
from torch import nn
from taskrouting import TaskRouter

torch.manual_seed(2), np.random.seed(2)
conv, norm, router = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), TaskRouter(4, 3, 2)
x = torch.randn(2, 4, 5, 5, requires_grad=True)
outs = []
for task in range(3):
    assert router.set_active_task(task) == task
    h = norm(conv(x))
    outs.append(torch.relu(router(h)) + h)
torch.stack(outs).pow(2).sum().backward()
result = {"outs": torch.stack(outs), "dx": x.grad, "dw": conv.weight.grad, "mask": router.get_unit_mapping()}
