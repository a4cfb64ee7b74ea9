"""Q-learning without exploration in a network whose loss is made outside."""

import torch
from torch import nn
from PytorchRouting.CoreLayers import Initialization, Loss, Selection
from PytorchRouting.DecisionLayers import QLearning
from PytorchRouting.RewardFunctions.Final import NegLossReward

torch.manual_seed(6)
decisions = nn.ModuleList(QLearning(k, 4, exploration=0.0) for k in (3, 3, 2))
selections = nn.ModuleList(Selection(*[nn.Linear(4, 4) for _ in range(k)]) for k in (3, 3, 2))
loss = Loss(None, NegLossReward())
x = torch.randn(10, 4)
xs, meta, _ = Initialization()(x)
for decide, select in zip(decisions, selections):
    xs, meta, actions = decide(xs, meta)
    xs, meta, _ = select(xs, meta, actions)
for m in meta:
    if m.steps:
        m.steps[-1]["seen"] = True
module_loss, routing_loss = loss(xs, meta, external_losses=(xs - x) ** 2)
(module_loss + routing_loss).backward()
result = {"losses": (module_loss, routing_loss), **{k: p.grad for k, p in decisions.named_parameters()}}
