"""The Triton backend of ``soft_assignment``: weights are made on chip from scores, and made again for the gradient.

Axes: b sample, i input row, j output, c column of a vote. Votes that are the same for all outputs are multiplied by
tensor cores or as torch's setting for float32 products says; others are read once and multiplied in registers. Sums
over rows go to partial buffers that a second sum adds up: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.ops.soft_assignment.contract import Grads, Pairs, sizes

from . import launch
from .launch import cdiv, dot, open_pairs, power_of_2

OUTPUTS = 512  #: the most that the kernels take: a row's scores lie in registers


def unsupported(device: str, dtype: torch.dtype, B: int, n: int, m: int, h: int) -> str | None:
    """Why the kernels would not take a case, or None."""
    if why := launch.refuses(device, dtype):
        return why
    if m > OUTPUTS:
        return f"the Triton kernels take up to {OUTPUTS} outputs, not {m}"
    N, _, H = blocks(n, m, h, False)
    if h >= 2**31 - 2**16 or B * cdiv(n, N) * cdiv(h, H) >= 2**31:
        return f"the Triton kernels count columns, and tiles of votes, in 32 bits: B={B}, n={n}, m={m}, h={h}"
    return None


@triton.jit
def weigh(
    scores, gate, use, ign, prior, mask, lengths, b, i, j, n, use_b, ign_b, mask_b, mask_n, mask_m, eps,
    M: tl.constexpr,
):  # fmt: skip
    """([i, j] R, phi / f, phi + eps, which pairs are open; [i] f); selected, never multiplied, where they are not."""
    live = i < n
    if lengths is not None:
        live = live & (i < tl.load(lengths + b))
    open_ = open_pairs(mask, b, i, j, live, mask_b, mask_n, mask_m, M)
    at = (i * M)[:, None] + j[None, :]
    if scores is not None:
        S = tl.load(scores + b * n * M + at, mask=open_, other=0.0).to(tl.float32)
        S = tl.where(open_, S, float("-inf"))
        any_open = tl.max(open_.to(tl.int32), 1) > 0
        top = tl.where(any_open, tl.max(S, 1), 0.0)
        share = tl.where(open_, tl.exp(S - top[:, None]), 0.0)
        total = tl.sum(share, 1)
        R = share / tl.where(any_open, total, 1.0)[:, None]
    else:
        R = tl.where(open_, tl.load(prior + j, mask=j < M, other=0.0)[None, :], 0.0)
        if mask is not None:
            R = R / tl.maximum(tl.sum(R, 1)[:, None], 1.1754944e-38)
    t = R
    if use is not None:
        t = tl.load(use + b * use_b + at, mask=open_, other=0.0).to(tl.float32) * R
    if ign is not None:
        t -= tl.load(ign + b * ign_b + at, mask=open_, other=0.0).to(tl.float32) * (1.0 - R)
    t = tl.where(open_, t, 0.0)
    f = tl.where(live, 1.0, 0.0)
    if gate is not None:
        f = tl.load(gate + b * n + i, mask=live, other=0.0)
    w = tl.where(open_, f[:, None] * t + eps, 0.0)
    return R, t, w, open_, f


@triton.jit
def forward_kernel(
    votes, vote_b, vote_n, vote_m,
    scores, gate, use, ign, prior, mask, lengths, use_b, ign_b, mask_b, mask_n, mask_m, eps,
    moments, sums,  # out [pieces, B, M, H] and [pieces, B, M]
    n, piece_rows, batch,
    M: tl.constexpr, H: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """grid (batch * pieces of the rows * column tiles)."""
    COLUMNS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    column = tl.program_id(0) % COLUMNS
    pieces = (n - 1) // piece_rows + 1
    piece = (tl.program_id(0) // COLUMNS % pieces).to(tl.int64)
    b = (tl.program_id(0) // COLUMNS // pieces).to(tl.int64)
    j = tl.arange(0, BLOCK_M)
    c = column * BLOCK_H + tl.arange(0, BLOCK_H)
    made = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    first = piece * piece_rows
    last = tl.minimum(first + piece_rows, n)
    for start in range(first, last, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N).to(tl.int64)
        i = tl.where(i < last, i, n)  # the next piece's
        _R, _t, w, _open, _f = weigh(
            scores, gate, use, ign, prior, mask, lengths, b, i, j, n, use_b, ign_b, mask_b, mask_n, mask_m, eps, M
        )  # fmt: skip
        total += tl.sum(w, 0)
        rows = votes + b * vote_b + i * vote_n
        live = i < n
        if lengths is not None:
            live = live & (i < tl.load(lengths + b))
        if DOT:
            V = tl.load(rows[:, None] + c[None, :], mask=live[:, None] & (c < H)[None, :], other=0.0).to(tl.float32)
            made = dot(tl.trans(w), V, made, PRECISION)
        else:
            lanes = (rows[:, None] + (j.to(tl.int64) * vote_m)[None, :])[:, :, None] + c[None, None, :]
            keep = (live[:, None] & (j < M)[None, :])[:, :, None] & (c < H)[None, None, :]
            made += tl.sum(w[:, :, None] * tl.load(lanes, mask=keep, other=0.0).to(tl.float32), 0)
    out = (piece * batch + b) * M + j
    tl.store((moments + out * H)[:, None] + c[None, :], made, mask=(j < M)[:, None] & (c < H)[None, :])
    if column == 0:
        tl.store(sums + out, total, mask=j < M)


@triton.jit
def backward_kernel(
    votes, vote_b, vote_n, vote_m,
    scores, gate, use, ign, prior, mask, lengths, use_b, ign_b, mask_b, mask_n, mask_m, eps,
    dM, dp, dscores, dgate, duse, dign,
    n, batch, batch_per_program,
    M: tl.constexpr, H: tl.constexpr, DOT: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """grid (groups of samples * row tiles). ADD: betas are one for all samples, and one group's samples are all."""
    tiles = (n - 1) // BLOCK_N + 1
    i = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_M)
    inside = i < n
    at = (i * M)[:, None] + j[None, :]
    there = inside[:, None] & (j < M)[None, :]
    of_use = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    of_ign = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    first = tl.program_id(0) // tiles * batch_per_program
    for sample in range(first, tl.minimum(first + batch_per_program, batch)):
        b = tl.cast(sample, tl.int64)
        R, t, _w, open_, f = weigh(
            scores, gate, use, ign, prior, mask, lengths, b, i, j, n, use_b, ign_b, mask_b, mask_n, mask_m, eps, M
        )  # fmt: skip
        live = inside
        if lengths is not None:
            live = live & (i < tl.load(lengths + b))
        d = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        rows = votes + b * vote_b + i * vote_n
        for column in range(0, H, BLOCK_H):
            c = column + tl.arange(0, BLOCK_H)
            lanes = (dM + (b * M + j) * H)[:, None] + c[None, :]
            g = tl.load(lanes, mask=(j < M)[:, None] & (c < H)[None, :], other=0.0)
            if DOT:
                V = tl.load(rows[:, None] + c[None, :], mask=live[:, None] & (c < H)[None, :], other=0.0)
                d = dot(V.to(tl.float32), tl.trans(g), d, PRECISION)
            else:
                cells = (rows[:, None] + (j.to(tl.int64) * vote_m)[None, :])[:, :, None] + c[None, None, :]
                keep = (live[:, None] & (j < M)[None, :])[:, :, None] & (c < H)[None, None, :]
                d += tl.sum(tl.load(cells, mask=keep, other=0.0).to(tl.float32) * g[None, :, :], 2)
        d += tl.load(dp + b * M + j, mask=j < M, other=0.0)[None, :]
        d = tl.where(open_, d, 0.0)
        if dgate is not None:
            tl.store(dgate + b * n + i, tl.sum(d * t, 1), mask=inside)
        d = d * f[:, None]
        if ADD:
            of_use += d * R
            of_ign += d * (R - 1.0)
        else:
            if duse is not None:
                tl.store(duse + b * n * M + at, d * R, mask=there)
            if dign is not None:
                tl.store(dign + b * n * M + at, d * (R - 1.0), mask=there)
        if dscores is not None:
            if use is not None:
                benefit = tl.load(use + b * use_b + at, mask=open_, other=0.0).to(tl.float32)
            else:
                benefit = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32) + 1.0
            if ign is not None:
                benefit += tl.load(ign + b * ign_b + at, mask=open_, other=0.0).to(tl.float32)
            d = d * benefit
            tl.store(dscores + b * n * M + at, R * (d - tl.sum(R * d, 1)[:, None]), mask=there)
    if ADD:
        if duse is not None:
            tl.store(duse + at, of_use, mask=there)
        if dign is not None:
            tl.store(dign + at, of_ign, mask=there)


