"""A reward that reads the histories of actions and of what was thought of them."""

import torch
from torch import nn
from PytorchRouting.CoreLayers import Initialization, Loss, Selection
from PytorchRouting.DecisionLayers import REINFORCE
from PytorchRouting.RewardFunctions.Final import NegLossReward
from PytorchRouting.RewardFunctions.PerAction.PerActionBaseReward import PerActionBaseReward


class Surprise(PerActionBaseReward):
    def __init__(self, scale, history_len=20):
        PerActionBaseReward.__init__(self, history_len)
        self._scale = scale

    def get_reward(self, dist, action):
        counts = torch.zeros(len(self._actions), 3).scatter(1, torch.stack(list(self._actions), 0).unsqueeze(1), 1.0)
        mean = torch.cat(list(self._dists), 0)[:, :, 0].exp().mean(0)
        return self._scale * (mean[action] - counts.mean(0)[action]).reshape(1)


torch.manual_seed(5)
decide = REINFORCE(3, 4, additional_reward_func=Surprise(0.5)).eval()
select = Selection(*[nn.Linear(4, 4) for _ in range(3)])
loss, start, out = Loss(nn.CrossEntropyLoss(), NegLossReward(), clear=False), Initialization(), []
for _ in range(3):
    xs, meta, actions = decide(*start(torch.randn(8, 4))[:2])
    xs, meta, _ = select(xs, meta, actions)
    out.append(loss(xs, meta, torch.arange(8) % 4))
sum(sum(pair) for pair in out).backward()
result = {"losses": out, **{k: p.grad for k, p in decide.named_parameters()}}
