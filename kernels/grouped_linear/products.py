"""The matrix products of ``grouped_linear`` over rows that are sorted by module, in tiles that find their own module.

Axes: i sorted row of N, k module of K, c column in of IN, o column out of OUT. Sorted row i is row ``take[i]`` of what
is read and ``put[i]`` of what is written (no tensor: i itself). Rows from offsets[K] on belong to no module.

    rows     y_io = act(sum_c x_ic W_koc + b_ko)       also dx, with W the other way round and a slope on what is read
    sums     dW_koc = sum_i g_io x_ic, db_ko = sum_i g_io

Module k's tiles of R rows are those from offsets[k] // R + k on: as floor(a + b) >= floor(a) + floor(b) these never
overlap, and there are at most N // R + K + 1. No table of tiles has to be made, and no count read; a tile too many ends
at once. Every number is summed by one program, or in pieces that ``reduce`` adds up in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import dot
from .activation import activated, sloped


@triton.jit
def tile_of(tile, offsets, K, R: tl.constexpr, SEARCH: tl.constexpr):
    """(module, first row, end) of a tile; module K is that of dropped rows. Needs the rows' number beyond the end."""
    k = -1
    for first in range(0, K + 1, SEARCH):
        ids = first + tl.arange(0, SEARCH)
        starts = tl.load(offsets + ids, mask=ids <= K, other=0)
        k += tl.sum(((starts // R + ids <= tile) & (ids <= K)).to(tl.int32), 0)
    start = tl.load(offsets + k)
    return k, start + (tile - start // R - k) * R


@triton.jit
def _of_module(parameters, k, stride, like, POINTERS: tl.constexpr, ALIGNED: tl.constexpr):
    """Module k's parameter, of one tensor or of a table of addresses."""
    if POINTERS:
        own = tl.load(parameters + k).to(tl.pointer_type(like.dtype.element_ty))
        if ALIGNED:
            own = tl.multiple_of(own, 16)
    else:
        own = parameters + k.to(tl.int64) * stride
    return own


@triton.jit
def _at(index, i, live):
    """Where sorted rows i lie."""
    row = i
    if index is not None:
        row = tl.load(index + i, mask=live, other=0)
    return row.to(tl.int64)


@triton.jit
def _sloped(grad, kept, SLOPE: tl.constexpr):
    """In float32."""
    return sloped(grad.to(tl.float32), kept.to(tl.float32), SLOPE, grad.dtype == tl.float32)


@triton.jit
def place_of(program, row_tiles, column_tiles: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles go through the columns together."""
    group = program // (GROUP * column_tiles)
    high = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program - group * (GROUP * column_tiles)
    return group * GROUP + within % high, within // high


@triton.jit
def rows_by_columns(
    acc, x_rows, kept_rows, live, w_columns, inside, w_in,
    IN: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """acc + the products of the rows of x, those that are live, with the columns of a module's W that are inside."""
    for column in range(0, IN, BLOCK_IN):
        c = column + tl.arange(0, BLOCK_IN)
        if IN % BLOCK_IN == 0:
            x_mask = live[:, None]
            w_mask = inside[None, :]
        else:
            x_mask = live[:, None] & (c < IN)[None, :]
            w_mask = (c < IN)[:, None] & inside[None, :]
        x_tile = tl.load(x_rows[:, None] + c[None, :], mask=x_mask, other=0.0)
        if SLOPE > 0:
            at = tl.load(kept_rows[:, None] + c[None, :], mask=x_mask, other=0.0)
            x_tile = _sloped(x_tile, at, SLOPE).to(x_tile.dtype)
        w_tile = tl.load(w_columns[None, :] + (c.to(tl.int64) * w_in)[:, None], mask=w_mask, other=0.0)
        acc = dot(x_tile, w_tile, acc, PRECISION)
    return acc


@triton.jit
def _rows(
    program, x, x_row, kept, kept_row, take, weights, w_module, w_out, w_in, biases, b_module, b_out,
    offsets, put, y, before, N, K, row_tiles,
    IN: tl.constexpr, OUT: tl.constexpr, W_POINTERS: tl.constexpr, W_ALIGNED: tl.constexpr, B_POINTERS: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, SEARCH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """One tile of ``rows_kernel``."""
    tile, column_tile = place_of(program, row_tiles, (OUT + BLOCK_OUT - 1) // BLOCK_OUT, GROUP)
    o = column_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    k, start = tile_of(tile, offsets, K, BLOCK_N, SEARCH)
    end = tl.load(offsets + k + 1, mask=k < K, other=N)
    if start < end:
        i = start + tl.arange(0, BLOCK_N)
        live = i < end
        acc = tl.zeros([BLOCK_N, BLOCK_OUT], dtype=tl.float32)
        if k < K:
            if weights is not None:
                row = _at(take, i, live)
                w = _of_module(weights, k, w_module, y, W_POINTERS, W_ALIGNED)
                kept_rows = kept + row * kept_row if SLOPE > 0 else None
                acc = rows_by_columns(
                    acc, x + row * x_row, kept_rows, live, w + o.to(tl.int64) * w_out, o < OUT, w_in,
                    IN, SLOPE, PRECISION, BLOCK_IN,
                )  # fmt: skip
            if biases is not None:
                b = _of_module(biases, k, b_module, y, B_POINTERS, False)
                acc += tl.load(b + o.to(tl.int64) * b_out, mask=o < OUT, other=0.0).to(tl.float32)[None, :]
        inside = live[:, None] & (o < OUT)[None, :]
        where = _at(put, i, live) * OUT
        made = activated(acc, ACTIVATION, y.dtype.element_ty == tl.float32)
        if ACTIVATION == 3:  # nothing is not mapped to a half
            made = tl.where(k < K, made, 0.0)
        tl.store((y + where)[:, None] + o[None, :], made.to(y.dtype.element_ty), mask=inside)
        if before is not None:
            tl.store((before + where)[:, None] + o[None, :], acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _products(
    grad, g_row, kept, kept_row, put, x, x_row, take, start, end, o, c,
    IN: tl.constexpr, OUT: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[BLOCK_OUT, BLOCK_IN]: sum_i g_io x_ic over the sorted rows from start to end."""
    acc = tl.zeros([BLOCK_OUT, BLOCK_IN], dtype=tl.float32)
    for first in range(0, tl.maximum(end - start, 0).to(tl.int32), BLOCK_N):
        i = start + first + tl.arange(0, BLOCK_N)
        live = i < end
        row = _at(put, i, live)
        g_mask = (o < OUT)[:, None] & live[None, :]
        g_tile = tl.load(grad + o[:, None] + (row * g_row)[None, :], mask=g_mask, other=0.0)
        if SLOPE > 0:
            at = tl.load(kept + o[:, None] + (row * kept_row)[None, :], mask=g_mask, other=0.0)
            g_tile = _sloped(g_tile, at, SLOPE).to(g_tile.dtype)
        x_rows = x + _at(take, i, live) * x_row
        x_tile = tl.load(x_rows[:, None] + c[None, :], mask=live[:, None] & (c < IN)[None, :], other=0.0)
        acc = dot(g_tile, x_tile, acc, PRECISION)
    return acc


@triton.jit
def _totals(
    grad, g_row, kept, kept_row, put, start, end, o,
    OUT: tl.constexpr, SLOPE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[BLOCK_OUT]: sum_i g_io."""
    total = tl.zeros([BLOCK_OUT], dtype=tl.float32)
    for first in range(0, tl.maximum(end - start, 0).to(tl.int32), BLOCK_N):
        i = start + first + tl.arange(0, BLOCK_N)
        live = i < end
        row = _at(put, i, live)
        mask = live[:, None] & (o < OUT)[None, :]
        g_tile = tl.load(grad + (row * g_row)[:, None] + o[None, :], mask=mask, other=0.0)
        if SLOPE > 0:
            at = tl.load(kept + (row * kept_row)[:, None] + o[None, :], mask=mask, other=0.0)
            g_tile = _sloped(g_tile, at, SLOPE)
        total += tl.sum(g_tile.to(tl.float32), 0)
    return total


@triton.jit
def _sums(
    program, grad, g_row, kept, kept_row, put, x, x_row, take, offsets, dw, dw_stride, db, db_stride, K,
    IN: tl.constexpr, OUT: tl.constexpr, PIECE: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
    SEARCH: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of ``sums_kernel``."""
    in_tiles: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN if dw is not None else 0
    out_tiles: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    tiles: tl.constexpr = out_tiles * (in_tiles + (1 if db is not None else 0))
    part = program // tiles
    o = program % out_tiles * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_tile = program % tiles // out_tiles
    if PIECE > 0:
        k, start = tile_of(part, offsets, K, PIECE, SEARCH)
    else:
        k = part
        start = tl.load(offsets + k)
    end = tl.load(offsets + k + 1, mask=k < K, other=0)
    if PIECE > 0:
        end = tl.minimum(end, start + PIECE)
    if (PIECE == 0) | (start < end):
        if dw is not None:  # noqa: SIM102 (decided as it is compiled)
            if in_tile < in_tiles:
                c = in_tile * BLOCK_IN + tl.arange(0, BLOCK_IN)
                acc = _products(
                    grad, g_row, kept, kept_row, put, x, x_row, take, start, end, o, c,
                    IN, OUT, SLOPE, PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_N,
                )  # fmt: skip
                out = (dw + part.to(tl.int64) * dw_stride + o.to(tl.int64) * IN)[:, None] + c[None, :]
                tl.store(out, acc.to(dw.dtype.element_ty), mask=(o < OUT)[:, None] & (c < IN)[None, :])
        if db is not None:  # noqa: SIM102
            if in_tile == in_tiles:
                total = _totals(grad, g_row, kept, kept_row, put, start, end, o, OUT, SLOPE, BLOCK_OUT, BLOCK_N)
                tl.store(db + part.to(tl.int64) * db_stride + o, total.to(db.dtype.element_ty), mask=o < OUT)


@triton.jit(do_not_specialize=["N", "K", "row_tiles"])  # not a kernel for every batch size
def rows_kernel(
    x, x_row, kept, kept_row, take, weights, w_module, w_out, w_in, biases, b_module, b_out,
    offsets, put, y, before, N, K, row_tiles,
    IN: tl.constexpr, OUT: tl.constexpr, W_POINTERS: tl.constexpr, W_ALIGNED: tl.constexpr, B_POINTERS: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, SEARCH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """grid (row tiles * column tiles): y [N, OUT] dense, every row of it; no ``weights``: the biases alone.

    GROUP row tiles go through the columns together, and share the module's weights in L2. ``before``: where to keep
    what the activation is applied to. SLOPE: x is a gradient, to be multiplied by the slope at ``kept``.
    """
    _rows(
        tl.program_id(0), x, x_row, kept, kept_row, take, weights, w_module, w_out, w_in, biases, b_module, b_out,
        offsets, put, y, before, N, K, row_tiles, IN, OUT, W_POINTERS, W_ALIGNED, B_POINTERS,
        ACTIVATION, SLOPE, PRECISION, SEARCH, GROUP, BLOCK_N, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["K"])
def sums_kernel(
    grad, g_row, kept, kept_row, put, x, x_row, take, offsets, dw, dw_stride, db, db_stride, K,
    IN: tl.constexpr, OUT: tl.constexpr, PIECE: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
    SEARCH: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grid (modules or pieces * out tiles * (in tiles + 1)): dw [., OUT, IN] and db [., OUT] of each.

    PIECE rows of a module are summed by one program (0: all of them). The last of the in tiles is the bias's; a
    gradient that is not wanted is None. Tiles of one module are neighbours, and share its rows in L2.
    """
    _sums(
        tl.program_id(0), grad, g_row, kept, kept_row, put, x, x_row, take, offsets, dw, dw_stride, db, db_stride, K,
        IN, OUT, PIECE, SLOPE, PRECISION, SEARCH, BLOCK_OUT, BLOCK_IN, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "K", "row_tiles", "row_programs"])
def gradients_kernel(
    grad, g_row, kept, kept_row, put, weights, w_module, w_out, w_in, biases, b_module, b_out,
    offsets, spread, dx, before, N, K, row_tiles, row_programs,
    x, x_row, take, dw, dw_stride, db, db_stride,
    F: tl.constexpr, O: tl.constexpr, W_POINTERS: tl.constexpr, W_ALIGNED: tl.constexpr,
    PIECE: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, SEARCH: tl.constexpr, GROUP: tl.constexpr,
    ROWS_N: tl.constexpr, ROWS_F: tl.constexpr, ROWS_O: tl.constexpr,
    SUMS_O: tl.constexpr, SUMS_F: tl.constexpr, SUMS_N: tl.constexpr,
):  # fmt: skip
    """grid (row_programs + those of ``sums_kernel``): both in one launch, where launches are what costs."""
    program = tl.program_id(0)
    if program < row_programs:
        _rows(
            program, grad, g_row, kept, kept_row, put, weights, w_module, w_out, w_in, biases, b_module, b_out,
            offsets, spread, dx, before, N, K, row_tiles, O, F, W_POINTERS, W_ALIGNED, False,
            0, SLOPE, PRECISION, SEARCH, GROUP, ROWS_N, ROWS_F, ROWS_O,
        )  # fmt: skip
    else:
        _sums(
            program - row_programs, grad, g_row, kept, kept_row, put, x, x_row, take, offsets, dw, dw_stride,
            db, db_stride, K, F, O, PIECE, SLOPE, PRECISION, SEARCH, SUMS_O, SUMS_F, SUMS_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def slope_kernel(
    grad, g_row, kept, kept_row, put, g, N,
    OUT: tl.constexpr, SLOPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """grid (row tiles * column tiles): g [N, OUT] = the gradient before the activation, in sorted order."""
    column_tiles: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    i = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.program_id(0) % column_tiles * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask = (i < N)[:, None] & (o < OUT)[None, :]
    row = _at(put, i, i < N)
    g_tile = tl.load(grad + (row * g_row)[:, None] + o[None, :], mask=mask, other=0.0)
    at = tl.load(kept + (row * kept_row)[:, None] + o[None, :], mask=mask, other=0.0)
    tl.store(g + (i * OUT)[:, None] + o[None, :], _sloped(g_tile, at, SLOPE).to(g.dtype.element_ty), mask=mask)


@triton.jit
def reduce_kernel(
    pieces, width, offsets, dw, db, elements,
    OUT: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (modules, blocks): the pieces of a module added up in their order; dw has ``elements``, db is behind it."""
    k = tl.program_id(0)
    e = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets + k)
    first = start // PIECE + k
    count = (tl.load(offsets + k + 1) - start + PIECE - 1) // PIECE
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for p in range(0, count.to(tl.int32)):
        total += tl.load(pieces + (first + p) * width + e, mask=e < width, other=0.0)
    k = k.to(tl.int64)
    if dw is not None:
        tl.store(dw + k * elements + e, total.to(dw.dtype.element_ty), mask=e < elements)
    if db is not None:
        at = e - elements
        tl.store(db + k * OUT + at, total.to(db.dtype.element_ty), mask=(at >= 0) & (at < OUT))
