"""The plain backend of ``agent_policy``: on a plan of the agents, with the gradient written out.

Axes: N rows, A agents, F features in, K choices, C outputs of a critic: K, or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..grouped_linear import plain as linear
from ..host import on_host
from ..policy import plain as single
from .reference import _critic_at, _expected

Tensors = Sequence[Tensor]


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
        has_agent = torch.zeros_like(kept).index_copy_(0, order, kept)
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
        dx, dw, db = _linear_backward(g, x, order, offsets, weights, agents, want_x, wants, stacked)
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
            g, x, order, offsets, critic_weights, agents, want_x, critic_wants, critic_stacked
        )
        dx = more if dx is None else dx if more is None else dx + more
    return scores.new_empty(0) if dx is None else dx, dw, db, critic_dw, critic_db


def _linear_backward(
    g: Any, x: Tensor | None, order: Tensor | None, offsets: Tensor | None, weights: Tensors, agents: int,
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
