"""Three routed layers, an agent for each task, tabular WPL that is rewarded for collaborating."""

import torch
from torch import nn
from PytorchRouting.CoreLayers import Initialization, Loss, Selection
from PytorchRouting.DecisionLayers import PerTaskAssignment, WPL
from PytorchRouting.RewardFunctions.Final import CorrectClassifiedReward
from PytorchRouting.RewardFunctions.PerAction import CollaborationReward

torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self, tasks, modules):
        super().__init__()
        self.loss = Loss(nn.CrossEntropyLoss(), CorrectClassifiedReward())
        self.start, self.assign = Initialization(), PerTaskAssignment()
        self.decisions = nn.ModuleList(
            WPL(
                modules,
                6,
                num_agents=tasks,
                policy_storage_type="tabular",
                additional_reward_func=CollaborationReward(reward_ratio=0.3, num_actions=modules),
            )
            for _ in range(3)
        )
        self.selections = nn.ModuleList(Selection(*[nn.Linear(6, 6) for _ in range(modules)]) for _ in range(3))

    def forward(self, x, tasks):
        y, meta, actions = self.start(x, tasks=tasks)
        y, meta, agents = self.assign(y, meta, actions)
        for decide, select in zip(self.decisions, self.selections):
            y, meta, actions = decide(y, meta, agents)
            y, meta, _ = select(y, meta, actions)
            y = y.relu()
        return y, meta


net = Net(3, 4)
with torch.no_grad():  # away from ties
    for table in net.decisions.parameters():
        table.add_(torch.randn(table.shape))
net.decisions.eval()
x, tasks, y = torch.randn(12, 6), [b % 3 for b in range(12)], torch.randint(6, (12,))
optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
trace = []
for _ in range(3):
    out, meta = net(x, tasks)
    module_loss, routing_loss = net.loss(out, meta, y)
    optimizer.zero_grad()
    (module_loss + routing_loss).backward()
    optimizer.step()
    trace.append((module_loss.detach(), routing_loss.detach()))
result = {"trace": trace, "actions": [[int(s["actions"]) for s in m.steps] for m in meta], **net.decisions.state_dict()}
