"""The choice of every row's agent in plain PyTorch: its linear layer or table, then ``policy``, beside it its critic.

Axes: N rows, A agents, F features in, K choices, C outputs of a critic: K, or 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import accumulating
from ..grouped_linear import reference as linear
from ..host import on_host
from ..policy import reference as single
from .contract import AgentChoice

Tensors = Sequence[Tensor]


def agent_policy(
    x: Tensor | None,
    agents: Tensor,
    weights: Tensors,
    biases: Tensors,
    critic_weights: Tensors = (),
    critic_biases: Tensors = (),
    *,
    uniform: Tensor | None = None,
    coin: Tensor | None = None,
    forced: Tensor | None = None,
    kind: str = "softmax",
    temperature: float = 1.0,
    exploration: float = 0.0,
    expected: bool = False,
) -> AgentChoice:
    """The definition, with autograd: row n belongs to agent ``agents[n]``, or to none where there is no such agent.

    ``weights`` are A tensors [K, F] and ``biases`` A tensors [K], or none; or biases alone, A tables [1, K].
    """
    A = len(weights or biases)
    rows = agents.new_empty(len(agents), 0) if x is None else x
    scores = linear.grouped_linear(rows, agents, weights, biases)
    made = single.policy(scores, uniform, coin, forced, kind, temperature, exploration)
    has_agent = (agents >= 0) & (agents < A)
    actions = made.actions if forced is not None else torch.where(has_agent, made.actions, 0)
    choice = AgentChoice(actions, torch.where(has_agent, made.value, 0), made.greedy, scores)
    if not critic_weights and not critic_biases:
        return choice
    critic = linear.grouped_linear(rows, agents, critic_weights, critic_biases)
    mean = _expected(scores, critic, kind, temperature) if expected else None
    return choice._replace(critic=critic, critic_at=_critic_at(critic, actions), expected=mean)


def on_plan(
    x: Tensor | None, order: Tensor | None, offsets: Tensor | None, nets: Sequence[Tensors], uniform: Tensor | None,
    coin: Tensor | None, forced: Tensor | None, kind: str, temperature: float, exploration: float,
    expected: bool = False,
) -> AgentChoice:  # fmt: skip
    """The same on a plan of the agents, or without one for a single agent, with every derivative there is."""

    def scores_of(weights: Tensors, biases: Tensors) -> Tensor:
        if order is None or offsets is None:
            assert x is not None
            each = [linear._each(of, dims)[0] if of else None for of, dims in ((weights, 3), (biases, 2))]
            made = x @ each[0].mT if each[0] is not None else x.new_zeros(())
            return made if each[1] is None else made + each[1].reshape(1, -1).expand(x.shape[0], -1)
        return linear.of_sorted(x, order, None, offsets, on_host(offsets), weights, biases, "none")

    scores = scores_of(*nets[:2])
    made = single.policy(scores, uniform, coin, forced, kind, temperature, exploration)
    actions, value = made.actions, made.value
    if order is not None and offsets is not None:
        has_agent = (torch.arange(order.shape[0], device=order.device) < offsets[-1])[order.argsort()]
        actions = actions if forced is not None else torch.where(has_agent, actions, 0)
        value = torch.where(has_agent, value, 0)
    choice = AgentChoice(actions, value, made.greedy, scores)
    if not nets[2] and not nets[3]:
        return choice
    critic = scores_of(*nets[2:])
    mean = _expected(scores, critic, kind, temperature) if expected else None
    return choice._replace(critic=critic, critic_at=_critic_at(critic, actions), expected=mean)


def _critic_at(critic: Tensor, actions: Tensor) -> Tensor:
    critic = critic.to(accumulating(critic.dtype))
    return critic[:, 0] if critic.shape[1] == 1 else single.at(critic, actions)


def _expected(scores: Tensor, critic: Tensor, kind: str, temperature: float) -> Tensor:
    with torch.no_grad():
        z = scores.to(accumulating(scores.dtype))
        p = torch.softmax(z / temperature, -1) if kind == "softmax" else single.shifted(z)
        if kind == "shifted":
            p = p / p.sum(-1, keepdim=True)
        return (p * critic.to(p.dtype)).sum(-1)
