"""The three matrix products of a routing iteration over a chunk of input rows, with the operands stacked.

Axes: b sample, i input row, k = (g, j) stacked column: operand g, output j; c column of x, s split of the rows.
``packed`` [batch, K, D] stacks the [m, d] matrices that multiply x; ``coefficient`` [batch, rows, K] stacks their
counterparts phi, dL, duse and dign, so that one index structure serves every product:

    score        out_bik = sum_c x_bic packed_bkc            (logits, betas linear in x, dphi)
    aggregate    out_bkc = sum_i coefficient_bik x_bic       (M, dpred, gradients of shared betas), and out_bk = sum_i
    spread       dx_bic += sum_k coefficient_bik packed_bkc, of this pass and of what earlier ones left to it

Tensor cores take TF32 operands from shared memory only where the axis that is summed lies dense. So with TURNED, x goes
through registers in ``aggregate``, which makes out^T, and ``spread`` finds packed as [batch, D, K].

Reductions over rows are split into partial buffers that a second sum adds up: no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import dot, nearest_tf32


@triton.jit
def score_kernel(
    x, x_stride_b, packed, score, lengths,
    first, last, rows,
    X_ROW: tl.constexpr, K: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grid (row tiles * column tiles, batch); the column tiles of one row tile are neighbours, and share it in L2."""
    column_tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    b = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) // column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    i = (first + local).to(tl.int64)
    k = tl.program_id(0) % column_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    live = i < last
    if RAGGED:
        live = live & (i < tl.load(lengths + b))
    x_rows = x + b * x_stride_b + i * X_ROW
    operand = packed + b * (K * D) + k.to(tl.int64) * D
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for column in range(0, D, BLOCK_D):
        c = column + tl.arange(0, BLOCK_D)
        x_tile = tl.load(x_rows[:, None] + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0)
        w_tile = tl.load(operand[None, :] + c[:, None], mask=(c < D)[:, None] & (k < K)[None, :], other=0.0)
        acc = dot(x_tile.to(packed.dtype.element_ty), w_tile, acc, PRECISION)
    out = (score + (b * rows + local.to(tl.int64)) * K)[:, None] + k[None, :]
    tl.store(out, acc, mask=(i < last)[:, None] & (k < K)[None, :])


