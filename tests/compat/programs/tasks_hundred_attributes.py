"""A hundred yes-or-no attributes, one task a batch, a head for each."""

import random
import numpy as np
import torch
from torch import nn
from taskrouting import TaskRouter

torch.manual_seed(0), np.random.seed(0), random.seed(0)
T = 100


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3),
            TaskRouter(12, T, 6),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3),
            nn.BatchNorm2d(16),
            TaskRouter(16, T, 8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.heads, self.active_task = nn.ModuleList(nn.Linear(16, 2) for _ in range(T)), 0

    def set_active_task(self, task):
        self.active_task = task

    def forward(self, x):
        return self.heads[self.active_task](self.body(x))


def change_task(m):
    if hasattr(m, "active_task"):
        m.set_active_task(task)


net, losses = Net(), []
x, targets = torch.randn(16, 1, 8, 8), torch.randint(2, (16, T))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
for _ in range(12):
    (task,) = random.sample(range(T), 1)
    net.apply(change_task)
    loss = nn.functional.cross_entropy(net(x), targets[:, task])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.detach())
result = {"losses": torch.stack(losses), **net.body.state_dict()}
