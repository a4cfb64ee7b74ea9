"""The plain backend of ``batch_norm_mask_relu``, with the gradient written out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..task_mask.plain import gate, mask_
from ..task_mask.reference import live, over


def batch_norm(
    x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int, running_mean: Tensor | None,
    running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float,
    eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean [C], 1 / deviation [C] of the batch; empty when not training). Running statistics are written."""
    y, mean, scale = torch.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    mask_(y, mapping, tasks, task, relu)
    return y, mean, scale


def batch_norm_backward(
    g: Tensor, x: Tensor, y: Tensor | None, mapping: Tensor, tasks: Tensor | None, task: int,
    running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    scale: Tensor, training: bool, eps: float, relu: bool, want_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (empty, where it is not wanted), weight and bias (of no use, where there is none)."""
    g = gate(g, y if relu else None, mapping, tasks, task)
    if not training:  # 0 times NaN is NaN
        x = gate(x, None, mapping, tasks, task)
    wants = [want_x, weight is not None, bias is not None]
    if x.numel():
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, running_mean, running_var, mean, scale, training, eps, wants
        )
        if want_x:
            alive = live(mapping, tasks, task)
            dx.masked_fill_(~over(alive.any(0)[None] if training else alive, x), 0)
    else:  # PyTorch's divides by the number of samples, as an integer
        given = zip((x, weight, bias), wants, strict=True)
        dx, dw, db = (torch.zeros_like(t) if t is not None and wanted else None for t, wanted in given)
    return tuple(x.new_empty(0) if t is None else t for t in (dx, dw, db))  # type: ignore[return-value]
