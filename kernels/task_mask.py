"""``task_mask`` on a GPU: a dead channel is written, and where it is a plane of its own it is never read.

Axes: b sample, c channel, s position: the axes after the channels, walked as one. A program has a tile of channels and
positions of one sample, so the row of the mapping that it needs is a vector. Whichever axis is dense has stride 1,
which Triton compiles in and makes wide accesses of. Where that is the channels (DENSE: channels last, or no positions)
a load takes dead lanes along, from sectors that are read anyway: one that is masked lane by lane would be narrow.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import task_mask as reference
from . import launch
from .launch import DTYPES, cdiv, power_of_2

_TILE = 2048  #: numbers of a program's tile


def unsupported(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels would not take these tensors, or None."""
    if dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def live_channels(mapping, tasks, task, b, c, C, T, task_stride, EACH: tl.constexpr):
    """[BLOCK_C] bool: the channels of sample b that take part; none, if its task does not exist."""
    if EACH:
        t = tl.load(tasks + b * task_stride)
    else:
        t = tl.cast(task, tl.int64)
    t += tl.zeros_like(c)  # Triton's interpreter takes no scalar in a mask
    return tl.load(mapping + t * C + c, mask=(c < C) & (t >= 0) & (t < T), other=0.0) != 0.0


@triton.jit
def addresses(p, b, c, s, stride_b, stride_c, stride_s, WIDE: tl.constexpr):
    """Of a tile [c, s] of sample b. Within a sample 32 bits do, unless it is WIDE."""
    if WIDE:
        c = c.to(tl.int64)
        s = s.to(tl.int64)
    return (p + b.to(tl.int64) * stride_b) + (c * stride_c)[:, None] + (s * stride_s)[None, :]


@triton.jit
def kept(p, b, c, s, stride_b, stride_c, stride_s, inside, keep, DENSE: tl.constexpr, WIDE: tl.constexpr):
    """A tile, and zeros where it is not to be kept, whatever is there."""
    at = addresses(p, b, c, s, stride_b, stride_c, stride_s, WIDE)
    if DENSE:
        made = tl.where(keep, tl.load(at, mask=inside, other=0.0), 0.0)
    else:
        made = tl.load(at, mask=keep, other=0.0)
    return made


@triton.jit
def row(p, number: tl.constexpr, C):
    """A row of a matrix of C columns."""
    return p + tl.cast(C, tl.int64) * number


