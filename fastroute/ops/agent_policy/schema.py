"""``agent_policy`` for the dispatcher, on each compiled backend: schemas and fakes.

C++ implements the ops with ``native`` in their names (csrc/cpu/agent_policy), Triton kernels those with ``triton``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulating
from ..registry import define_compiled
from .contract import BackwardCall

Tensors = Sequence[Tensor]


def _agent_policy(x: Tensor | None, order: Tensor | None, offsets: Tensor | None, *args: Any) -> list[Tensor]:
    weights, biases, critic_weights, critic_biases, *_, expected = args
    like = (*weights, *biases)[0]
    N = order.shape[0] if order is not None else 0 if x is None else x.shape[0]

    def empty(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
        return like.new_empty(shape, dtype=dtype)

    sums = accumulating(like.dtype)
    whole, value = (empty(N, dtype=torch.int64) for _ in range(2)), empty(N, dtype=sums)
    actions, greedy = whole
    made = [actions, value, greedy, empty(N, like.shape[-2] if weights else like.shape[-1])]
    if critic_weights or critic_biases:
        width = critic_weights[0].shape[-2] if critic_weights else critic_biases[0].shape[-1]
        made += [empty(N, width), empty(N, dtype=sums)]
    return made + [empty(N, dtype=sums)] * expected


def _agent_policy_backward(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    c = BackwardCall(*args)

    def of(flows: bool, w: Tensors, width: int, want_w: bool, want_b: bool, is_stacked: bool) -> list[list[Tensor]]:
        dw = [t.new_empty(t.shape) for t in w] if flows and want_w else []
        shape = (c.agents, width) if is_stacked else (width,) if w else (1, width)
        count = 0 if not flows or not want_b else 1 if is_stacked else c.agents
        return [dw, [c.scores.new_empty(shape) for _ in range(count)]]

    by_policy = c.grad_value is not None or c.grad_scores is not None
    by_critic = c.grad_critic is not None or c.grad_critic_at is not None
    has_x = c.want_x and ((by_policy and len(c.weights) > 0) or (by_critic and len(c.critic_weights) > 0))
    dx = c.scores.new_empty(c.x.shape if has_x and c.x is not None else (0,))
    dw, db = of(by_policy, c.weights, c.scores.shape[1], c.want_weights, c.want_biases, c.stacked)
    wanted = c.want_critic_weights, c.want_critic_biases
    cw, cb = of(by_critic, c.critic_weights, c.critic_width, *wanted, c.critic_stacked)
    return dx, dw, db, cw, cb


define_compiled(
    "_agent_policy_{}",
    "(Tensor? x, Tensor? order, Tensor? offsets, Tensor[]? weights, Tensor[]? biases, Tensor[]? critic_weights, "
    "Tensor[]? critic_biases, Tensor? uniform, Tensor? coin, Tensor? forced, int kind, float temperature, "
    "float exploration, bool expected) -> Tensor[]",
    _agent_policy,
)
define_compiled(
    "_agent_policy_{}_backward",
    "(Tensor? grad_value, Tensor? grad_scores, Tensor? grad_critic, Tensor? grad_critic_at, Tensor scores, "
    "Tensor actions, Tensor? x, Tensor? order, Tensor? offsets, Tensor[]? weights, Tensor[]? critic_weights, "
    "int agents, int critic_width, int kind, float temperature, bool want_x, bool want_weights, bool want_biases, "
    "bool want_critic_weights, bool want_critic_biases, bool stacked, bool critic_stacked, bool keep_empty) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[])",
    _agent_policy_backward,
)
