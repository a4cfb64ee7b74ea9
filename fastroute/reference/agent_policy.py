"""The choice of every row's agent in plain PyTorch: its linear layer or table, then ``policy``, beside it its critic.

Axes: N rows, A agents, F features in, K choices, C outputs of a critic: K, or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import grouped_linear as linear
from . import policy as single
from .dispatch import on_host
from .policy import accumulating

Tensors = Sequence[Tensor]


class AgentChoice(NamedTuple):
    """What every row's agent chose, and what it is worth."""

    actions: Tensor  #: [N] int64
    value: Tensor  #: [N], log-probability of the action, or its score; zero where a forced action is negative
    greedy: Tensor  #: [N] int64, the best choice
    scores: Tensor  #: [N, K]
    critic: Tensor | None = None  #: [N, C]
    critic_at: Tensor | None = None  #: [N], the critic at the action, or its only output
    expected: Tensor | None = None  #: [N], without gradient: sum_k p_k critic_k


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
    """The definition, with autograd: row n is agent ``agents[n]``'s, or nobody's where there is no such agent.

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
        mean: Tensor = (p * critic.to(p.dtype)).sum(-1)
        return mean


# ------------------------------------------------------------------- the op's contract, on a plan (backend "reference")


def forward(
    x: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    weights: Tensors,
    biases: Tensors,
    critic_weights: Tensors,
    critic_biases: Tensors,
    uniform: Tensor | None,
    coin: Tensor | None,
    forced: Tensor | None,
    kind: str,
    temperature: float,
    exploration: float,
    expected: bool,
) -> list[Tensor]:
    """The fields of an AgentChoice that there are. Without a plan the only agent has every row."""
    scores = _linear(x, order, offsets, weights, biases)
    made = single.forward(scores, uniform, coin, forced, kind, temperature, exploration)
    actions, value = made.actions, made.value
    bounds = None if offsets is None else on_host(offsets)
    if order is not None and offsets is not None and (bounds is None or bounds[-1] < order.shape[0]):
        kept = torch.arange(order.shape[0], device=order.device) < offsets[-1]
        has_agent = torch.empty_like(kept).index_copy_(0, order, kept)
        actions = actions if forced is not None else torch.where(has_agent, actions, 0)
        value = torch.where(has_agent, value, 0)
    found = [actions, value, made.greedy, scores]
    if critic_weights or critic_biases:
        critic = _linear(x, order, offsets, critic_weights, critic_biases)
        found += [critic, _critic_at(critic, actions).contiguous()]
        if expected:
            found.append(_expected(scores, critic, kind, temperature))
    return found


def _linear(
    x: Tensor | None, order: Tensor | None, offsets: Tensor | None, weights: Tensors, biases: Tensors
) -> Tensor:
    if order is not None and offsets is not None:
        return linear.forward(offsets if x is None else x, order, order, offsets, weights, biases)[0]
    if x is None:
        raise ValueError("x: expected a tensor, whose rows are counted without a plan, got None")
    if not weights:
        return biases[0].reshape(1, -1).repeat(x.shape[0], 1)
    weight = weights[0].reshape(weights[0].shape[-2:])
    return torch.nn.functional.linear(x, weight, biases[0].reshape(-1) if biases else None)


def backward(
    grad_value: Tensor | None,
    grad_scores: Tensor | None,
    grad_critic: Tensor | None,
    grad_critic_at: Tensor | None,
    scores: Tensor,
    actions: Tensor,
    x: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    weights: Tensors,
    critic_weights: Tensors,
    agents: int,
    critic_width: int,
    kind: str,
    temperature: float,
    want_x: bool,
    wants: tuple[bool, bool],
    critic_wants: tuple[bool, bool],
    stacked: bool,
    critic_stacked: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of x, weights, biases, and the critic's: of the last two pairs as wanted, and if there is any."""
    dx: Tensor | None = None
    dw: list[Tensor] = []
    db: list[Tensor] = []
    critic_dw: list[Tensor] = []
    critic_db: list[Tensor] = []
    if grad_value is not None or grad_scores is not None:
        g = grad_scores
        if grad_value is not None:
            own = single.backward(grad_value, scores, actions, kind, temperature)
            g = own if g is None else g + own
        dx, dw, db = _linear_backward(g, x, order, offsets, weights, agents, want_x, wants, stacked)  # type: ignore[arg-type]
    if grad_critic is not None or grad_critic_at is not None:
        g = grad_critic
        if grad_critic_at is not None:
            own = grad_critic_at[:, None]
            if critic_width > 1:
                taken = torch.arange(critic_width, device=actions.device) == actions[:, None]
                own = torch.where(taken, own, 0)
            own = own.to(scores.dtype)
            g = own if g is None else g + own
        more, critic_dw, critic_db = _linear_backward(
            g, x, order, offsets, critic_weights, agents, want_x, critic_wants, critic_stacked  # type: ignore[arg-type]
        )  # fmt: skip
        dx = more if dx is None else dx if more is None else dx + more
    return scores.new_empty(0) if dx is None else dx, dw, db, critic_dw, critic_db


def _linear_backward(
    g: Tensor, x: Tensor | None, order: Tensor | None, offsets: Tensor | None, weights: Tensors, agents: int,
    want_x: bool, wants: tuple[bool, bool], stacked: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:  # fmt: skip
    want_x = want_x and len(weights) > 0
    if order is not None and offsets is not None:
        source = offsets if x is None else x
        dx, dw, db = linear.backward(
            g, source, order, order, order, offsets, weights, agents, (want_x, *wants), stacked=stacked
        )
        return dx if want_x else None, dw, db
    dw, db = [], []
    if wants[0] and weights and x is not None:
        dw = [(g.mT @ x).reshape(weights[0].shape)]
    if wants[1]:
        db = [g.sum(0).reshape((1, -1) if stacked or not weights else (-1,))]
    return g @ weights[0].reshape(weights[0].shape[-2:]) if want_x else None, dw, db
