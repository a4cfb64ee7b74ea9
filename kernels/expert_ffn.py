"""The hidden layer of ``expert_ffn`` in Triton: its gate follows the first product in that product's kernel.

A tile of the product has gates and what they multiply side by side, so only h is written; u is never in memory but
where the backward pass needs it. The tiles are those of ``grouped_linear``.
Axes: i sorted entry of N, k expert of K, c feature of D, j hidden one of H, o row of W_in of 2H (H without gates).

    hidden     u_io = sum_c x_ic W_koc,  h_ij = w_i act(u_ij) u_i,H+j
    backward   dw_i = sum_j t_ij act(u_ij) u_i,H+j and du, from t = dh / w

u is rounded to x's dtype, then h. Rows of dropped entries are not written: no product reads them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as start
from .grouped_linear.activation import SILU, activated, sloped
from .grouped_linear.launch import GROUP, device_of
from .grouped_linear.plan import row_tiles, rows_tile, search
from .grouped_linear.products import place_of, rows_by_columns, tile_of
from .launch import cdiv, power_of_2

__all__ = ["backward", "hidden", "is_fused"]

#: False: the product writes u, and PyTorch makes h and du of it. None is True: h costs fewer bytes and launches so.
force_fused: bool | None = None

#: Numbers of h that a program of ``backward_kernel`` looks at together.
BLOCK = 2048


def is_fused() -> bool:
    """Whether the hidden layer is made here, at any size."""
    return force_fused is not False


@triton.jit(do_not_specialize=["K", "row_tiles"])  # not a kernel for every batch size
def hidden_kernel(
    x, x_row, order, weights, w, w_module, w_out, w_in, offsets, h, u, K, row_tiles,
    D: tl.constexpr, H: tl.constexpr, PER_SAMPLE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, SEARCH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """grid (row tiles * column tiles): h [N, H] and u [N, 2H], those that are wanted, dense.

    Column 2j of a tile is the gate of hidden feature j, column 2j + 1 what it multiplies: one product makes both, and
    a thread has them side by side.
    """
    OUT: tl.constexpr = 2 * H if GATED else H
    PARTS: tl.constexpr = 2 if GATED else 1
    tile, column_tile = place_of(tl.program_id(0), row_tiles, (OUT + BLOCK_OUT - 1) // BLOCK_OUT, GROUP)
    k, start = tile_of(tile, offsets, K, BLOCK_N, SEARCH)
    end = tl.load(offsets + k + 1, mask=k < K, other=0)
    if (k < K) & (start < end):
        i = start + tl.arange(0, BLOCK_N)
        live = i < end
        entry = tl.load(order + i, mask=live, other=0)
        column = column_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        o = column // PARTS + column % PARTS * H
        acc = rows_by_columns(
            tl.zeros([BLOCK_N, BLOCK_OUT], dtype=tl.float32), x + entry // PER_SAMPLE * x_row, None, live,
            w + k.to(tl.int64) * w_module + o.to(tl.int64) * w_out, column < OUT, w_in, D, 0, PRECISION, BLOCK_IN,
        )  # fmt: skip
        made = acc.to(x.dtype.element_ty)
        j = column_tile * (BLOCK_OUT // PARTS) + tl.arange(0, BLOCK_OUT // PARTS)
        inside = live[:, None] & (j < H)[None, :]
        if GATED:
            g, v = tl.split(tl.reshape(made, [BLOCK_N, BLOCK_OUT // 2, 2]))
        else:
            g = made
        if u is not None:
            u_tile = u + (i * OUT)[:, None] + j[None, :]
            tl.store(u_tile, g, mask=inside)
            if GATED:
                tl.store(u_tile + H, v, mask=inside)
        if h is not None:
            h_tile = activated(g.to(tl.float32), ACTIVATION, g.dtype == tl.float32)
            if GATED:
                h_tile *= v.to(tl.float32)
            if weights is not None:
                h_tile *= tl.load(weights + entry, mask=live, other=0.0).to(tl.float32)[:, None]
            tl.store(h + (i * H)[:, None] + j[None, :], h_tile.to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "K"])
def backward_kernel(
    t, u, order, weights, offsets, du, dweights, N, K,
    H: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """grid (row tiles): du [N, 2H] sorted, and the weights' gradients, zero for entries that are dropped."""
    OUT: tl.constexpr = 2 * H if GATED else H
    EXACT: tl.constexpr = t.dtype.element_ty == tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = i < tl.load(offsets + K)
    entry = tl.load(order + i, mask=i < N, other=0)
    if weights is not None:
        weight = tl.load(weights + entry, mask=live, other=0.0).to(tl.float32)[:, None]
    products = tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32)
    for first in range(0, H, BLOCK_H):
        j = first + tl.arange(0, BLOCK_H)
        inside = live[:, None] & (j < H)[None, :]
        at = (i * OUT)[:, None] + j[None, :]
        t_tile = tl.load(t + (i * H)[:, None] + j[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
        a = activated(g, ACTIVATION, EXACT)
        if GATED:
            v = tl.load(u + at + H, mask=inside, other=0.0).to(tl.float32)
        if dweights is not None:
            products += t_tile * (a * v if GATED else a)
        if du is not None:
            dh = t_tile * weight if weights is not None else t_tile
            slope = sloped(dh * v if GATED else dh, g if ACTIVATION >= SILU else a, ACTIVATION, EXACT)
            tl.store(du + at, slope.to(du.dtype.element_ty), mask=inside)
            if GATED:
                tl.store(du + at + H, (dh * a).to(du.dtype.element_ty), mask=inside)
    if dweights is not None:
        tl.store(dweights + entry, tl.sum(products, 1).to(dweights.dtype.element_ty), mask=i < N)


def hidden(
    x: Tensor, order: Tensor, offsets: Tensor, weights: Tensor | None, w_in: Tensor, per_sample: int, activation: int,
    gated: bool, precision: str = "ieee", *, want_h: bool = True, want_u: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """h [N, H], weighted, and u [N, 2H] of sorted entries, with the activation's number; x has dense rows.

    Rows of dropped entries are not written.
    """
    N, (K, OUT, D) = order.shape[0], w_in.shape
    H = OUT // 2 if gated else OUT
    h = x.new_empty(N, H) if want_h else None
    u = x.new_empty(N, OUT) if want_u else None
    if N * H and (want_h or want_u):
        tile = rows_tile(N, K, D, OUT, x.dtype, precision, device_of(x))
        tiles = row_tiles(N, K, tile.rows)
        start.launch(
            hidden_kernel, (tiles * cdiv(OUT, tile.columns),), x, x.stride(0), order,
            None if weights is None else weights.contiguous(), w_in, *w_in.stride(), offsets, h, u, K, tiles,
            D=D, H=H, PER_SAMPLE=per_sample, ACTIVATION=activation, GATED=gated, PRECISION=precision,
            SEARCH=search(K), GROUP=GROUP, BLOCK_N=tile.rows, BLOCK_OUT=tile.columns, BLOCK_IN=tile.depth,
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
    return h, u


def backward(
    t: Tensor, u: Tensor, order: Tensor, offsets: Tensor, weights: Tensor | None, activation: int, gated: bool,
    *, want_u: bool = True, want_weights: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of u, sorted, and of ``weights``, from that of weighted h before its weights: t [N, H]."""
    N, H = t.shape
    du = torch.empty_like(u) if want_u else None
    made = torch.empty_like if H else torch.zeros_like
    dweights = made(weights, memory_format=torch.contiguous_format) if want_weights else None
    if N * H and (want_u or want_weights):
        wide = min(256, power_of_2(H))
        start.launch(
            backward_kernel, (cdiv(N, BLOCK // wide),), t, u, order,
            None if weights is None else weights.contiguous(), offsets, du, dweights, N, offsets.shape[0] - 1,
            H=H, ACTIVATION=activation, GATED=gated, BLOCK_N=BLOCK // wide, BLOCK_H=wide, warps=4, stages=2,
        )  # fmt: skip
    return du, dweights