@triton.jit
def place(C, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """(b, c, s) of this program's tile: positions first, then channels, then samples."""
    pid = tl.program_id(0)
    tiles_s = tl.cdiv(S, BLOCK_S)
    tiles_c = tl.cdiv(C, BLOCK_C)
    rest = pid // tiles_s
    c = (rest % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    return rest // tiles_c, c, (pid % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)


@triton.jit(do_not_specialize=["task"])
def mask_kernel(
    out, x, y, mapping, tasks, task, C, S, T, task_stride,
    out_b, out_c, out_s, x_b, x_c, x_s, y_b, y_c, y_s,
    EACH: tl.constexpr, GATE: tl.constexpr, RELU: tl.constexpr, ONLY_DEAD: tl.constexpr, DENSE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """grid (tiles,). ONLY_DEAD: out is x, and live channels stay as they are."""
    b, c, s = place(C, S, BLOCK_C, BLOCK_S)
    live = live_channels(mapping, tasks, task, b, c, C, T, task_stride, EACH)[:, None]
    inside = (c < C)[:, None] & (s < S)[None, :]
    to = addresses(out, b, c, s, out_b, out_c, out_s, WIDE)
    if ONLY_DEAD:
        tl.store(to, tl.zeros([BLOCK_C, BLOCK_S], out.dtype.element_ty), mask=inside & (live == 0))
    else:
        keep = inside & live
        v = kept(x, b, c, s, x_b, x_c, x_s, inside, keep, DENSE, WIDE)
        if RELU:
            v = tl.where(v.to(tl.float32) < 0.0, 0.0, v)  # the interpreter compares the bits of bfloat16
        if GATE:
            decides = kept(y, b, c, s, y_b, y_c, y_s, inside, keep, DENSE, WIDE)
            v = tl.where(decides.to(tl.float32) <= 0.0, 0.0, v)
        tl.store(to, v, mask=inside)


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
    """grid (tiles of channels, splits): partial [splits, 3, C] of the moments of x about ``shift_of``.

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
                dz = tl.where(v * factor + term <= 0.0, 0.0, dz)
            first += dz
            second += dz * d
        else:
            first += d
            second += d * d
    to = partial + split.to(tl.int64) * 3 * C + c
    tl.store(to, tl.sum(first.to(tl.float64), 1), mask=c < C)
    tl.store(row(to, 1, C), tl.sum(second.to(tl.float64), 1), mask=c < C)
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
def statistics_kernel(
    affine, mean, scale, partial, x, running_mean, running_var, weight, bias, C, count, splits, x_c,
    TRAINING: tl.constexpr, RUNNING: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, MOMENTUM: tl.constexpr,
    EPS: tl.constexpr, KNOWN: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (tiles of channels,): affine [3, C] of z = x affine[0] + affine[1], and the mean.

    TRAINING: of the batch, which updates the running statistics; if KNOWN, ``mean`` and ``scale`` are given.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if TRAINING and KNOWN:
        m = tl.load(mean + c, mask=inside, other=0.0)
        r = tl.load(scale + c, mask=inside, other=0.0)
    elif TRAINING:
        about = total(partial, c, C, 0, splits, BLOCK_C) / count
        var = total(partial, c, C, 1, splits, BLOCK_C) / count - about * about
        var = tl.where(var < 0.0, 0.0, var)
        m = (shift_of(x, c, x_c, C, WIDE).to(tl.float64) + about).to(tl.float32)
        r = (1.0 / tl.sqrt(var + EPS)).to(tl.float32)
        tl.store(mean + c, m, mask=inside)
        tl.store(scale + c, r, mask=inside)
        if RUNNING:
            old_mean = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float32)
            old_var = tl.load(running_var + c, mask=inside, other=0.0).to(tl.float32)
            unbiased = (var * (count / (count - 1.0))).to(tl.float32)
            tl.store(running_mean + c, MOMENTUM * m + (1.0 - MOMENTUM) * old_mean, mask=inside)
            tl.store(running_var + c, MOMENTUM * unbiased + (1.0 - MOMENTUM) * old_var, mask=inside)
    else:
        m = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float32)
        var32 = tl.load(running_var + c, mask=inside, other=1.0).to(tl.float32)
        r = (1.0 / tl.sqrt(var32.to(tl.float64) + EPS)).to(tl.float32)
    a = r * parameter(weight, c, C, WEIGHT, 1.0)
    tl.store(affine + c, a, mask=inside)
    tl.store(row(affine, 1, C) + c, parameter(bias, c, C, BIAS, 0.0) - m * a, mask=inside)
    tl.store(row(affine, 2, C) + c, m, mask=inside)


@triton.jit
def gradients_kernel(
    affine, dweight, dbias, partial, scale, running_var, C, count, splits,
    TRAINING: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (tiles of channels,): gradients of weight and bias, and affine [3:6, C], what dx takes: k, q, any sample."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    sum_ = total(partial, c, C, 0, splits, BLOCK_C)
    by = total(partial, c, C, 1, splits, BLOCK_C)
    alive = total(partial, c, C, 2, splits, BLOCK_C)
    if TRAINING:
        r = tl.load(scale + c, mask=inside, other=0.0).to(tl.float64)
    else:
        r = 1.0 / tl.sqrt(tl.load(running_var + c, mask=inside, other=1.0).to(tl.float64) + EPS)
    tl.store(dbias + c, sum_.to(tl.float32), mask=inside)
    tl.store(dweight + c, (by * r).to(tl.float32), mask=inside)
    tl.store(row(affine, 3, C) + c, (sum_ / count).to(tl.float32), mask=inside)
    tl.store(row(affine, 4, C) + c, (by * r * r / count).to(tl.float32), mask=inside)
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
    z = v * factor + term
    if BACKWARD:
        dz = kept(g, b, c, s, g_b, g_c, g_s, inside, inside & live, DENSE, WIDE).to(tl.float32)
        if RELU:
            dz = tl.where(z <= 0.0, 0.0, dz)
        if TRAINING:
            mean = tl.load(row(affine, 2, C) + c, mask=c < C, other=0.0)[:, None]
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


# ----------------------------------------------------------------------------------------------------------- launching


class Walk(NamedTuple):
    """Tensors of one shape as [B, C, S], and the tile that suits them."""

    B: int
    C: int
    S: int
    strides: tuple[int, ...]  #: three of each tensor
    block_c: int
    block_s: int
    dense: bool  #: channels are next to each other
    wide: bool

    def tiles(self) -> int:
        return self.B * cdiv(self.C, self.block_c) * cdiv(self.S, self.block_s)

    def constants(self) -> dict[str, int]:
        return {"DENSE": self.dense, "WIDE": self.wide, "BLOCK_C": self.block_c, "BLOCK_S": self.block_s}

    def of(self, k: int) -> tuple[int, ...]:
        return self.strides[3 * k : 3 * k + 3]


def walk(*tensors: Tensor) -> Walk | None:
    """None where the axes after the channels do not follow one another in memory, in the same order in all.

    Nor where there are more tiles than a grid has programs, at some 2^31 numbers.
    """
    first = tensors[0]
    B, C = first.shape[:2]
    axes = sorted((d for d in range(2, first.dim()) if first.shape[d] != 1), key=lambda d: -first.stride(d))
    for outer, inner in pairwise(axes):
        if any(t.stride(outer) != t.stride(inner) * first.shape[inner] for t in tensors):
            return None
    S = first[0, 0].numel() if first.dim() > 2 else 1
    strides = tuple(v for t in tensors for v in (t.stride(0), t.stride(1), t.stride(axes[-1]) if axes else 1))
    dense = first.stride(1) == 1 and C > 1  # channels last, or no positions
    if dense:
        block_c = min(power_of_2(C, 1), 256 if S > 1 else _TILE)
        block_s = min(power_of_2(S, 1), _TILE // block_c)
    else:
        block_s = min(power_of_2(S, 1), _TILE)
        block_c = min(power_of_2(C, 1), _TILE // block_s)
    extent = max(
        (C - 1) * abs(t[1]) + (S - 1) * abs(t[2]) for t in (strides[i : i + 3] for i in range(0, len(strides), 3))
    )
    made = Walk(B, C, S, strides, block_c, block_s, dense, force_wide or extent + _TILE * 2 >= 2**31)
    return made if made.tiles() < 2**31 - 2**16 else None


force_wide = False  #: tests check 64-bit addresses on small tensors


def _task(mapping: Tensor, tasks: Tensor | None, task: int) -> tuple[Any, ...]:
    """(mapping, tasks, task), (T, task_stride), EACH"""
    stride = 0 if tasks is None or tasks.dim() == 0 else tasks.stride(0)
    return (mapping, tasks, task), (mapping.shape[0], stride), tasks is not None


def _mask(
    out: Tensor, x: Tensor, y: Tensor | None, mapping: Tensor, tasks: Tensor | None, task: int, relu: bool
) -> bool:
    """Whether the tensors could be walked."""
    given = (out, x) if y is None else (out, x, y)
    if out.numel() == 0:
        return True
    way = walk(*given)
    if way is None:
        return False
    which, (T, task_stride), each = _task(mapping, tasks, task)
    launch.launch(
        mask_kernel, (way.tiles(),), out, x, y, *which, way.C, way.S, T, task_stride,
        *way.of(0), *way.of(1), *(way.of(0) if y is None else way.of(2)), warps=4, stages=1,
        EACH=each, GATE=y is not None, RELU=relu, ONLY_DEAD=out is x and not relu and not way.dense,
        **way.constants(),
    )  # fmt: skip
    return True


def gate(g: Tensor, y: Tensor | None, mapping: Tensor, tasks: Tensor | None, task: int) -> Tensor:
    out = torch.empty_like(g)
    if not _mask(out, g, y, mapping, tasks, task, False):
        out.copy_(reference.gate(g, y, mapping, tasks, task))
    return out


def rectify(x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int) -> Tensor:
    out = torch.empty_like(x)
    if not _mask(out, x, None, mapping, tasks, task, True):
        out.copy_(reference.rectify(x, mapping, tasks, task))
    return out


def mask_(x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int, relu: bool) -> None:
    if not _mask(x, x, None, mapping, tasks, task, relu):
        reference.mask_(x, mapping, tasks, task, relu)


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


def batch_norm(
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
    mean = x.new_empty(C if training else 0, dtype=torch.float32)
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


def batch_norm_backward(
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
        gradients_kernel, (cdiv(C, _SMALL),), affine, dw, db, split.partial, scale, running_var, C, way.B * way.S,
        split.splits, warps=4, stages=1, TRAINING=training, EPS=eps, BLOCK_C=_SMALL,
    )  # fmt: skip
    if not want_x:
        return x.new_empty(0), dw, db
    launch.launch(
        normalise_kernel, (way.tiles(),), dx, g, x, *which, affine, C, way.S, T, task_stride,
        *way.of(2), *way.of(1), *way.of(0), warps=4, stages=1, EACH=each, BACKWARD=True, TRAINING=training, RELU=relu,
        **tile,
    )  # fmt: skip
    return dx, dw, db
