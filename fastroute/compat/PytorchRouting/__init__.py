"""Pytorch-Routing 0.4.1's import paths: ``PytorchRouting.CoreLayers`` and so on, with ``fastroute.compat.`` in front.

Same arguments, names, parameters and formulas, faulty ones included (``formula="intended"`` asks for the others); where
Pytorch-Routing crashes, this works or says why it cannot. An unknown keyword is an error here. The classes are those of
``fastroute.networks``, or subclasses, so state dicts and ``isinstance`` agree.

A network of two layers, in which every task has an agent of its own:

>>> import torch
>>> from torch import nn
>>> from fastroute.compat.PytorchRouting.CoreLayers import Initialization, Loss, Selection
>>> from fastroute.compat.PytorchRouting.DecisionLayers import REINFORCE, WPL, PerTaskAssignment
>>> from fastroute.compat.PytorchRouting.RewardFunctions.Final import NegLossReward
>>> from fastroute.compat.PytorchRouting.RewardFunctions.PerAction import CollaborationReward
>>> _ = torch.manual_seed(0)
>>> x, tasks = torch.randn(64, 8), [b % 2 for b in range(64)]
>>> y = torch.stack([(x[:, 0] > 0), (x[:, 1] < 0)], 1)[torch.arange(64), tasks].long()  # each task has its own rule
>>> class Routed(nn.Module):
...     def __init__(self):
...         super().__init__()
...         reward = CollaborationReward(reward_ratio=0.3, num_actions=3)
...         self.initialization, self.assignment = Initialization(), PerTaskAssignment()
...         self.decisions = nn.ModuleList(
...             WPL(3, 8, num_agents=2, policy_storage_type="tabular", additional_reward_func=reward) for _ in range(2)
...         )
...         self.selections = nn.ModuleList(
...             Selection(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]) for _ in range(2)
...         )
...         self.classifier = nn.Linear(8, 2)
...
...     def forward(self, x, tasks):
...         xs, metas, actions = self.initialization(x, tasks=tasks)
...         xs, metas, agents = self.assignment(xs, metas, actions)
...         for decide, select in zip(self.decisions, self.selections):
...             xs, metas, actions = decide(xs, metas, prior_actions=agents)
...             xs, metas, actions = select(xs, metas, actions)
...         return self.classifier(xs), metas
>>> model, loss = Routed(), Loss(nn.CrossEntropyLoss(), NegLossReward())
>>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
>>> losses = []
>>> for step in range(60):
...     yest, metas = model(x, tasks)
...     module_loss, routing_loss = loss(yest, metas, y)
...     optimizer.zero_grad()
...     (module_loss + routing_loss).backward()
...     optimizer.step()
...     losses.append(float(module_loss.detach()))
>>> losses[-1] < 0.5 * losses[0]
True
>>> metas[0].task, len(metas[0].steps), sorted(metas[0].steps[0])
(0, 2, ['actions', 'is_exploratory', 'loss_funcs', 'reward_func', 'states'])

The names and the order of arguments of versions 0.1 and 0.2 are understood as well:

>>> initialization, selection = Initialization(), Selection(*[nn.Linear(8, 2) for _ in range(3)])
>>> decision = REINFORCE(
...     3, 8, num_agents=1, approx_module=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)),
...     additional_reward_class=CollaborationReward, additional_reward_args={"reward_ratio": 0.1, "num_actions": 3},
... )
>>> optimizer = torch.optim.Adam([*decision.parameters(), *selection.parameters()], lr=0.03)
>>> losses = []
>>> for step in range(60):
...     yest, meta, actions = initialization(x)
...     yest, meta, actions = decision(yest, meta, [])  # or None: there are no actions yet
...     yest, meta, actions = selection(yest, meta, actions)
...     module_loss, decision_loss = loss(yest, y, meta)
...     optimizer.zero_grad()
...     (module_loss + decision_loss).backward()
...     optimizer.step()
...     losses.append(float(module_loss.detach()))
>>> losses[-1] < losses[0]
True
"""

from . import CoreLayers, DecisionLayers, Helpers, PreFabs, RewardFunctions, UtilLayers

__all__ = ["CoreLayers", "DecisionLayers", "Helpers", "PreFabs", "RewardFunctions", "UtilLayers"]
