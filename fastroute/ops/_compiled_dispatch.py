"""What ``dispatch`` and ``grouped_linear`` are to the dispatcher on compiled backends: schemas and fakes.

C++ implements the ops whose names end in ``_native`` (csrc/cpu), Triton kernels those in ``_triton``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._registry import library, register_fake


def _plan(actions: Tensor, modules: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(actions), actions.new_empty(modules + 1), actions.new_empty(1)


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


for _backend in ("native", "triton"):
    library.define(f"_dispatch_plan_{_backend}(Tensor actions, int modules) -> (Tensor, Tensor, Tensor)")
    library.define(
        f"_grouped_linear_{_backend}(Tensor x, Tensor? take, Tensor? put, Tensor offsets, Tensor[] weights, "
        "Tensor[] biases, int activation, bool keep) -> (Tensor, Tensor)"
    )
    library.define(
        f"_grouped_linear_{_backend}_backward(Tensor grad, Tensor x, Tensor? take, Tensor? spread, Tensor? put, "
        "Tensor offsets, Tensor[] weights, int modules, bool want_x, bool want_weights, bool want_biases, "
        "int activation, Tensor? kept, bool stacked, bool keep_empty) -> (Tensor, Tensor[], Tensor[])"
    )
    for _name, _fake in (
        (f"_dispatch_plan_{_backend}", _plan),
        (f"_grouped_linear_{_backend}", _forward),
        (f"_grouped_linear_{_backend}_backward", _backward if _backend == "native" else _backward_stacked),
    ):
        register_fake(_name, _fake)
