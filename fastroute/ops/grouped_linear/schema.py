"""``grouped_linear`` for the dispatcher, on each compiled backend: schemas and fakes.

C++ implements the ops with ``native`` in their names (csrc/cpu/grouped_linear), Triton kernels those with ``triton``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import define_compiled, library, register_fake


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


def _backward(
    grad: Tensor, x: Tensor, take: Tensor | None, spread: Tensor | None, put: Tensor | None, offsets: Tensor,
    weights: Sequence[Tensor], modules: int, want_x: bool, want_weights: bool, want_biases: bool, activation: int,
    kept: Tensor | None, stacked: bool, keep_empty: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    rows = x.shape[0] if take is None else take.shape[0]
    dx = grad.new_empty((rows, x.shape[1]) if want_x else (0,))
    dw = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights] if want_weights else []
    O = grad.shape[1]
    if not want_biases:
        return dx, dw, []
    if stacked:
        return dx, dw, [grad.new_empty(modules, O)]
    return dx, dw, [grad.new_empty((O,) if weights else (1, O)) for _ in range(modules)]


def _backward_stacked(
    grad: Tensor, x: Tensor, take: Tensor | None, spread: Tensor | None, put: Tensor | None, offsets: Tensor,
    weights: Sequence[Tensor], modules: int, want_x: bool, want_weights: bool, want_biases: bool, activation: int,
    kept: Tensor | None, stacked: bool, keep_empty: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """Triton's, which makes all modules' gradients in one tensor, be they stacked or not."""
    rows, O = x.shape[0] if take is None else take.shape[0], grad.shape[1]
    dx = grad.new_empty((rows, x.shape[1]) if want_x else (0,))
    dw = [grad.new_empty(modules, O, x.shape[1])] if want_weights else []
    return dx, dw, [grad.new_empty(modules, O)] if want_biases else []


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
