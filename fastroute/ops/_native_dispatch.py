"""``dispatch``'s ``native`` backend: the schemas and fakes of the C++ in ``csrc/cpu/dispatch.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._registry import library

library.define("_dispatch_plan_native(Tensor actions, int modules) -> (Tensor, Tensor, Tensor)")
library.define(
    "_grouped_linear_native(Tensor x, Tensor? take, Tensor? put, Tensor offsets, Tensor[] weights, Tensor[] biases) "
    "-> Tensor"
)
library.define(
    "_grouped_linear_native_backward(Tensor grad, Tensor x, Tensor? take, Tensor? put, Tensor offsets, "
    "Tensor[] weights, int modules, bool want_x, bool want_weights, bool want_biases, bool keep_empty=True) "
    "-> (Tensor, Tensor[], Tensor[])"
)


@torch.library.register_fake("fastroute::_dispatch_plan_native", lib=library)
def _(actions: Tensor, modules: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(actions), actions.new_empty(modules + 1), actions.new_empty(1)


@torch.library.register_fake("fastroute::_grouped_linear_native", lib=library)
def _(
    x: Tensor,
    take: Tensor | None,
    put: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    like = (weights or biases)[0]
    return like.new_empty(x.shape[0], like.shape[0 if weights else -1])


@torch.library.register_fake("fastroute::_grouped_linear_native_backward", lib=library)
def _(
    grad: Tensor, x: Tensor, take: Tensor | None, put: Tensor | None, offsets: Tensor, weights: Sequence[Tensor],
    modules: int, want_x: bool, want_weights: bool, want_biases: bool, keep_empty: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    dx = x.new_empty(x.shape if want_x else (0,))
    dw = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights] if want_weights else []
    width = grad.shape[1:] if weights else (1, grad.shape[1])
    db = [grad.new_empty(width) for _ in range(modules)] if want_biases else []
    return dx, dw, db
