"""Convolutions and linear layers over live channels, with dense parameters.

Axes: B samples, O channels out, I in, lo and li of them live, K elements of a kernel, G tasks of a batch.

A dense parameter gets a dense gradient, with exact zeros where nothing is live: momentum and weight decay then move it
as they would under masks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autograd import asked_again, through
from ..ops.dtypes import accumulating
from ..ops.precision import autocast_dtype, autocast_off
from .active_task import traced
from .live_channels import Groups

Mixing = nn.Conv2d | nn.Linear

#: What gathering one weight costs per task (forward and backward, with the reordering inside a convolution), in
#: multiply-adds at the speed of a convolution. From 96 to 512 fit nearly as well (bench/calibrate_tasks.py).
GATHER = 128

#: What one more product costs by itself (calls, views, a small tensor's bookkeeping), in multiply-adds. It decides
#: among small images and few channels. Measured, too; 1.8 to 2.5 million fit about as well.
CALL = 2_500_000


def grouped_is_cheaper(
    positions: int, tasks: int, dense: tuple[int, int], live: tuple[int, int], elements: int = 1,
    *, gather: float = GATHER, call: float = CALL,
) -> bool:  # fmt: skip
    """The cost rule: whether a layer should run task by task on live channels, or once, densely, on all.

    Both costs are counted in multiply-adds, K being the elements of a kernel:

        dense    positions * O * I * K
        grouped  (positions + gather * tasks) * lo * li * K + call * tasks

    where positions are samples times output positions: 1 for a linear layer. Many positions per task favour groups;
    many tasks with few or small images each favour the dense product, whose weights are read once.

    Args:
        positions: of the whole batch.
        tasks: how many are present.
        dense: (O, I).
        live: (lo, li).
        elements: K.
        gather, call: what a weight's gathering costs, and one more product.
    """
    grouped = (positions + gather * tasks) * live[0] * live[1] * elements + call * tasks
    return grouped < positions * dense[0] * dense[1] * elements


def weight_of(layer: Mixing) -> Tensor:
    return layer.weight


def flat_index(out: Tensor, inp: Tensor, width: int) -> Tensor:
    """Rows [lo] and columns [li] -> [lo li], their places in a matrix [O, width]."""
    return (out.unsqueeze(1) * width + inp).flatten()


class _Gather(torch.autograd.Function):
    """W [O, I, ...] at places of its first two axes -> [places, K]; the gradient is written rather than added."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = W.shape
        O, I = W.shape[:2]
        return W.reshape(O * I, -1).index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *dw: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        O, I = ctx.shape[:2]
        zeros = dw[0].new_zeros(O * I, dw[0].shape[1])
        # Under create_graph the copy out of place is the differentiable one.
        made = zeros.index_copy(0, places, dw[0]) if torch.is_grad_enabled() else zeros.index_copy_(0, places, dw[0])
        return made.view(ctx.shape), None


def gather_weight(W: Tensor, out: Tensor | None, inp: Tensor | None) -> Tensor:
    """W [O, I, ...] -> [lo, li, ...]; None for all of an axis."""
    if out is None and inp is None:
        return W
    if out is None or inp is None or W.dim() == 2 or not W.is_contiguous() or traced():
        W = W if out is None else W.index_select(0, out)
        return W if inp is None else W.index_select(1, inp)
    made: Tensor = _Gather.apply(W, flat_index(out, inp, W.shape[1]))
    return made.view(len(out), len(inp), *W.shape[2:])


def gather_bias(b: Tensor | None, out: Tensor | None) -> Tensor | None:
    return b if b is None or out is None else b.index_select(0, out)


