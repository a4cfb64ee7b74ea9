"""A dispatcher chooses the agent that chooses the module; some samples have left."""

import torch
from torch import nn
from PytorchRouting.CoreLayers import Initialization, Loss, Selection
from PytorchRouting.DecisionLayers import AAC, REINFORCE
from PytorchRouting.RewardFunctions.Final import NegLossReward

torch.manual_seed(2)
dispatch, decide = REINFORCE(2, 4).eval(), AAC(3, 4, num_agents=2).eval()
select = Selection(*[nn.Linear(4, 4) for _ in range(3)])
x, y = torch.randn(9, 4), torch.randint(4, (9,))
mask = torch.tensor([True] * 6 + [False] * 3)
xs, meta, actions = Initialization()(x)
xs, meta, agents = dispatch(xs, meta, actions)
xs, meta, actions = decide(xs, meta, agents)
xs, meta, actions = select(xs, meta, actions)
xs, meta, more = decide(xs, meta, agents, mask=mask)
module_loss, routing_loss = Loss(nn.CrossEntropyLoss(), NegLossReward())(xs, meta, y, None, False)
(module_loss.mean() + routing_loss.mean()).backward()
params = [*dispatch.parameters(), *decide.parameters(), *select.parameters()]
result = {
    "losses": (module_loss, routing_loss.sum()),
    "actions": (agents, actions, more[mask]),
    "grads": [p.grad for p in params if p.grad is not None],
}
