"""The spellings of the README: keywords, the order of the loss's arguments, an MLP's hidden layers."""

import torch
import PytorchRouting
import PytorchRouting.CoreLayers, PytorchRouting.DecisionLayers.Others, PytorchRouting.Helpers.MLP
from PytorchRouting.CoreLayers import Initialization, Loss, Selection
from PytorchRouting.DecisionLayers import REINFORCE
from PytorchRouting.Helpers.MLP import MLP
from PytorchRouting.RewardFunctions.Final import NegLossReward
from PytorchRouting.RewardFunctions.PerAction import CollaborationReward

torch.manual_seed(8)
decide = REINFORCE(
    2,
    4,
    num_agents=2,
    approx_module=MLP(4, 2, hidden=(7, 5)),
    additional_reward_class=CollaborationReward,
    additional_reward_args={"reward_ratio": 0.2, "num_actions": 2},
).eval()
select = Selection(MLP(4, 3, hidden=(6, 5)), MLP(4, 3, hidden=(6, 6)))
batch, meta, actions = Initialization()(torch.randn(6, 4), tasks=[0, 1, 0, 1, 0, 1])
batch, meta, agents = PytorchRouting.DecisionLayers.Others.PerTaskAssignment()(batch, meta, [])
batch, meta, actions = decide(batch, meta, agents)
estimates, meta, actions = select(batch, meta, actions)
loss_func = Loss(torch.nn.CrossEntropyLoss(), NegLossReward())
module_loss, routing_loss = loss_func(estimates, torch.tensor([0, 1, 2, 0, 1, 2]), meta)
(module_loss + routing_loss).backward()
result = {"losses": (module_loss, routing_loss), "grads": [p.grad for p in decide.parameters()]}
