"""Triton kernels of ``batch_norm_mask_relu``: statistics, normalisation and the gradient of both, with a task's mask.

A channel's sums are kept in float64: pieces of the batch first, then all of them by one program.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import cdiv
from .task_mask import Walk, _task, addresses, kept, live_channels, place, row, walk

__all__ = ["backward", "forward"]


@triton.jit
def shift_of(x, c, x_c, C, WIDE: tl.constexpr):
    """A number of each channel's own: sums about it keep their digits where the mean is large."""
    if WIDE:
        c = c.to(tl.int64)
    first = tl.load(x + c * x_c, mask=c < C, other=0.0).to(tl.float32)
    return tl.where(tl.abs(first) < float("inf"), first, 0.0)


@triton.jit(do_not_specialize=["task"])
def sums_kernel(
    partial, g, x, mapping, tasks, task, affine, B, C, S, T, task_stride, units,
    g_b, g_c, g_s, x_b, x_c, x_s,
    EACH: tl.constexpr, BACKWARD: tl.constexpr, RELU: tl.constexpr, DENSE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """grid (tiles of channels, splits): partial [splits, 3, C] of the split's sum of x about ``shift_of``, its sum of
    squares about its own mean, and its count.

    BACKWARD: of dz and dz (x - mean), and whether any sample keeps the channel.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    tiles = tl.cdiv(S, BLOCK_S)
    if BACKWARD:
        about = tl.load(row(affine, 2, C) + c, mask=c < C, other=0.0)[:, None]
        factor = tl.load(affine + c, mask=c < C, other=0.0)[:, None]
        term = tl.load(row(affine, 1, C) + c, mask=c < C, other=0.0)[:, None]
    else:
        about = shift_of(x, c, x_c, C, WIDE)[:, None]
    first = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    second = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    alive = tl.zeros([BLOCK_C], tl.float32)
    n = tl.zeros([1, BLOCK_S], tl.float32)
    begin = split * units
    for unit in range(begin, tl.minimum(begin + units, B * tiles)):
        b = unit // tiles
        s = (unit % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = (c < C)[:, None] & (s < S)[None, :]
        keep = inside
        if BACKWARD:
            live = live_channels(mapping, tasks, task, b, c, C, T, task_stride, EACH)
            alive = tl.where(live, 1.0, alive)
            keep = inside & live[:, None]
        v = kept(x, b, c, s, x_b, x_c, x_s, inside, keep, DENSE, WIDE).to(tl.float32)
        d = tl.where(keep, v - about, 0.0)
        if BACKWARD:
            dz = kept(g, b, c, s, g_b, g_c, g_s, inside, keep, DENSE, WIDE).to(tl.float32)
            if RELU:
                dz = tl.where((v - about) * factor + term <= 0.0, 0.0, dz)
            first += dz
            second += dz * d
        else:  # about the mean so far, by Youngs and Cramer (1971): the shift may be unlike the others
            counted = (s < S)[None, :]
            d_mean = d - first / tl.maximum(n, 1.0)
            second += d_mean * tl.where(counted, n / (n + 1.0), 0.0) * d_mean
            first += d
            n += tl.where(counted, 1.0, 0.0)
    to = partial + split.to(tl.int64) * 3 * C + c
    sum_ = tl.sum(first.to(tl.float64), 1)
    squares = tl.sum(second.to(tl.float64), 1)
    if not BACKWARD:
        count = tl.sum(n.to(tl.float64), 1)
        d_mean = first.to(tl.float64) / tl.maximum(n, 1.0).to(tl.float64) - (sum_ / count)[:, None]
        squares += tl.sum(n.to(tl.float64) * d_mean * d_mean, 1)
        alive += tl.sum(n, 1)
    tl.store(to, sum_, mask=c < C)
    tl.store(row(to, 1, C), squares, mask=c < C)
    tl.store(row(to, 2, C), alive, mask=c < C)


@triton.jit
def parameter(p, c, C, GIVEN: tl.constexpr, otherwise: tl.constexpr):
    """float32 [BLOCK_C] of a parameter [C], or of one that is not there."""
    if GIVEN:
        return tl.load(p + c, mask=c < C, other=0.0).to(tl.float32)
    else:
        return tl.zeros([c.shape[0]], tl.float32) + otherwise


@triton.jit
def total(partial, c, C, number: tl.constexpr, splits, BLOCK_C: tl.constexpr):
    """The sum of the splits, in float64 like them: there are few."""
    sum_ = tl.zeros([BLOCK_C], tl.float64)
    for k in range(splits):
        sum_ += tl.load(row(partial + tl.cast(k, tl.int64) * 3 * C, number, C) + c, mask=c < C, other=0.0)
    return sum_


@triton.jit
def squares_about(mean, partial, c, C, splits, BLOCK_C: tl.constexpr):
    """The sum of squares about the mean of all, from those of the splits about their own."""
    sum_ = total(partial, c, C, 1, splits, BLOCK_C)
    for k in range(splits):
        split = partial + tl.cast(k, tl.int64) * 3 * C
        n = tl.load(row(split, 2, C) + c, mask=c < C, other=1.0)
        d = tl.load(split + c, mask=c < C, other=0.0) / n - mean
        sum_ += n * d * d
    return sum_


@triton.jit
def rest(m):
    """What float32 rounds away of a mean."""
    rounded = m.to(tl.float32)
    return tl.where(tl.abs(rounded) < float("inf"), m - rounded.to(tl.float64), 0.0)


@triton.jit
def statistics_kernel(
    affine, mean, scale, partial, x, running_mean, running_var, weight, bias, C, count, splits, x_c,
    TRAINING: tl.constexpr, RUNNING: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, MOMENTUM: tl.constexpr,
    EPS: tl.constexpr, KNOWN: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (tiles of channels,): affine [3, C] of z = (x - affine[2]) affine[0] + affine[1]: the mean is affine[2], and
    what that rounds away is in affine[1].

    TRAINING: of the batch, which updates the running statistics; if KNOWN, ``mean`` and ``scale`` are given.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if TRAINING and KNOWN:
        m = tl.load(mean + c, mask=inside, other=0.0)
        r = tl.load(scale + c, mask=inside, other=0.0)
    elif TRAINING:
        about = total(partial, c, C, 0, splits, BLOCK_C) / count
        var = squares_about(about, partial, c, C, splits, BLOCK_C) / count
        m = shift_of(x, c, x_c, C, WIDE).to(tl.float64) + about
        r = 1.0 / tl.sqrt(var + EPS)
        tl.store(mean + c, m, mask=inside)
        tl.store(scale + c, r, mask=inside)
        if RUNNING:
            old_mean = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float32)
            old_var = tl.load(running_var + c, mask=inside, other=0.0).to(tl.float32)
            unbiased = (var * (count / (count - 1.0))).to(tl.float32)
            tl.store(running_mean + c, MOMENTUM * m.to(tl.float32) + (1.0 - MOMENTUM) * old_mean, mask=inside)
            tl.store(running_var + c, MOMENTUM * unbiased + (1.0 - MOMENTUM) * old_var, mask=inside)
    else:
        m = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float64)
        r = 1.0 / tl.sqrt(tl.load(running_var + c, mask=inside, other=1.0).to(tl.float64) + EPS)
    a = r * parameter(weight, c, C, WEIGHT, 1.0).to(tl.float64)
    term = parameter(bias, c, C, BIAS, 0.0).to(tl.float64) - rest(m) * a
    tl.store(affine + c, a.to(tl.float32), mask=inside)
    tl.store(row(affine, 1, C) + c, term.to(tl.float32), mask=inside)
    tl.store(row(affine, 2, C) + c, m.to(tl.float32), mask=inside)


@triton.jit
def gradients_kernel(
    affine, dweight, dbias, partial, mean, scale, running_mean, running_var, C, count, splits,
    TRAINING: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (tiles of channels,): gradients of weight and bias, and affine [3:6, C], what dx takes: k, q, any sample."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    sum_ = total(partial, c, C, 0, splits, BLOCK_C)
    by = total(partial, c, C, 1, splits, BLOCK_C)
    alive = total(partial, c, C, 2, splits, BLOCK_C)
    if TRAINING:
        m = tl.load(mean + c, mask=inside, other=0.0)
        r = tl.load(scale + c, mask=inside, other=0.0)
    else:
        m = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float64)
        r = 1.0 / tl.sqrt(tl.load(running_var + c, mask=inside, other=1.0).to(tl.float64) + EPS)
    by -= rest(m) * sum_
    q = by * r * r / count
    tl.store(dbias + c, sum_.to(tl.float32), mask=inside)
    tl.store(dweight + c, (by * r).to(tl.float32), mask=inside)
    tl.store(row(affine, 3, C) + c, (sum_ / count - rest(m) * q).to(tl.float32), mask=inside)
    tl.store(row(affine, 4, C) + c, q.to(tl.float32), mask=inside)
    tl.store(row(affine, 5, C) + c, tl.where(alive > 0.0, 1.0, 0.0), mask=inside)


@triton.jit(do_not_specialize=["task"])
def normalise_kernel(
    out, g, x, mapping, tasks, task, affine, C, S, T, task_stride,
    out_b, out_c, out_s, g_b, g_c, g_s, x_b, x_c, x_s,
    EACH: tl.constexpr, BACKWARD: tl.constexpr, TRAINING: tl.constexpr, RELU: tl.constexpr, DENSE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """grid (tiles,): y from x, or (BACKWARD) dx from g and x."""
    b, c, s = place(C, S, BLOCK_C, BLOCK_S)
    live = live_channels(mapping, tasks, task, b, c, C, T, task_stride, EACH)[:, None]
    inside = (c < C)[:, None] & (s < S)[None, :]
    factor = tl.load(affine + c, mask=c < C, other=0.0)[:, None]
    term = tl.load(row(affine, 1, C) + c, mask=c < C, other=0.0)[:, None]
    touched = inside & live
    if BACKWARD and TRAINING:  # a sample that drops a channel moves its statistics still
        touched = inside & (tl.load(row(affine, 5, C) + c, mask=c < C, other=0.0) > 0.0)[:, None]
    v = kept(x, b, c, s, x_b, x_c, x_s, inside, touched, DENSE, WIDE).to(tl.float32)
    mean = tl.load(row(affine, 2, C) + c, mask=c < C, other=0.0)[:, None]
    z = (v - mean) * factor + term
    if BACKWARD:
        dz = kept(g, b, c, s, g_b, g_c, g_s, inside, inside & live, DENSE, WIDE).to(tl.float32)
        if RELU:
            dz = tl.where(z <= 0.0, 0.0, dz)
        if TRAINING:
            k = tl.load(row(affine, 3, C) + c, mask=c < C, other=0.0)[:, None]
            q = tl.load(row(affine, 4, C) + c, mask=c < C, other=0.0)[:, None]
            dz = dz - k - (v - mean) * q
        made = dz * factor
    else:
        made = z
        if RELU:
            made = tl.where(z < 0.0, 0.0, z)
    to = addresses(out, b, c, s, out_b, out_c, out_s, WIDE)
    tl.store(to, tl.where(touched, made, 0.0).to(out.dtype.element_ty), mask=inside)


class _Split(NamedTuple):
    """How sums over samples and positions are shared out."""

    partial: Tensor  #: [splits, 3, C] float64
    splits: int
    units: int  #: tiles of each


def _split(x: Tensor, way: Walk) -> _Split:
    tiles, rows = way.B * cdiv(way.S, way.block_s), cdiv(way.C, way.block_c)
    splits = max(1, min(tiles, 4 * launch.multiprocessors(x.device) // rows, 65535))
    units = cdiv(tiles, splits)
    splits = cdiv(tiles, units)
    return _Split(x.new_empty(splits, 3, way.C, dtype=torch.float64), splits, units)


_SMALL = 128  #: channels of a program that settles them


def _statistics(
    x: Tensor, way: Walk, split: _Split | None, affine: Tensor, mean: Tensor, scale: Tensor,
    running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> None:  # fmt: skip
    launch.launch(
        statistics_kernel, (cdiv(way.C, _SMALL),), affine, mean, scale, None if split is None else split.partial, x,
        running_mean, running_var, weight, bias, way.C, way.B * way.S, 0 if split is None else split.splits,
        way.of(0)[1], warps=4, stages=1, TRAINING=training, RUNNING=running_mean is not None, WEIGHT=weight is not None,
        BIAS=bias is not None, MOMENTUM=momentum, EPS=eps, KNOWN=split is None, WIDE=way.wide, BLOCK_C=_SMALL,
    )  # fmt: skip


def forward(
    x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int, running_mean: Tensor | None,
    running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float,
    eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(x)
    way = walk(x, y)
    if way is None:
        raise ValueError("x: expected contiguous or channels last, of fewer than 2^31 tiles")
    C = way.C
    affine = x.new_empty(3, C, dtype=torch.float32)
    mean = x.new_empty(C if training else 0, dtype=torch.float64)
    scale = torch.empty_like(mean)
    which, (T, task_stride), each = _task(mapping, tasks, task)
    split = _split(x, way) if training else None
    tile = way.constants()
    if split is not None:
        launch.launch(
            sums_kernel, (cdiv(C, way.block_c), split.splits), split.partial, x, x, *which, affine, way.B, C, way.S, T,
            task_stride, split.units, *way.of(0), *way.of(0), warps=8, stages=2, EACH=each, BACKWARD=False, RELU=relu,
            **tile,
        )  # fmt: skip
    _statistics(x, way, split, affine, mean, scale, running_mean, running_var, weight, bias, training, momentum, eps)
    launch.launch(
        normalise_kernel, (way.tiles(),), y, x, x, *which, affine, C, way.S, T, task_stride,
        *way.of(1), *way.of(0), *way.of(0), warps=4, stages=1, EACH=each, BACKWARD=False, TRAINING=training, RELU=relu,
        **tile,
    )  # fmt: skip
    return y, mean, scale


def backward(
    g: Tensor, x: Tensor, y: Tensor | None, mapping: Tensor, tasks: Tensor | None, task: int,
    running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    scale: Tensor, training: bool, eps: float, relu: bool, want_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(x)
    if g.stride() != dx.stride():
        g = torch.empty_like(x).copy_(g)
    way = walk(x, g, dx)
    if way is None:
        raise ValueError("x: expected contiguous or channels last, of fewer than 2^31 tiles")
    C = way.C
    affine = x.new_empty(6, C, dtype=torch.float32)
    dw, db = (x.new_empty(C, dtype=torch.float32 if p is None else p.dtype) for p in (weight, bias))
    _statistics(x, way, None, affine, mean, scale, running_mean, running_var, weight, bias, training, 0.0, eps)
    which, (T, task_stride), each = _task(mapping, tasks, task)
    split = _split(x, way)
    tile = way.constants()
    launch.launch(
        sums_kernel, (cdiv(C, way.block_c), split.splits), split.partial, g, x, *which, affine, way.B, C, way.S, T,
        task_stride, split.units, *way.of(1), *way.of(0), warps=8, stages=2, EACH=each, BACKWARD=True, RELU=relu,
        **tile,
    )  # fmt: skip
    launch.launch(
        gradients_kernel, (cdiv(C, _SMALL),), affine, dw, db, split.partial, mean, scale, running_mean, running_var,
        C, way.B * way.S, split.splits, warps=4, stages=1, TRAINING=training, EPS=eps, BLOCK_C=_SMALL,
    )  # fmt: skip
    if not want_x:
        return x.new_empty(0), dw, db
    launch.launch(
        normalise_kernel, (way.tiles(),), dx, g, x, *which, affine, C, way.S, T, task_stride,
        *way.of(2), *way.of(1), *way.of(0), warps=4, stages=1, EACH=each, BACKWARD=True, TRAINING=training, RELU=relu,
        **tile,
    )  # fmt: skip
    return dx, dw, db