@triton.jit
def aggregate_kernel(
    x, x_stride_b, coefficient, a_b, a_n, a_k, total, sums, lengths,
    total_stride_s, total_stride_b, sums_stride_s, sums_stride_b,
    first, last, splits, rows_per_split, batch, batch_per_program, one,
    X_ROW: tl.constexpr, K_FROM: tl.constexpr, K_TO: tl.constexpr, M: tl.constexpr,
    M_PAD: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    TURNED: tl.constexpr, WHOLE: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grid (splits * (k tiles * c tiles [+ k tiles]), groups of samples): columns K_FROM to K_TO of coefficient.

    total [splits, groups, operands * M, D] and sums [splits, groups, operands * M] without the padding of M_PAD; ADD:
    to what earlier chunks of rows left there. The tiles of one split are neighbours, and share its rows in L2; the
    last splits * k tiles programs only make sums, with SUMS. WHOLE: coefficient has zeros after its last row, as far as
    blocks go.
    """
    k_tiles: tl.constexpr = (K_TO - K_FROM + BLOCK_K - 1) // BLOCK_K
    c_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    share = program // (k_tiles * c_tiles)
    k_tile = program % (k_tiles * c_tiles) // c_tiles
    if SUMS:
        products = program < splits * (k_tiles * c_tiles)
        rest = program - splits * (k_tiles * c_tiles)
        share = tl.where(products, share, rest // k_tiles)
        k_tile = tl.where(products, k_tile, rest % k_tiles)
    else:
        products: tl.constexpr = True
    k = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    keep_k = k < K_TO - K_FROM
    columns = (K_FROM + k).to(tl.int64) * a_k
    j = k % M_PAD
    place = (k // M_PAD * M + j).to(tl.int64)
    real = keep_k & (j < M)
    split = share.to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    start = tl.program_id(1) * batch_per_program
    stop = tl.minimum(start + batch_per_program, batch)
    row_start = share * rows_per_split
    row_stop = tl.minimum(row_start + rows_per_split, last - first)
    if products:
        c = program % c_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
        out = (total + split * total_stride_s + group * total_stride_b + place * D)[:, None] + c[None, :]
        keep = real[:, None] & (c < D)[None, :]
        if TURNED:
            out = tl.trans(out)
            keep = tl.trans(keep)
            acc = tl.zeros([BLOCK_D, BLOCK_K], dtype=tl.float32)
        else:
            acc = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
        if ADD:
            acc = tl.load(out, mask=keep, other=0.0)
        for sample in range(start, stop):
            b = tl.cast(sample, tl.int64)
            row_end = row_stop
            if RAGGED:
                row_end = tl.minimum(row_stop, tl.load(lengths + b) - first).to(tl.int32)
            for row in range(row_start, row_end, BLOCK_N):
                r = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
                a_keep = keep_k[:, None] & (r == r)[None, :] if WHOLE else keep_k[:, None] & (r < row_end)[None, :]
                a_tile = tl.load((coefficient + b * a_b + r * a_n)[None, :] + columns[:, None], mask=a_keep, other=0.0)
                x_tile = tl.load(
                    (x + b * x_stride_b + (first + r) * X_ROW)[:, None] + c[None, :],
                    mask=(r < row_end)[:, None] & (c < D)[None, :], other=0.0,
                )  # fmt: skip
                if TURNED:
                    if x.dtype.element_ty == tl.float32:
                        turned = tl.trans(x_tile) * one  # what keeps it from being copied to where it lies turned
                        turned = nearest_tf32(turned) if PRECISION == "tf32" else turned
                    else:
                        turned = tl.trans(x_tile).to(tl.float32)
                    acc = dot(turned, tl.trans(a_tile), acc, PRECISION)
                else:
                    acc = dot(a_tile, x_tile.to(coefficient.dtype.element_ty), acc, PRECISION)
        tl.store(out, acc, mask=keep)
    else:
        sum_ = tl.zeros([BLOCK_K], dtype=tl.float32)
        for sample in range(start, stop):
            b = tl.cast(sample, tl.int64)
            for row in range(row_start, row_stop, BLOCK_N):
                r = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
                a_tile = tl.load(
                    (coefficient + b * a_b + r * a_n)[:, None] + columns[None, :],
                    mask=(r < row_stop)[:, None] & keep_k[None, :], other=0.0,
                )  # fmt: skip
                sum_ += tl.sum(a_tile.to(tl.float32), 0)
        where = sums + split * sums_stride_s + group * sums_stride_b + place
        if ADD:
            sum_ += tl.load(where, mask=real, other=0.0)
        tl.store(where, sum_, mask=real)


@triton.jit
def spread_over(
    acc, rows, operand, inside, c,
    K: tl.constexpr, D: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + sum_k rows_k operand_kc."""
    for column in range(0, K, BLOCK_K):
        k = column + tl.arange(0, BLOCK_K)
        a_tile = tl.load(rows[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        if TURNED:
            w_rows = operand + k[:, None] + (c.to(tl.int64) * K)[None, :]
        else:
            w_rows = (operand + k.to(tl.int64) * D)[:, None] + c[None, :]
        w_tile = tl.load(w_rows, mask=(k < K)[:, None] & (c < D)[None, :], other=0.0)
        acc = dot(a_tile, w_tile, acc, PRECISION)
    return acc


@triton.jit
def spread_kernel(
    x, x_stride_b, dx, dx_stride_b, packed, coefficient, a_b, a_n, left_packed, left, left_b, left_n,
    gate, gate_grad, gate_weight, scale, gate_weight_grad,
    lengths, gate_stride, gate_grad_stride, first, last, batch, batch_per_program,
    X_ROW: tl.constexpr, DX_ROW: tl.constexpr, K: tl.constexpr, LEFT: tl.constexpr, D: tl.constexpr,
    GATE_ROW: tl.constexpr,
    MADE_GATE: tl.constexpr, WANT_X: tl.constexpr, WANT_GATE: tl.constexpr, RAGGED: tl.constexpr,
    ADD_X: tl.constexpr, ADD_GATE: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grid (row tiles * c tiles, groups of samples). left [batch, ., LEFT] starts at the chunk's first row.

    Where the iteration made the gates, their part of dx is added, and with WANT_GATE their weight's gradient is made:
    [n, D] in the weight's own rows, or with GATE_ROW 0 one row of [row tiles, groups, D] per program.
    """
    c_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row_tile = tl.program_id(0) // c_tiles
    c = tl.program_id(0) % c_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    local = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    i = (first + local).to(tl.int64)
    local = local.to(tl.int64)
    inside = i < last
    keep = inside[:, None] & (c < D)[None, :]
    start = tl.program_id(1) * batch_per_program
    w_grad = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for sample in range(start, tl.minimum(start + batch_per_program, batch)):
        b = tl.cast(sample, tl.int64)
        live = inside
        if RAGGED:
            live = live & (i < tl.load(lengths + b))
        if MADE_GATE:
            f = tl.load(gate + b * gate_stride + i, mask=live, other=0.0)
            df = tl.load(gate_grad + b * gate_grad_stride + i, mask=live, other=0.0)
            slope = f * (1.0 - f)
            da = tl.where(slope == 0, 0.0, df * slope) * tl.load(scale + b)
        if WANT_X:
            out = (dx + b * dx_stride_b + i * DX_ROW)[:, None] + c[None, :]
            acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
            if ADD_X:
                acc = tl.load(out, mask=keep, other=0.0).to(tl.float32)
            acc = spread_over(
                acc,
                coefficient + b * a_b + local * a_n,
                packed + b * (K * D),
                inside,
                c,
                K,
                D,
                TURNED,
                PRECISION,
                BLOCK_K,
            )
            if LEFT > 0:
                acc = spread_over(
                    acc, left + b * left_b + local * left_n, left_packed + b * (LEFT * D), inside, c, LEFT, D, TURNED,
                    PRECISION, BLOCK_K,
                )  # fmt: skip
            if MADE_GATE:
                w = tl.load(
                    (gate_weight + i * GATE_ROW)[:, None] + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0
                )
                acc += da[:, None] * w.to(tl.float32)
            if ADD_X:
                tl.store(out, acc.to(dx.dtype.element_ty), mask=live[:, None] & (c < D)[None, :])
            else:
                tl.store(out, tl.where(live[:, None], acc, 0.0).to(dx.dtype.element_ty), mask=keep)
        if WANT_GATE:
            x_tile = tl.load(
                (x + b * x_stride_b + i * X_ROW)[:, None] + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0
            )
            w_grad += da[:, None] * x_tile.to(tl.float32)
    if WANT_GATE:
        if GATE_ROW == 0:
            program = row_tile.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
            tl.store(gate_weight_grad + program * D + c, tl.sum(w_grad, 0), mask=c < D)
        else:
            out = (gate_weight_grad + i * D)[:, None] + c[None, :]
            if ADD_GATE:
                w_grad += tl.load(out, mask=keep, other=0.0).to(tl.float32)
            tl.store(out, w_grad.to(gate_weight_grad.dtype.element_ty), mask=keep)
