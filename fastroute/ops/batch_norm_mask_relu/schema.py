"""``batch_norm_mask_relu`` for the dispatcher, on each compiled backend: schemas and fakes.

C++ implements the ops with ``native`` in their names (csrc/cpu/batch_norm_mask_relu), Triton kernels those with
``triton``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulating
from ..registry import define_compiled
from ..task_mask.schema import TASK


def _batch_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    training = rest[7]
    mean = x.new_empty(x.shape[1] if training else 0, dtype=torch.float64)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _batch_norm_backward(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, want_x = rest[6], rest[7], rest[-1]
    dw, db = (
        x.new_empty(x.shape[1], dtype=accumulating(x.dtype) if parameter is None else parameter.dtype)
        for parameter in (weight, bias)
    )
    return torch.empty_like(x) if want_x else x.new_empty(0), dw, db


define_compiled(
    "_batch_norm_mask_relu_{}",
    f"(Tensor x, {TASK}, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, "
    "bool training, float momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)",
    _batch_norm,
    tags=(torch.Tag.needs_fixed_stride_order,),
)
define_compiled(
    "_batch_norm_mask_relu_{}_backward",
    f"(Tensor g, Tensor x, Tensor? y, {TASK}, Tensor? running_mean, Tensor? running_var, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor scale, bool training, float eps, bool relu, bool want_x) "
    "-> (Tensor, Tensor, Tensor)",
    _batch_norm_backward,
    tags=(torch.Tag.needs_fixed_stride_order,),
)
