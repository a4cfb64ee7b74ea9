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

from . import launch
from .launch import cdiv, power_of_2

_TILE = 2048  #: numbers of a program's tile


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


def gate(g: Tensor, y: Tensor | None, mapping: Tensor, tasks: Tensor | None, task: int) -> Tensor | None:
    """None where the tensors cannot be walked."""
    out = torch.empty_like(g)
    return out if _mask(out, g, y, mapping, tasks, task, False) else None


def rectify(x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int) -> Tensor | None:
    """None where the tensors cannot be walked."""
    out = torch.empty_like(x)
    return out if _mask(out, x, None, mapping, tasks, task, True) else None


def mask_(x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int, relu: bool) -> bool:
    """Whether the tensor could be walked, and is masked."""
    return _mask(x, x, None, mapping, tasks, task, relu)
