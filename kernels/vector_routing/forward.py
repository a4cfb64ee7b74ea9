"""The E and D steps of one routing iteration as a kernel: gates, R and phi of a tile of input rows.

Axes: b sample, i input row, j output, c column of x, g operand: the [m, d] matrices that multiply x are stacked as
``packed`` [batch, G, M_PAD, D], G of (pred, use, ign). ``score`` [batch, rows, G, M_PAD] holds their products with x
where they were made beforehand (two-phase); otherwise the kernel makes them itself (one-pass).

Lanes past n, past a sample's length, past m or closed by the mask are selected away, never multiplied by zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import dot, nearest_tf32, open_pairs


@triton.jit
def softmax_over_open(z, open_):
    """Softmax of the log-sigmoids of z over axis 1, among the open lanes; a row with none is all 0.

    That is sigmoid(z) / sum sigmoid(z), with sigmoid(z) = exp(min(z, 0)) / (1 + exp(-|z|)) and the largest exponent of
    a row taken out, so that a row whose sigmoids all underflow keeps its shares.
    """
    z = tl.where(open_, z, float("-inf"))
    top = tl.minimum(tl.max(z, 1), 0.0)[:, None]
    share = tl.exp(tl.minimum(z, 0.0) - tl.where(top == float("-inf"), 0.0, top)) / (1.0 + tl.exp(-tl.abs(z)))
    share = tl.where(open_, share, 0.0)
    total = tl.sum(share, 1)[:, None]
    return share / tl.where(total == 0.0, 1.0, total)


@triton.jit
def load_rows(p, rows, columns, keep, STRIDE: tl.constexpr):
    """float32 tile of a matrix with row stride STRIDE; STRIDE 0 is one row for all."""
    return tl.load((p + rows * STRIDE)[:, None] + columns[None, :], mask=keep, other=0.0).to(tl.float32)


@triton.jit
def terms(
    z, benefit, cost, use, ign, use_bias, ign_bias, prior, mask, i, j, open_,
    M: tl.constexpr, SCORED: tl.constexpr, LINEAR: tl.constexpr, IGN: tl.constexpr,
):  # fmt: skip
    """R, benefit and cost, and phi / f = benefit R - cost (1 - R); z is read if SCORED, benefit and cost if LINEAR.

    The first iteration's R is the prior, shared out again among the open lanes where there is a mask.
    """
    if SCORED:
        R = softmax_over_open(z, open_)
    else:
        R = tl.where(open_, tl.load(prior + j, mask=j < M, other=0.0)[None, :], 0.0)
        if mask is not None:
            R = R / tl.maximum(tl.sum(R, 1)[:, None], 1.1754944e-38)
    if LINEAR:
        benefit += tl.load(use_bias + j, mask=j < M, other=0.0).to(tl.float32)[None, :]
        if IGN:
            cost += tl.load(ign_bias + j, mask=j < M, other=0.0).to(tl.float32)[None, :]
    else:
        benefit = load_rows(use, i, j, open_, M)
        if IGN:
            cost = load_rows(ign, i, j, open_, M)
    t = benefit * R
    if IGN:
        t -= cost * (1.0 - R)
    return R, benefit, cost, t


@triton.jit
def power_of_largest(top):
    """(1 / q, q) with q the power of two that has numbers up to ``top`` below 2^15, and is normal as 1 / q is."""
    exponent = tl.maximum(top.to(tl.int32, bitcast=True) >> 23, 15)
    return ((268 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def forward_kernel(
    x, x_stride_b,  # [batch, n, D], row stride X_ROW
    narrow, power,  # [batch, n, D] float16, [batch, n]: made if NARROW is 1; if it is 2, x is narrow
    gate, gate_weight, gate_bias, scale,  # [batch, n], [n or 1, D], [n or 1], [batch]
    packed, score,
    score_weight, score_bias, use, ign, use_bias, ign_bias, prior,
    mask, mask_stride_b, mask_stride_n, mask_stride_m,
    lengths,
    phi, phi_b, phi_n, phi_m,  # out [batch, rows of the chunk, M_PAD] and strides, in the dtype of the products
    phi_sums,  # out [batch, row tiles, M], of what phi is before it is rounded
    gate_stride, first, last, rows, write_rows, batch, batch_per_program,
    X_ROW: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    GATE_ROW: tl.constexpr, GATE_BIAS_ROW: tl.constexpr, SCORE_ROW: tl.constexpr,
    MAKE_GATE: tl.constexpr, SCORED: tl.constexpr, LINEAR: tl.constexpr, IGN: tl.constexpr,
    RAGGED: tl.constexpr, ONE_PASS: tl.constexpr,
    NEAREST: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grid (tiles of write_rows rows from first on, groups of samples); NEAREST: phi is rounded to TF32."""
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = (first + local).to(tl.int64)
    local = local.to(tl.int64)
    j = tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * batch_per_program
    for sample in range(start, tl.minimum(start + batch_per_program, batch)):
        b = tl.cast(sample, tl.int64)
        inside = i < last
        live = inside
        if RAGGED:
            live = live & (i < tl.load(lengths + b))
        open_ = open_pairs(mask, b, i, j, live, mask_stride_b, mask_stride_n, mask_stride_m, M)
        a = tl.zeros([BLOCK_N], dtype=tl.float32)
        L = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        benefit = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        cost = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        if NARROW == 1:
            largest = tl.zeros([BLOCK_N], dtype=tl.float32)
        if MAKE_GATE or (ONE_PASS and G > 0):
            x_rows = x + b * x_stride_b + i * X_ROW
            if ONE_PASS and G > 0:
                operand = packed + b * (G * M_PAD * D) + j.to(tl.int64) * D
            for column in range(0, D, BLOCK_D):
                c = column + tl.arange(0, BLOCK_D)
                x_tile = tl.load(x_rows[:, None] + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0)
                if NARROW == 1:
                    size = tl.abs(x_tile)
                    largest = tl.maximum(largest, tl.max(tl.where(size < float("inf"), size, 0.0), 1))
                if MAKE_GATE:
                    w = load_rows(gate_weight, i, c, live[:, None] & (c < D)[None, :], GATE_ROW)
                    a += tl.sum(x_tile.to(tl.float32) * w, 1)
                if ONE_PASS and G > 0:
                    x_cast = x_tile.to(phi.dtype.element_ty)
                    w_keep = (c < D)[:, None] & (j < M_PAD)[None, :]
                    w_tile = operand[None, :] + c[:, None]
                    if SCORED:
                        L = dot(x_cast, tl.load(w_tile, mask=w_keep, other=0.0), L, PRECISION)
                    if LINEAR:
                        u = tl.load(w_tile + SCORED * M_PAD * D, mask=w_keep, other=0.0)
                        benefit = dot(x_cast, u, benefit, PRECISION)
                        if IGN:
                            v = tl.load(w_tile + (SCORED + 1) * M_PAD * D, mask=w_keep, other=0.0)
                            cost = dot(x_cast, v, cost, PRECISION)
        if NARROW == 1:  # the rows once more, from where they have just been
            shrink, grow = power_of_largest(largest)
            tl.store(power + b * gate_stride + i, grow, mask=inside)
            for column in range(0, D, BLOCK_D):
                c = column + tl.arange(0, BLOCK_D)
                keep = live[:, None] & (c < D)[None, :]
                x_tile = tl.load((x + b * x_stride_b + i * X_ROW)[:, None] + c[None, :], mask=keep, other=0.0)
                out = (narrow + (b * gate_stride + i) * D)[:, None] + c[None, :]
                tl.store(out, (x_tile * shrink[:, None]).to(tl.float16), mask=keep)
        if NARROW == 2:
            grow = tl.load(power + b * gate_stride + i, mask=live, other=0.0)
        if not ONE_PASS:
            s_rows = score + (b * rows + local) * (G * M_PAD)
            if SCORED:
                L = tl.load(s_rows[:, None] + j[None, :], mask=open_, other=0.0)
            if LINEAR:
                benefit = tl.load((s_rows + SCORED * M_PAD)[:, None] + j[None, :], mask=open_, other=0.0)
                if IGN:
                    cost = tl.load((s_rows + (SCORED + 1) * M_PAD)[:, None] + j[None, :], mask=open_, other=0.0)

        if MAKE_GATE:
            bias = tl.load(gate_bias + i * GATE_BIAS_ROW, mask=live, other=0.0).to(tl.float32)
            f = tl.where(live, tl.sigmoid(tl.load(scale + b) * a + bias), 0.0)
            tl.store(gate + b * gate_stride + i, f, mask=inside)
        else:
            f = tl.load(gate + b * gate_stride + i, mask=live, other=0.0)

        z = L
        if SCORED:
            if NARROW == 2:
                L *= grow[:, None]
            z = L * load_rows(score_weight, i, j, open_, SCORE_ROW) + load_rows(score_bias, i, j, open_, SCORE_ROW)
        _R, _benefit, _cost, t = terms(
            z, benefit, cost, use, ign, use_bias, ign_bias, prior, mask, i, j, open_, M, SCORED, LINEAR, IGN
        )  # fmt: skip
        value = tl.where(open_, f[:, None] * t, 0.0)
        sums = phi_sums + (b * tl.num_programs(0) + tl.program_id(0)) * M + j
        tl.store(sums, tl.sum(value, 0), mask=j < M)
        if NARROW > 0:
            value = tl.where(open_, value * grow[:, None], 0.0)
        if NEAREST:
            value = nearest_tf32(value)
        out = (phi + b * phi_b + local * phi_n)[:, None] + (j.to(tl.int64) * phi_m)[None, :]
        tl.store(out, value.to(phi.dtype.element_ty), mask=(local < write_rows)[:, None] & (j < M_PAD)[None, :])
