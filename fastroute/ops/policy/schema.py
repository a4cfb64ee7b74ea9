"""``policy`` for the dispatcher, on each compiled backend: schemas and fakes.

C++ implements the ops with ``native`` in their names (csrc/cpu/policy), Triton kernels those with ``triton``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulating
from ..registry import define_compiled


def _policy(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = scores.shape[:1]
    actions = scores.new_empty(rows, dtype=torch.int64)
    return actions, scores.new_empty(rows, dtype=accumulating(scores.dtype)), torch.empty_like(actions)


def _policy_backward(grad: Tensor, scores: Tensor, actions: Tensor, kind: int, temperature: float) -> Tensor:
    return scores.new_empty(scores.shape)


define_compiled(
    "_policy_{}",
    "(Tensor scores, Tensor? uniform, Tensor? coin, Tensor? forced, int kind, float temperature, float exploration) "
    "-> (Tensor, Tensor, Tensor)",
    _policy,
)
define_compiled(
    "_policy_{}_backward",
    "(Tensor grad, Tensor scores, Tensor actions, int kind, float temperature) -> Tensor",
    _policy_backward,
)
