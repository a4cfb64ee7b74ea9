"""One agent on what it sees, trained by REINFORCE."""

import torch
from torch import nn
from PytorchRouting.CoreLayers import Initialization, Loss, Selection
from PytorchRouting.DecisionLayers import REINFORCE
from PytorchRouting.RewardFunctions.Final import NegLossReward

torch.manual_seed(1)
decide, select = REINFORCE(3, 5, approx_hidden_dims=(8,)).eval(), Selection(*[nn.Linear(5, 2) for _ in range(3)])
loss, start = Loss(nn.CrossEntropyLoss(), NegLossReward()), Initialization()
x, y = torch.randn(10, 5), torch.randint(2, (10,))
optimizer = torch.optim.Adam([*decide.parameters(), *select.parameters()], lr=1e-2)
for _ in range(4):
    out, meta, actions = start(x)
    out, meta, actions = decide(out, meta, actions)
    out, meta, actions = select(out, meta, actions)
    module_loss, routing_loss = loss(out, meta, y)
    optimizer.zero_grad()
    (module_loss + routing_loss).backward()
    optimizer.step()
result = {"losses": (module_loss.detach(), routing_loss.detach()), **decide.state_dict(), **select.state_dict()}
