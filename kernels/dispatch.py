"""The Triton backend of the op ``dispatch``: entries sorted by module, stable, as numbers on the device.

Axes: N entries, K modules; an entry's key is its module, or K if it is dropped; C entries of a block, S blocks.

Up to RANKED entries one launch does it: every program compares its own entries with all others, and counts. More take
three steps: counts of every block and key, their running sum with the keys outermost (PyTorch's), and ranks in a block.
Integers only, and no atomics: the numbers are those of the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as start
from .launch import cdiv, power_of_2

__all__ = ["plan", "unsupported"]

#: Entries that one launch compares with each other.
RANKED = 8192
#: Entries of a block, where there are more.
BLOCK = 512
#: Comparisons that counting may take, all blocks together; beyond it is a sort's turn.
COMPARED = 1 << 36
#: Modules that counting may take: its grid's second axis ends at 65535 tiles of 64 keys.
COUNTED_MODULES = 1 << 21


def unsupported(device_type: str, dtype: torch.dtype = torch.int64, K: int = 1, N: int = 0) -> str | None:
    """Why this backend cannot take a case, or None if it can."""
    if why := start.refuses(device_type):
        return why
    if max(K, N) >= 2**31 - 2**16:
        return f"the triton kernels count entries and modules in 32 bits: N={N}, K={K}"
    return None


@triton.jit
def _read(actions, stride, i, N):
    return tl.load(actions + i.to(tl.int64) * stride, mask=i < N, other=-1)


@triton.jit
def _keys(action, i, N, K):
    """int32 keys of entries i; K + 1 past the last one, which is beyond all others."""
    key = tl.where((action >= 0) & (action < K), action, K).to(tl.int32)
    return tl.where(i < N, key, K + 1)


@triton.jit(do_not_specialize=["N", "K", "rank_programs"])
def rank_kernel(
    actions, stride, order, offsets, beyond, N, K, rank_programs,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """grid (rank_programs + offset programs): the whole plan of few entries.

    position_i = #{j: (key_j, j) < (key_i, i)} by the first programs, offsets_k = #{j: key_j < k} by the others, the
    first of which also counts what is beyond K.
    """
    program = tl.program_id(0)
    if program < rank_programs:
        i = program * BLOCK_I + tl.arange(0, BLOCK_I)
        key_i = _keys(_read(actions, stride, i, N), i, N, K)
        own = program * BLOCK_I // BLOCK_J * BLOCK_J  # the BLOCK_J entries that these are among
        position = tl.zeros([BLOCK_I], dtype=tl.int32)
        for first in range(0, N, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            key_j = _keys(_read(actions, stride, j, N), j, N, K)
            bound = key_i + (first < own).to(tl.int32)  # of equal keys, earlier entries come first
            position += tl.sum((key_j[None, :] < bound[:, None]).to(tl.int32), 1)
        j = own + tl.arange(0, BLOCK_J)
        key_j = _keys(_read(actions, stride, j, N), j, N, K)
        position += tl.sum(((key_j[None, :] == key_i[:, None]) & (j[None, :] < i[:, None])).to(tl.int32), 1)
        tl.store(order + position, i.to(tl.int64), mask=i < N)
    else:
        k = (program - rank_programs) * BLOCK_K + tl.arange(0, BLOCK_K)
        count = tl.zeros([BLOCK_K], dtype=tl.int32)
        above = tl.zeros([BLOCK_J], dtype=tl.int32)
        for first in range(0, N, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            action = _read(actions, stride, j, N)
            key_j = _keys(action, j, N, K)
            count += tl.sum((key_j[None, :] < k[:, None]).to(tl.int32), 1)
            above += (action >= K).to(tl.int32)
        tl.store(offsets + k, count.to(tl.int64), mask=k <= K)
        if program == rank_programs:
            tl.store(beyond, tl.sum(above, 0).to(tl.int64))


@triton.jit(do_not_specialize=["N", "K", "blocks"])
def count_kernel(
    actions, stride, counts, N, K, blocks,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """grid (blocks, key tiles): counts[1 + k S + s] of key k in block s, and at k = K + 1 of actions beyond K.

    counts[0] is zero, so the running sum of it all is what comes before every (k, s).
    """
    s = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    count = tl.zeros([BLOCK_K], dtype=tl.int32)
    above = tl.zeros([BLOCK_J], dtype=tl.int32)
    for first in range(0, BLOCK_C, BLOCK_J):
        j = s * BLOCK_C + first + tl.arange(0, BLOCK_J)
        action = _read(actions, stride, j, N)
        key = _keys(action, j, N, K)
        count += tl.sum((key[None, :] == k[:, None]).to(tl.int32), 1)
        above += (action >= K).to(tl.int32)
    count = tl.where(k == K + 1, tl.sum(above, 0), count)
    tl.store(counts + 1 + k.to(tl.int64) * blocks + s, count.to(tl.int64), mask=k <= K + 1)
    if (s == 0) & (tl.program_id(1) == 0):
        tl.store(counts, 0)


@triton.jit(do_not_specialize=["N", "K", "blocks", "place_programs"])
def place_kernel(
    actions, stride, before, order, offsets, beyond, N, K, blocks, place_programs,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grid (place_programs + offset programs): entries behind what comes before their key and block."""
    program = tl.program_id(0)
    if program < place_programs:
        s = program // (BLOCK_C // BLOCK_I)
        i = program * BLOCK_I + tl.arange(0, BLOCK_I)
        key_i = _keys(_read(actions, stride, i, N), i, N, K)
        rank = tl.zeros([BLOCK_I], dtype=tl.int32)
        for first in range(s * BLOCK_C, (program + 1) * BLOCK_I, BLOCK_I):
            j = first + tl.arange(0, BLOCK_I)
            key_j = _keys(_read(actions, stride, j, N), j, N, K)
            rank += tl.sum(((key_j[None, :] == key_i[:, None]) & (j[None, :] < i[:, None])).to(tl.int32), 1)
        base = tl.load(before + key_i.to(tl.int64) * blocks + s, mask=i < N, other=0)
        tl.store(order + base + rank, i.to(tl.int64), mask=i < N)
    else:
        k = (program - place_programs) * BLOCK_K + tl.arange(0, BLOCK_K)
        found = tl.load(before + k.to(tl.int64) * blocks, mask=k <= K, other=0)
        tl.store(offsets + k, found, mask=k <= K)
        if program == place_programs:
            end = before + tl.cast(K + 1, tl.int64) * blocks
            tl.store(beyond, tl.load(end + blocks) - tl.load(end))


