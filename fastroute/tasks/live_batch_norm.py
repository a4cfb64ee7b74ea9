"""BatchNorm over some of its channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.dtypes import accumulating
from ..ops.recomputation import is_recomputation


def uses_batch(norm: Any) -> bool:
    """Whether it takes its statistics from the batch."""
    return bool(norm.training or norm.running_mean is None)


def _pick(t: Tensor | None, index: Tensor) -> Any:
    return None if t is None else t.index_select(0, index)


def live_batch_norm(norm: Any, y: Tensor, index: Tensor, dead_y: Tensor | None, dead: Tensor | None) -> Tensor:
    """BatchNorm of compact channels y [B, L, ...], numbered ``index`` [L], with the layer's parameters and buffers.

    In training the running statistics of these channels move, and those of ``dead_y``, channels ``dead``, if given;
    but not when a forward pass is made again for backward.
    """
    mean, var = norm.running_mean, norm.running_var
    weight, bias = _pick(norm.weight, index), _pick(norm.bias, index)
    if not norm.training or mean is None or not norm.track_running_stats:
        return F.batch_norm(y, _pick(mean, index), _pick(var, index), weight, bias, uses_batch(norm), 0.0, norm.eps)
    factor, again = 0.0 if norm.momentum is None else norm.momentum, is_recomputation()
    if not again and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    live_mean, live_var = _pick(mean, index), _pick(var, index)
    out = F.batch_norm(y, live_mean, live_var, weight, bias, True, factor, norm.eps)
    if again:
        return out
    with torch.no_grad():
        mean.index_copy_(0, index, live_mean)
        var.index_copy_(0, index, live_var)
        if dead_y is not None and dead is not None:
            dead_mean, dead_var = _pick(mean, dead), _pick(var, dead)
            F.batch_norm(dead_y, dead_mean, dead_var, None, None, True, factor, norm.eps)
            mean.index_copy_(0, dead, dead_mean)
            var.index_copy_(0, dead, dead_var)
    return out


def eval_scale(norm: Any, index: Tensor) -> tuple[Tensor, Tensor]:
    """[G, L] each: what BatchNorm in eval multiplies channels ``index`` by, and then adds, in at least float32."""
    mean, var, weight, bias = (
        None if t is None else t.to(accumulating(t.dtype))[index]
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    scale = torch.rsqrt(var + norm.eps)  # type: ignore[operator]
    scale = scale if weight is None else scale * weight
    shift = -mean * scale  # type: ignore[operator]
    return scale, shift if bias is None else shift + bias
