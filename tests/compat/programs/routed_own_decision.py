"""A decision of the user's own, made from the base class, with a critic of its own."""

import torch
from torch import nn
from torch.nn import functional as F
from PytorchRouting.CoreLayers import Initialization, Loss, Selection
from PytorchRouting.DecisionLayers.Decision import Decision
from PytorchRouting.RewardFunctions.Final import NegLossReward


class Critic(Decision):
    def __init__(self, *args, value_net=None, **kwargs):
        Decision.__init__(self, *args, **kwargs)
        self._value_mem = self._construct_policy_storage(1, self._pol_type, value_net, self._pol_hidden_dims)

    def _forward(self, xs, agent):
        log_p = F.log_softmax(self._policy[agent](xs), dim=1)
        value = self._value_mem[agent](xs).expand_as(log_p)
        actions = log_p.max(dim=1)[1]
        state = torch.stack([log_p, value], 2)
        return xs, actions, self._eval_stochastic_are_exp(actions, state), state

    def _loss(self, is_terminal, state, next_state, action, next_action, reward, cum_return, final_reward):
        target = torch.where(is_terminal, final_reward, next_state[:, 0, 1].detach() + reward)
        log_p = state[:, :, 0].gather(1, action.unsqueeze(1)).view(-1)
        return -log_p * (target - state[:, 0, 1]).detach() + (target - state[:, 0, 1]).pow(2)


torch.manual_seed(3)
decide = Critic(3, 4, num_agents=2, approx_hidden_dims=(5,))
select = Selection(*[nn.Linear(4, 4) for _ in range(3)])
agents, x, y = torch.arange(8) % 2, torch.randn(8, 4), torch.randint(4, (8,))
xs, meta, _ = Initialization()(x)
for _ in range(3):
    xs, meta, actions = decide(xs, meta, agents)
    xs, meta, _ = select(xs, meta, actions)
module_loss, routing_loss = Loss(nn.CrossEntropyLoss(), NegLossReward())(xs, meta, y)
(module_loss + routing_loss).backward()
result = {"losses": (module_loss, routing_loss), **{k: p.grad for k, p in decide.named_parameters()}}