def plan(actions: Tensor, modules: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """actions [N] int64, any stride -> (order [N], offsets [K + 1], beyond [1]), int64; None: to sort is faster."""
    N = actions.shape[0]
    order, offsets = actions.new_empty(N), actions.new_empty(modules + 1)
    beyond = actions.new_empty(1)
    with start.on(actions):
        if N <= RANKED:
            _ranked(actions, modules, order, offsets, beyond)
        elif modules <= COUNTED_MODULES and cdiv(N, BLOCK) * BLOCK * (modules + 2) <= COMPARED:
            _counted(actions, modules, order, offsets, beyond)
        else:
            return None
    return order, offsets, beyond


def _ranked(actions: Tensor, K: int, order: Tensor, offsets: Tensor, beyond: Tensor) -> None:
    N = actions.shape[0]
    rows = 16 if N <= 2048 else 32
    keys = 16 if K < 1024 else 64
    columns = min(128, power_of_2(N, at_least=32))
    programs = cdiv(N, rows)
    start.launch(
        rank_kernel, (programs + cdiv(K + 1, keys),),
        actions, actions.stride(0), order, offsets, beyond, N, K, programs,
        BLOCK_I=rows, BLOCK_K=keys, BLOCK_J=columns, warps=4, stages=2,
    )  # fmt: skip


def _counted(actions: Tensor, K: int, order: Tensor, offsets: Tensor, beyond: Tensor) -> None:
    N = actions.shape[0]
    blocks = cdiv(N, BLOCK)
    counts = actions.new_empty((K + 2) * blocks + 1)
    start.launch(
        count_kernel, (blocks, cdiv(K + 2, 64)), actions, actions.stride(0), counts, N, K, blocks,
        BLOCK_C=BLOCK, BLOCK_K=64, BLOCK_J=64, warps=4, stages=2,
    )  # fmt: skip
    programs = blocks * (BLOCK // 64)
    start.launch(
        place_kernel, (programs + cdiv(K + 1, 256),), actions, actions.stride(0), counts.cumsum(0), order, offsets,
        beyond, N, K, blocks, programs, BLOCK_C=BLOCK, BLOCK_I=64, BLOCK_K=256, warps=4, stages=2,
    )  # fmt: skip
