"""``grouped_linear`` for the dispatcher, on each compiled backend: schemas and fakes.

C++ implements the ops with ``native`` in their names (csrc/cpu/grouped_linear), Triton kernels those with ``triton``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..registry import define_compiled, library, register_fake
from .contract import BackwardCall


def _forward(
    x: Tensor,
    take: Tensor | None,
    put: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    like = (weights or biases)[0]
    rows = x.shape[0] if take is None else take.shape[0]
    y = like.new_empty(rows, like.shape[-2 if weights else -1])
    return y, torch.empty_like(y) if keep else like.new_empty(0)


def _planned(
    x: Tensor, actions: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: int, keep: bool
) -> tuple[Tensor, ...]:
    modules = weights[0].shape[0] if weights[0].dim() == 3 else len(weights)
    plan = torch.empty_like(actions), actions.new_empty(modules + 1), actions.new_empty(1)
    return *_forward(x, actions, None, plan[1], weights, biases, activation, keep), *plan


def _backward(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    c = BackwardCall(*args)
    dx, dw, db = _backward_stacked(*args)
    if c.want_weights:
        dw = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in c.weights]
    if not c.stacked and c.want_biases:
        db = [db[0].new_empty(db[0].shape[1:] if c.weights else (1, db[0].shape[1])) for _ in range(c.modules)]
    return dx, dw, db


def _backward_stacked(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Triton's, which makes all modules' gradients in one tensor, be they stacked or not."""
    c = BackwardCall(*args)
    rows, O = (c.x if c.take is None else c.take).shape[0], c.grad.shape[1]
    dx = c.grad.new_empty((rows, c.x.shape[1]) if c.want_x else (0,))
    dw = [c.grad.new_empty(c.modules, O, c.x.shape[1])] if c.want_weights else []
    return dx, dw, [c.grad.new_empty(c.modules, O)] if c.want_biases else []


define_compiled(
    "_grouped_linear_{}",
    "(Tensor x, Tensor? take, Tensor? put, Tensor offsets, Tensor[]? weights, Tensor[]? biases, int activation, "
    "bool keep) -> (Tensor, Tensor)",
    _forward,
)
define_compiled(
    "_grouped_linear_{}_backward",
    "(Tensor grad, Tensor x, Tensor? take, Tensor? spread, Tensor? put, Tensor offsets, Tensor[]? weights, "
    "int modules, bool want_x, bool want_weights, bool want_biases, int activation, Tensor? kept, bool stacked, "
    "bool keep_empty) -> (Tensor, Tensor[], Tensor[])",
    _backward,
    triton=_backward_stacked,
)

_PLANNED = "_grouped_linear_native_planned"
library.define(
    f"{_PLANNED}(Tensor x, Tensor actions, Tensor[]? weights, Tensor[]? biases, int activation, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
register_fake(_PLANNED, _planned)