@triton.jit
def votes_kernel(
    scores, gate, use, ign, prior, mask, lengths, use_b, ign_b, mask_b, mask_n, mask_m, eps,
    dM, dvotes,
    n, batch, batch_per_program,
    M: tl.constexpr, H: tl.constexpr, SAME: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """grid (samples of dvotes * row tiles * column tiles): what votes get back, for which no vote is needed."""
    COLUMNS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    tiles = (n - 1) // BLOCK_N + 1
    tile = tl.program_id(0) // COLUMNS
    i = (tile % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % COLUMNS * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = i < n
    own = (tile // tiles).to(tl.int64)
    if SAME:
        made = tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32)
    else:
        made = tl.zeros([BLOCK_N, BLOCK_M, BLOCK_H], dtype=tl.float32)
    first = tile // tiles * batch_per_program
    for sample in range(first, tl.minimum(first + batch_per_program, batch)):
        b = tl.cast(sample, tl.int64)
        _R, _t, w, _open, _f = weigh(
            scores, gate, use, ign, prior, mask, lengths, b, i, j, n, use_b, ign_b, mask_b, mask_n, mask_m, eps, M
        )  # fmt: skip
        lanes = (dM + (b * M + j) * H)[:, None] + c[None, :]
        g = tl.load(lanes, mask=(j < M)[:, None] & (c < H)[None, :], other=0.0)
        if DOT:
            made = dot(w, g, made, PRECISION)
        elif SAME:
            made += tl.sum(w[:, :, None] * g[None, :, :], 1)
        else:
            made += w[:, :, None] * g[None, :, :]
    if SAME:
        cells = (dvotes + (own * n + i) * H)[:, None] + c[None, :]
        tl.store(cells, made, mask=inside[:, None] & (c < H)[None, :])
    else:
        rows = ((own * n + i) * M)[:, None] + j[None, :]
        keep = (inside[:, None] & (j < M)[None, :])[:, :, None] & (c < H)[None, None, :]
        tl.store((dvotes + rows * H)[:, :, None] + c[None, None, :], made, mask=keep)


# ------------------------------------------------------------------------------------------------------------- launches

_NUMBERS = 4096  #: of a tile of votes that lies in registers
_PRODUCT = 64  #: outputs, the most that fit on chip as an operand of a product
_WAVES = 2  #: programs at once for each multiprocessor


class _Blocks(NamedTuple):
    n: int
    m: int
    h: int


def blocks(n: int, m: int, h: int, as_product: bool) -> _Blocks:
    """The tile: rows, outputs and columns, powers of two."""
    if as_product:
        M = power_of_2(m)
        return _Blocks(min(power_of_2(n), 64 if M <= 32 else 32), M, min(power_of_2(h), 64 if M <= 32 else 32))
    M = power_of_2(m, 2)
    H = min(power_of_2(h, 2), 64, max(_NUMBERS // M, 8))
    return _Blocks(min(power_of_2(n, 2), max(_NUMBERS // (M * H), 2), 32), M, H)


class _Call:
    """A call in the words of the kernels."""

    def __init__(self, votes: Tensor, pairs: Pairs) -> None:
        self.B, self.n, self.m, self.h = sizes(votes, pairs)
        self.same_samples, self.same_outputs = votes.shape[0] != self.B, votes.shape[2] != self.m
        votes = votes if votes.stride(-1) == 1 or self.h == 1 else votes.contiguous()
        scores, gate, use, ign, prior, mask, lengths, eps = pairs
        dense = [None if t is None else t.contiguous() for t in (scores, gate, use, ign, prior)]
        mask = None if mask is None else mask.expand(self.B, self.n, self.m).view(torch.uint8)
        lengths = None if lengths is None else lengths.contiguous()
        whole = self.n * self.m
        betas = [0 if t is None or t.shape[0] == 1 else whole for t in (use, ign)]
        strides = votes.stride()
        self.votes = votes, 0 if self.same_samples else strides[0], strides[1], 0 if self.same_outputs else strides[2]
        self.pairs = *dense, mask, lengths, *betas, *((0, 0, 0) if mask is None else mask.stride()), float(eps)
        self.as_product = self.same_outputs and self.m <= _PRODUCT
        self.blocks = blocks(self.n, self.m, self.h, self.as_product)
        half = votes.dtype != torch.float32
        self.precision = "ieee" if half or torch.backends.cuda.matmul.fp32_precision != "tf32" else "tf32"

    def constants(self, **more: Any) -> dict[str, Any]:
        N, M, H = self.blocks
        warps = 4 if self.as_product or N * M * H <= _NUMBERS else 8
        return {
            "M": self.m, "H": self.h, "DOT": self.as_product, "PRECISION": self.precision,
            "BLOCK_N": N, "BLOCK_M": M, "BLOCK_H": H, "warps": warps, "stages": 2, **more,
        }  # fmt: skip


def forward(votes: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    call = _Call(votes, pairs)
    B, n, m, h = call.B, call.n, call.m, call.h
    columns, tiles = cdiv(h, call.blocks.h), cdiv(n, call.blocks.n)
    pieces = max(1, min(cdiv(_WAVES * launch.multiprocessors(votes.device), B * columns), tiles, 64))
    piece_rows = cdiv(tiles, pieces) * call.blocks.n
    pieces = cdiv(n, piece_rows)
    moments = votes.new_empty((pieces, B, m, h), dtype=torch.float32)
    sums = votes.new_empty((pieces, B, m), dtype=torch.float32)
    launch.launch(
        forward_kernel, (B * pieces * columns,), *call.votes, *call.pairs, moments, sums, n, piece_rows, B,
        **call.constants(),
    )  # fmt: skip
    return (moments[0], sums[0]) if pieces == 1 else (moments.sum(0), sums.sum(0))


def backward(votes: Tensor, pairs: Pairs, dM: Tensor, dp: Tensor, grads: Grads) -> None:
    call = _Call(votes, pairs)
    B, n = call.B, call.n
    dM, dp = dM.contiguous(), dp.contiguous()
    tiles = cdiv(n, call.blocks.n)
    if grads.votes is not None:
        samples, columns = grads.votes.shape[0], cdiv(call.h, call.blocks.h)
        launch.launch(
            votes_kernel, (samples * tiles * columns,), *call.pairs, dM, grads.votes, n, B, B // samples,
            **call.constants(SAME=call.same_outputs),
        )  # fmt: skip
    if any(t is not None for t in grads[1:]):
        adds = any(t is not None and t.shape[0] == 1 for t in (grads.use, grads.ign))
        betas, parts = (grads.use, grads.ign), []
        if adds:  # one of the two may still be per sample: then each has its own launch
            shared = [t if t is None or t.shape[0] == 1 else None for t in betas]
            parts.append((True, None, None, *shared))
            betas = tuple(t if t is None or t.shape[0] != 1 else None for t in betas)
        if not adds or any(t is not None for t in (grads.scores, grads.gate, *betas)):
            parts.append((False, grads.scores, grads.gate, *betas))
        if adds and len(parts) == 2 and all(t is None for t in betas):
            parts = [(True, grads.scores, grads.gate, *parts[0][3:])]
        columns = call.blocks.h if call.blocks.m <= 256 else call.blocks.h // 2  # beside it, gradients of wide rows
        for add, *targets in parts:
            per_program = B if add else 1
            launch.launch(
                backward_kernel, (tiles * cdiv(B, per_program),), *call.votes, *call.pairs, dM, dp, *targets,
                n, B, per_program, **call.constants(ADD=add, BLOCK_H=columns),
            )  # fmt: skip
