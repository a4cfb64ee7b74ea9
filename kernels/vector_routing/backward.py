"""The gradient of the E and D steps as a kernel: everything that belongs to a tile of input rows.

Axes: b sample, i input row, j output, c column of x, g operand: the [m, d] matrices that multiply x are stacked as
``packed`` [batch, G, M_PAD, D], G of (dM, pred, use, ign); ``score`` [batch, rows, G, M_PAD] holds their products with
x where they were made beforehand (two-phase). ``coefficient`` [batch, rows, G, M_PAD] receives their counterparts
(phi, dL, duse, dign), with which dx, dpred and the gradients of linear betas are matrix products.

The program that owns a tile of parameter rows loops over the samples, so those gradients add up in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import dot, nearest_tf32, open_pairs
from .forward import load_rows, terms


@triton.jit
def put_rows(p, value, rows, columns, keep, STRIDE: tl.constexpr, ADD: tl.constexpr):
    """Write a tile of a gradient, or add it to what is there."""
    out = (p + rows * STRIDE)[:, None] + columns[None, :]
    if ADD:
        value += tl.load(out, mask=keep, other=0.0).to(tl.float32)
    tl.store(out, value.to(p.dtype.element_ty), mask=keep)


@triton.jit
def put_coefficient(out, value, keep, NEAREST: tl.constexpr):
    if NEAREST:
        value = nearest_tf32(value)
    tl.store(out, value.to(out.dtype.element_ty), mask=keep)


@triton.jit
def backward_kernel(
    x, x_stride_b,  # [batch, n, D], row stride X_ROW
    gate, packed, score, dp,  # [batch, n], ., ., [batch, M]
    score_weight, score_bias, use, ign, use_bias, ign_bias, prior,
    mask, mask_stride_b, mask_stride_n, mask_stride_m,
    lengths,
    coefficient, a_b, a_n,  # out, strides of a sample and of a row
    d_gate, d_score_weight, d_score_bias, d_use, d_ign,  # out: [batch, n], then [n, M]
    score_sums,  # out: [programs, 2, M], sums of the score parameters' gradients where one row serves all
    gate_stride, d_gate_stride, first, last, rows, batch, batch_per_program,
    X_ROW: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    SCORE_ROW: tl.constexpr, SCORED: tl.constexpr, LINEAR: tl.constexpr, IGN: tl.constexpr,
    RAGGED: tl.constexpr, WANT_X: tl.constexpr, WANT_ROWS: tl.constexpr,
    ADD_GATE: tl.constexpr, ADD_ROWS: tl.constexpr, ONE_PASS: tl.constexpr, NEAREST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grid (row tiles of [first, last), groups of samples); one group where parameters have rows of their own.

    NEAREST: coefficients that products alone take are rounded to TF32; duse and dign are summed, too.
    """
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = (first + local).to(tl.int64)
    local = local.to(tl.int64)
    j = tl.arange(0, BLOCK_M)
    inside = i < last
    real = inside[:, None] & (j < M)[None, :]
    if WANT_ROWS and not LINEAR:
        use_sum = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        ign_sum = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    if WANT_ROWS and SCORED:
        if SCORE_ROW == 0:
            weight_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
            bias_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        else:
            weight_sum = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            bias_sum = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    start = tl.program_id(1) * batch_per_program
    for sample in range(start, tl.minimum(start + batch_per_program, batch)):
        b = tl.cast(sample, tl.int64)
        live = inside
        if RAGGED:
            live = live & (i < tl.load(lengths + b))
        open_ = open_pairs(mask, b, i, j, live, mask_stride_b, mask_stride_n, mask_stride_m, M)
        dphi = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        L = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        benefit = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        cost = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        if ONE_PASS:
            x_rows = x + b * x_stride_b + i * X_ROW
            operand = packed + b * (G * M_PAD * D) + j.to(tl.int64) * D
            for column in range(0, D, BLOCK_D):
                c = column + tl.arange(0, BLOCK_D)
                x_tile = tl.load(x_rows[:, None] + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0)
                x_cast = x_tile.to(packed.dtype.element_ty)
                w_keep = (c < D)[:, None] & (j < M_PAD)[None, :]
                w_tile = operand[None, :] + c[:, None]
                dphi = dot(x_cast, tl.load(w_tile, mask=w_keep, other=0.0), dphi, PRECISION)
                if SCORED:
                    w = tl.load(w_tile + M_PAD * D, mask=w_keep, other=0.0)
                    L = dot(x_cast, w, L, PRECISION)
                if LINEAR:
                    u = tl.load(w_tile + (SCORED + 1) * M_PAD * D, mask=w_keep, other=0.0)
                    benefit = dot(x_cast, u, benefit, PRECISION)
                    if IGN:
                        v = tl.load(w_tile + (SCORED + 2) * M_PAD * D, mask=w_keep, other=0.0)
                        cost = dot(x_cast, v, cost, PRECISION)
        else:
            s_tile = (score + (b * rows + local) * (G * M_PAD))[:, None] + j[None, :]
            dphi = tl.load(s_tile, mask=open_, other=0.0)
            if SCORED:
                L = tl.load(s_tile + M_PAD, mask=open_, other=0.0)
            if LINEAR:
                benefit = tl.load(s_tile + (SCORED + 1) * M_PAD, mask=open_, other=0.0)
                if IGN:
                    cost = tl.load(s_tile + (SCORED + 2) * M_PAD, mask=open_, other=0.0)
        dphi = tl.where(open_, dphi + tl.load(dp + b * M + j, mask=j < M, other=0.0)[None, :], 0.0)
        f = tl.load(gate + b * gate_stride + i, mask=live, other=0.0)[:, None]

        z = L
        if SCORED:
            weight = load_rows(score_weight, i, j, open_, SCORE_ROW)
            z = L * weight + load_rows(score_bias, i, j, open_, SCORE_ROW)
        R, benefit, cost, t = terms(
            z, benefit, cost, use, ign, use_bias, ign_bias, prior, mask, i, j, open_, M, SCORED, LINEAR, IGN
        )  # fmt: skip

        dgate = tl.sum(tl.where(open_, dphi * t, 0.0), 1)
        out = d_gate + b * d_gate_stride + i
        if ADD_GATE:
            dgate += tl.load(out, mask=inside, other=0.0)
        tl.store(out, dgate, mask=inside)

        a_tile = (coefficient + b * a_b + local * a_n)[:, None] + j[None, :]
        a_keep = inside[:, None] & (j < M_PAD)[None, :]
        if WANT_X:
            put_coefficient(a_tile, tl.where(open_, f * t, 0.0), a_keep, NEAREST)
        duse = tl.where(open_, f * R * dphi, 0.0)
        dign = tl.where(open_, f * (R - 1.0) * dphi, 0.0)
        if LINEAR:
            a_use = a_tile + (SCORED + 1) * M_PAD
            tl.store(a_use, duse.to(coefficient.dtype.element_ty), mask=a_keep)
            if IGN:
                tl.store(a_use + M_PAD, dign.to(coefficient.dtype.element_ty), mask=a_keep)
        elif WANT_ROWS:
            use_sum += duse
            ign_sum += dign
        if SCORED:
            dR = f * (benefit + cost) * dphi
            row_sum = tl.sum(tl.where(open_, R * dR, 0.0), 1)[:, None]
            dz = tl.where(open_, R * (dR - row_sum) * tl.sigmoid(-z), 0.0)
            dL = tl.where(open_, dz * weight, 0.0)
            put_coefficient(a_tile + M_PAD, dL, a_keep, NEAREST)
            if WANT_ROWS:
                dzL = tl.where(open_, dz * L, 0.0)
                if SCORE_ROW == 0:
                    weight_sum += tl.sum(dzL, 0)
                    bias_sum += tl.sum(dz, 0)
                else:
                    weight_sum += dzL
                    bias_sum += dz
    if WANT_ROWS and not LINEAR:
        put_rows(d_use, use_sum, i, j, real, M, ADD_ROWS)
        if IGN:
            put_rows(d_ign, ign_sum, i, j, real, M, ADD_ROWS)
    if WANT_ROWS and SCORED:
        if SCORE_ROW == 0:
            program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
            tl.store(score_sums + program * (2 * M) + j, weight_sum, mask=j < M)
            tl.store(score_sums + program * (2 * M) + M + j, bias_sum, mask=j < M)
        else:
            put_rows(d_score_weight, weight_sum, i, j, real, M, ADD_ROWS)
            put_rows(d_score_bias, bias_sum, i, j, real, M, ADD_ROWS)