def apply(layer: Mixing, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer with other parameters, of fewer channels."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)


def positions(layer: Mixing, x: Tensor) -> int:
    """Samples times output positions."""
    if isinstance(layer, nn.Linear):
        return x.shape[0]
    made = x.shape[0]
    for axis, size in enumerate(x.shape[2:]):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        pad = (0 if layer.padding == "valid" else reach) if isinstance(layer.padding, str) else 2 * layer.padding[axis]
        made *= max((size + pad - reach - 1) // layer.stride[axis] + 1, 0)
    return made


def _by_groups(
    x: Tensor, W: Tensor, b: Tensor | None, out: Tensor | None, inp: Tensor | None, bounds: list[int], layer: Mixing
) -> Tensor:
    parts = []
    for g, (start, end) in enumerate(pairwise(bounds)):
        o, i = _of(out, g), _of(inp, g)
        w, bias = gather_weight(W, o, i).to(x.dtype), gather_bias(b, o)
        parts.append(apply(layer, x[start:end], w, None if bias is None else bias.to(x.dtype)))
    return torch.cat(parts)


class _Grouped(torch.autograd.Function):
    """A convolution or a linear layer, group by group; the weights' gradients are summed in one dense tensor.

    Weights are gathered again in the backward pass rather than kept for every task.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        out: Tensor | None,
        inp: Tensor | None,
        bounds: list[int],
        layer: Mixing,
    ) -> Tensor:
        ctx.save_for_backward(x, W, out, inp)
        ctx.bounds, ctx.layer, ctx.biased = bounds, layer, b is not None
        return _by_groups(x, W, b, out, inp, bounds, layer)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, out, inp = ctx.saved_tensors
        if asked_again(dy):
            rest = out, inp, ctx.bounds, ctx.layer

            def plain(x: Tensor, W: Tensor, b: Tensor | None) -> list[Tensor]:
                wide = accumulating(W.dtype)
                return [_by_groups(x, W.to(wide), None if b is None else b.to(wide), *rest)]

            zeros = W.new_zeros(len(W)).requires_grad_() if ctx.biased else None  # whatever it holds
            return (*through(plain, (x, W, zeros), ctx.needs_input_grad[:3], [dy]), *[None] * 4)
        O, I = W.shape[:2]
        needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
        wide = accumulating(W.dtype)  # a sum over many tasks
        dW = W.new_zeros(O * I, W[0, 0].numel(), dtype=wide) if needs_W else None
        db = dy.new_zeros(O, dtype=wide) if needs_b else None
        dx = torch.empty_like(x) if needs_x else None
        for g, (start, end) in enumerate(pairwise(ctx.bounds)):
            o, i = _of(out, g), _of(inp, g)
            places = _places(o, i, O, I, W.device)
            lo, li = O if o is None else len(o), I if i is None else len(i)
            w = W.reshape(O * I, -1).index_select(0, places).view(lo, li, *W.shape[2:])
            part, dw, bias = _backward(ctx.layer, dy[start:end], x[start:end], w, (needs_x, needs_W, needs_b))
            if dx is not None:
                dx[start:end] = part
            if dW is not None:
                dW.index_add_(0, places, dw.reshape(lo * li, -1).to(wide))
            if db is not None:
                db = db.add_(bias) if o is None else db.index_add_(0, o, bias.to(wide))
        dW = None if dW is None else dW.view(W.shape).to(W.dtype)
        return dx, dW, None if db is None else db.to(dy.dtype), None, None, None, None


def _of(rows: Tensor | None, g: int) -> Tensor | None:
    return None if rows is None else rows[g]


def _places(out: Tensor | None, inp: Tensor | None, O: int, I: int, device: torch.device) -> Tensor:
    return flat_index(
        torch.arange(O, device=device) if out is None else out,
        torch.arange(I, device=device) if inp is None else inp,
        I,
    )


def _backward(layer: Mixing, dy: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Any, Any, Any]:
    """Gradients of x, w and the bias."""
    if isinstance(layer, nn.Linear):
        return dy @ w if needs[0] else None, dy.T @ x if needs[1] else None, dy.sum(0) if needs[2] else None
    padding = layer.padding
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = (0, 0) if padding == "valid" else (reach[0] // 2, reach[1] // 2)
    return torch.ops.aten.convolution_backward(
        dy, x, w, [len(w)] if needs[2] else None, layer.stride, padding, layer.dilation, False, [0, 0], 1, needs
    )


def can_group(layer: Mixing) -> bool:
    """Whether ``grouped`` takes it: not an even kernel with padding "same", which pads one side more."""
    if isinstance(layer, nn.Linear) or layer.padding != "same":
        return True
    return all(d * (k - 1) % 2 == 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))


def grouped(layer: Mixing, x: Tensor, out: Tensor | None, inp: Tensor | None, groups: Groups) -> Tensor:
    """Sorted samples [B, li, ...] -> [B, lo, ...], each with the channels [G, lo], [G, li] of its group."""
    W, b = weight_of(layer), layer.bias
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, W, b = x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)
    with autocast_off(x.device.type):
        made: Tensor = _Grouped.apply(x, W, b, out, inp, groups.bounds, layer)
    return made
