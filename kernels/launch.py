"""What all ops' kernels share: products, open pairs, and the one place that starts a kernel, where tests can listen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.ops.environment import interpreting

#: Multiprocessors, and bytes of shared memory a block, that are assumed where no GPU can be asked: an H200's.
SMS = 132
SHARED = 227 << 10

#: Element types that the kernels take.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """A product's block: rows and columns of the result, depth of a step."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_INTERPRETED = tl.constexpr(interpreting())


def multiprocessors(device: torch.device) -> int:
    """How many programs at once are worth having. Torch keeps the GPU's number: asking for it does not synchronise."""
    if device.type == "cpu":
        return 2  # interpreted one after another: large tiles cost the least
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else SMS


def shared_memory(device: torch.device) -> int:
    """Bytes that a block may use: what plans keep the operands of products within."""
    if device.type != "cuda":
        return SHARED
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 << 10)  # ROCm: 64 KB


def refuses(device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why kernels cannot take tensors on this device, or of this dtype; None if they can."""
    if device_type != "cuda" and not (device_type == "cpu" and interpreting()):
        return f"triton kernels need CUDA tensors, these are on {device_type} (TRITON_INTERPRET=1 interprets them)"
    if dtype not in DTYPES:
        return f"the triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def on(t: Tensor) -> AbstractContextManager[object]:
    """The GPU that a tensor is on, as the current one."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def chunks(B: int, n: int, plan: Any) -> Iterator[tuple[slice, int, int]]:
    """(samples, first row, end of rows), all rows of some samples before the next samples."""
    for b in range(0, B, plan.batch):
        for first in range(0, n, plan.rows):
            yield slice(b, min(b + plan.batch, B)), first, min(first + plan.rows, n)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **constants: Any) -> None:
    """Run ``kernel`` over ``grid``, on the GPU that its tensors are on: Triton's own choice is the current one."""
    device = next((a.device for a in args if isinstance(a, Tensor)), None)
    elsewhere = device is not None and device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*args, num_warps=warps, num_stages=stages, **constants)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, in float32. Products of half-precision numbers are exact there, so widening them changes nothing."""
    if _INTERPRETED:  # it would multiply the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def nearest_tf32(a):
    """The nearest TF32 numbers, halves away from zero: tensor cores cut off the digits that float32 has beyond."""
    if _INTERPRETED:
        bits = (a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(a == a, bits.to(tl.float32, bitcast=True), a)
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def open_pairs(mask, b, rows, columns, live, stride_b, stride_n, stride_m, M: tl.constexpr):
    """[rows, columns] bool: pairs that take part."""
    open_ = live[:, None] & (columns < M)[None, :]
    if mask is not None:
        at = (mask + b * stride_b + rows * stride_n)[:, None] + (columns.to(tl.int64) * stride_m)[None, :]
        open_ = open_ & (tl.load(at, mask=open_, other=1) == 0)
    return open_


def power_of_2(value: int, at_least: int = 16) -> int:
    """The next power of two, at least what a tensor-core product needs."""
    return max(at_least, triton.next_power_of_2(value))


cdiv = triton.cdiv
