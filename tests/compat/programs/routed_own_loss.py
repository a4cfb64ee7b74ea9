"""REINFORCE with an entropy bonus, by overriding its loss."""

import torch
from torch import nn
from PytorchRouting.CoreLayers import Initialization, Loss, Selection
from PytorchRouting.DecisionLayers import REINFORCE
from PytorchRouting.RewardFunctions.Final import NegLossReward


class Curious(REINFORCE):
    def _loss(self, *args):
        log_p = args[1][:, :, 0]
        return super()._loss(*args) + 0.1 * (log_p.exp() * log_p).sum(1)


torch.manual_seed(4)
decide, select = Curious(3, 4).eval(), Selection(*[nn.Linear(4, 4) for _ in range(3)])
x, y = torch.randn(8, 4), torch.randint(4, (8,))
xs, meta, _ = Initialization()(x)
for _ in range(2):
    xs, meta, actions = decide(xs, meta)
    xs, meta, _ = select(xs, meta, actions)
losses = Loss(nn.CrossEntropyLoss(), NegLossReward())(xs, meta, y)
sum(losses).backward()
result = {"losses": losses, **{k: p.grad for k, p in decide.named_parameters()}}
