"""The gradient of an iteration of matrix routing as kernels; votes are made again, never stored.

``pairs_kernel`` has made the logits and the moments' part of dD; ``assign_backward_kernel`` does what needs all outputs
of an input, ``gradient_kernel`` what needs votes. Tiles and names as in ``matrix_routing_forward``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import dot, open_pairs
from .forward import lanes, routing_weights, settled, tile_of, votes


@triton.jit
def assign_backward_kernel(
    gate, beta_use, beta_ign, da,  # [batch, n], [n or 1, M] twice, [batch, M]
    mask, mask_stride_b, mask_stride_n, mask_stride_m,
    weight, slope,  # [batch, rows, M]: logits (if SCORED) and the moments' part of dD come in, D and dl go out
    d_gate, d_use, d_ign,  # out: [batch, n], [n, M] twice
    beta_sums, A0_part,  # out: [programs, 2, M] where one row of betas serves all, [slots, batch, M]
    gate_stride, A0_stride, slot, first, last, rows, batch, batch_per_program, tiles,
    BETA_ROW: tl.constexpr, M: tl.constexpr, SCORED: tl.constexpr,
    WANT_ROWS: tl.constexpr, ADD_GATE: tl.constexpr, ADD_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """R, D, dD = slope + da (use + ign) and dl = R (f dD - sum_k R f dD) of a tile of inputs.

    grid (tiles x groups of samples); one group where betas have rows of their own.
    """
    tile = tl.program_id(0) % tiles
    i = (first + tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    live = i < last
    j = tl.arange(0, BLOCK_M)
    inside = live[:, None] & (j < M)[None, :]
    beta = (i * BETA_ROW)[:, None] + j[None, :]
    use = tl.load(beta_use + beta, mask=inside, other=0.0).to(tl.float32)
    ign = tl.load(beta_ign + beta, mask=inside, other=0.0).to(tl.float32)
    if WANT_ROWS:
        use_sum = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        ign_sum = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    start = tl.program_id(0) // tiles * batch_per_program
    for sample in range(start, tl.minimum(start + batch_per_program, batch)):
        b = tl.cast(sample, tl.int64)
        open_ = open_pairs(mask, b, i, j, live, mask_stride_b, mask_stride_n, mask_stride_m, M)
        at = ((b * rows + i - first) * M)[:, None] + j[None, :]
        R = routing_weights(weight + at, open_, SCORED)
        f = tl.load(gate + b * gate_stride + i, mask=live, other=0.0)[:, None]
        D = tl.where(open_ & (f != 0.0), f * R, 0.0)
        a = tl.load(da + b * M + j, mask=j < M, other=0.0)[None, :]
        dD = tl.where(open_, tl.load(slope + at, mask=open_, other=0.0) + a * (use + ign), 0.0)
        tl.store(weight + at, D, mask=inside)
        if SCORED:
            dR = f * dD
            dl = tl.where(open_, R * (dR - tl.sum(R * dR, 1)[:, None]), 0.0)
            tl.store(slope + at, dl, mask=inside)
            A0 = A0_part + (slot + tile).to(tl.int64) * A0_stride + b * M + j
            tl.store(A0, tl.sum(dl, 0), mask=j < M)
        dgate = tl.sum(tl.where(open_, dD * R - a * ign, 0.0), 1)
        out = d_gate + b * gate_stride + i
        if ADD_GATE:
            dgate += tl.load(out, mask=live, other=0.0)
        tl.store(out, dgate, mask=live)
        if WANT_ROWS:
            use_sum += a * D
            ign_sum -= tl.where(open_, a * (f - D), 0.0)
    if WANT_ROWS:
        if BETA_ROW == 0:
            sums = beta_sums + tl.program_id(0).to(tl.int64) * (2 * M) + j
            tl.store(sums, tl.sum(use_sum, 0), mask=j < M)
            tl.store(sums + M, tl.sum(ign_sum, 0), mask=j < M)
        else:
            if ADD_ROWS:
                use_sum += tl.load(d_use + beta, mask=inside, other=0.0)
                ign_sum += tl.load(d_ign + beta, mask=inside, other=0.0)
            tl.store(d_use + beta, use_sum, mask=inside)
            tl.store(d_ign + beta, ign_sum, mask=inside)


@triton.jit
def gradient_kernel(
    gate, mu_inp, W, bias,  # [batch, n], [batch, n, C, D], [n or 1, M, D, H], [n or 1, M, C, H]
    before, sig2,  # mu and sig2 of the previous iteration, [batch, M, C, H]
    center, g1, g2,  # [batch, M, C, H]
    weight, slope,  # [batch, rows, M]: D and dl
    d_mu,  # out [output tiles, batch, rows, C, D]
    d_W, d_bias,  # out [n, M, D, H], [n, M, C, H]; with SHARED, [programs, M, D, H] and so on
    A1_part, A2_part,  # out [slots, B, M, C, H]
    gate_stride, mu_stride, A_stride, slot, first, last, rows, batch, per_split, splits, batch_tiles, tiles_per_program,
    add_rows,
    M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    SHARED: tl.constexpr, SCORED: tl.constexpr, GAUSSIAN: tl.constexpr,
    WANT_MU: tl.constexpr, WANT_ROWS: tl.constexpr,
    S: tl.constexpr, CP: tl.constexpr, J: tl.constexpr, HP: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dV = D (g1 + 2 g2 e) - dl (V - mu) / sig2 of a tile, and everything that is summed from it.

    Where inputs have parameters of their own, one program sees all samples, so that no other adds to the same rows;
    with SHARED it has sums of its own to add to. grid (output tiles x splits of the inputs x groups of batch tiles).
    """
    jt, split, group, lo, hi, c, j, h, keep_q = tile_of(first, last, per_split, splits, M, H, S, CP, J, HP)
    c1 = tl.arange(0, CP)
    keep_c = (c1 < C)[:, None] & keep_q[None, :]
    STEP: tl.constexpr = S if SHARED else 1
    start = group * tiles_per_program
    for bt in range(start, tl.minimum(start + tiles_per_program, batch_tiles)):
        b, i, live = lanes(bt, lo, hi, batch, S, CP, SHARED)
        keep = ((b < batch) & (c < C))[:, None] & keep_q[None, :]
        at = (b * (M * C * H) + c * H)[:, None] + (j * (C * H) + h)[None, :]
        middle = tl.load(center + at, mask=keep, other=0.0)
        linear = tl.load(g1 + at, mask=keep, other=0.0)
        square = 2.0 * tl.load(g2 + at, mask=keep, other=0.0)
        if SCORED:
            mu = tl.load(before + at, mask=keep, other=0.0)
            precision = 2.0 * keep.to(tl.float32)
            if GAUSSIAN:
                precision = 1.0 / tl.load(sig2 + at, mask=keep, other=1.0)
            A1 = tl.zeros([S * CP, J * HP], dtype=tl.float32)
            A2 = tl.zeros([S * CP, J * HP], dtype=tl.float32)
        for row in range(lo, hi, STEP):
            b, i, live = lanes(bt, row, hi, batch, S, CP, SHARED)
            keep = (live & (c < C))[:, None] & keep_q[None, :]
            V, x_rows, keep_rows, w_rows = votes(
                gate, mu_inp, W, bias, gate_stride, mu_stride, row, b, i, live, c, j, h, keep_q, keep,
                M, C, D, H, SHARED, S, CP, J, HP, BLOCK_D, DOT,
            )  # fmt: skip

            pair = ((b * rows + i - first) * M)[:, None] + j[None, :]
            share = tl.load(weight + pair, mask=keep, other=0.0)
            dV = tl.where(share != 0.0, share * (linear + square * (V - middle)), 0.0)
            if SCORED:
                dl = tl.load(slope + pair, mask=keep, other=0.0)
                off = tl.where(dl != 0.0, V - mu, 0.0)
                weighted = dl * off
                A1 += weighted
                A2 += weighted * off
                dV -= weighted * precision

            # Sums over lanes go to memory that no other program adds to; a barrier parts the writing of one step, by
            # whichever threads hold the sums, from the reading of the next.
            if WANT_ROWS:
                tl.debug_barrier()
                own_out = tl.cast(row, tl.int64)
                before_this = bt - start + add_rows
                if SHARED:
                    own_out = tl.cast(group * splits + split, tl.int64)
                    before_this = bt - start + row - lo
                more = keep_q & (tl.zeros_like(j) + before_this > 0)
                b_out = d_bias + own_out * (M * C * H) + (c1 * H)[:, None] + (j * (C * H) + h)[None, :]
                db = tl.sum(tl.reshape(dV, [S, CP, J * HP]), 0)
                db += tl.load(b_out, mask=keep_c & more[None, :], other=0.0)
                tl.store(b_out, db, mask=keep_c)
                w_out = d_W + own_out * (M * D * H) + j * (D * H) + h
            if WANT_MU:
                mu_out = d_mu + ((jt * tl.cast(batch, tl.int64) + b) * rows + i - first) * (C * D) + c * D
                keep_mu = live & (c < C)
            if DOT:
                for column in range(0, D, BLOCK_D):
                    d = column + tl.arange(0, BLOCK_D)
                    if WANT_ROWS:
                        keep_x = keep_rows[None, :] & (d < D)[:, None]
                        x = tl.load(x_rows[None, :] + d[:, None], mask=keep_x, other=0.0)
                        out = w_out[None, :] + (d * H)[:, None]
                        keep_w = keep_q[None, :] & (d < D)[:, None]
                        dw = tl.load(out, mask=keep_w & more[None, :], other=0.0)
                        tl.store(out, dot(x, dV, dw, "ieee"), mask=keep_w)
                    if WANT_MU:
                        keep_w = keep_q[:, None] & (d < D)[None, :]
                        w = tl.load(w_rows[:, None] + (d * H)[None, :], mask=keep_w, other=0.0).to(tl.float32)
                        dx = dot(dV, w, tl.zeros([S * CP, BLOCK_D], dtype=tl.float32), "ieee")
                        keep_x = keep_mu[:, None] & (d < D)[None, :]
                        tl.store(mu_out[:, None] + d[None, :], dx, mask=keep_x)
            else:
                for d in tl.static_range(D):
                    if WANT_ROWS:
                        x = tl.load(x_rows + d, mask=keep_rows, other=0.0)
                        dw = tl.sum(x[:, None] * dV, 0)
                        dw += tl.load(w_out + d * H, mask=more, other=0.0)
                        tl.store(w_out + d * H, dw, mask=keep_q)
                    if WANT_MU:
                        w = tl.load(w_rows + d * H, mask=keep_q, other=0.0).to(tl.float32)
                        tl.store(mu_out + d, tl.sum(dV * w[None, :], 1), mask=keep_mu)
        if SCORED:
            b, i, live = lanes(bt, lo, hi, batch, S, CP, SHARED)
            base = (slot + split).to(tl.int64) * A_stride
            if SHARED:
                at1 = base + tl.cast(bt, tl.int64) * (M * C * H) + (c1 * H)[:, None] + (j * (C * H) + h)[None, :]
                tl.store(A1_part + at1, tl.sum(tl.reshape(A1, [S, CP, J * HP]), 0), mask=keep_c)
                tl.store(A2_part + at1, tl.sum(tl.reshape(A2, [S, CP, J * HP]), 0), mask=keep_c)
            else:
                keep1 = ((b < batch) & (c < C))[:, None] & keep_q[None, :]
                at1 = base + (b * (M * C * H) + c * H)[:, None] + (j * (C * H) + h)[None, :]
                tl.store(A1_part + at1, A1, mask=keep1)
                tl.store(A2_part + at1, A2, mask=keep1)


@triton.jit
def slot_sums(part, at, width, slots, keep, SIZE: tl.constexpr, BLOCK_S: tl.constexpr):
    """Sums over slots of ``part`` [slots, width] at the positions ``at`` [SIZE]."""
    total = tl.zeros([SIZE], dtype=tl.float32)
    for slot in range(0, slots, BLOCK_S):
        s = (slot + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = (s < slots)[:, None] & keep[None, :]
        total += tl.sum(tl.load(part + (s * width)[:, None] + at[None, :], mask=inside, other=0.0), 0)
    return total


@triton.jit
def output_grads_kernel(
    N, mean, M2, a, low,  # moments of this iteration: [outputs], [outputs, CH], ...
    da, dmu, dsig2,  # gradients of its outputs (if GIVEN)
    A0_part, A1_part, A2_part,  # else what the next iteration's sums give: [A0_slots, outputs], [A_slots, outputs, CH]
    g1, g2, k, da_out,  # out
    N_before, mean_before, M2_before, mu_before, sig2_before,  # of the iteration before (if BEFORE); out: settled
    eps, outputs, A0_slots, A_slots,
    GIVEN: tl.constexpr, GAUSSIAN: tl.constexpr, BEFORE: tl.constexpr,
    CH: tl.constexpr, CHP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """``PreviousGrads.of``, ``OutputGrads.of`` and ``settle`` of a group of outputs. grid (groups of outputs)."""
    SIZE: tl.constexpr = BLOCK_O * CHP
    lane = tl.arange(0, SIZE)
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + lane // CHP
    ch = lane % CHP
    keep = (o < outputs) & (ch < CH)
    per_output = keep & (ch == 0)
    e = o * CH + ch
    width = tl.cast(outputs, tl.int64)
    N_o = tl.load(N + o, mask=keep, other=1.0)
    center = tl.load(mean + e, mask=keep, other=0.0)
    square = tl.load(M2 + e, mask=keep, other=0.0)
    rounded = tl.load(low + e, mask=keep, other=0.0)
    if GIVEN:
        d_a = tl.load(da + o, mask=keep, other=0.0)
        d_mu = tl.load(dmu + e, mask=keep, other=0.0)
        d_sig2 = tl.load(dsig2 + e, mask=keep, other=0.0)
    else:
        A0 = slot_sums(A0_part, o, width, A0_slots, keep, SIZE, BLOCK_S)
        A1 = slot_sums(A1_part, e, width * CH, A_slots, keep, SIZE, BLOCK_S)
        a_o = tl.load(a + o, mask=keep, other=0.0)
        small = tl.exp(-tl.abs(a_o))
        d_a = A0 * tl.div_rn(tl.where(a_o > 0.0, small, 1.0), 1.0 + small)
        if GAUSSIAN:
            A2 = slot_sums(A2_part, e, width * CH, A_slots, keep, SIZE, BLOCK_S)
            _, sig2 = settled(N_o, center, square, eps)
            precision = tl.div_rn(1.0, sig2)
            d_mu = A1 * precision
            d_sig2 = 0.5 * precision * (A2 * precision - A0)
        else:
            d_mu = 2.0 * A1
            d_sig2 = tl.zeros([SIZE], dtype=tl.float32)
    s = N_o + eps
    rest = tl.div_rn(eps, s)
    shift = rest * center
    along = d_mu + 2.0 * rest * d_sig2 * shift
    through = d_mu - 2.0 * rest * d_sig2 * (center - shift)
    part = d_sig2 * (tl.div_rn(square, s) - rest * (shift * shift)) - through * shift
    part += rounded * (along - d_sig2 * rounded)
    along -= 2.0 * d_sig2 * rounded
    tl.store(g1 + e, tl.div_rn(along, s), mask=keep)
    tl.store(g2 + e, tl.div_rn(d_sig2, s), mask=keep)
    tl.store(da_out + o, d_a, mask=per_output)
    sums = tl.sum(tl.reshape(tl.where(keep, tl.div_rn(part, s), 0.0), [BLOCK_O, CHP]), 1)
    own = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    tl.store(k + own, sums, mask=own < outputs)
    if BEFORE:
        N_b = tl.load(N_before + o, mask=keep, other=1.0)
        mean_b = tl.load(mean_before + e, mask=keep, other=0.0)
        mu, sig2_b = settled(N_b, mean_b, tl.load(M2_before + e, mask=keep, other=0.0), eps)
        tl.store(mu_before + e, mu, mask=keep)
        tl.store(sig2_before + e, sig2_b, mask=keep)


@triton.jit
def shared_sums_kernel(
    W_part, bias_part, beta_part,  # [slots, W_size], [slots, bias_size], [beta_slots, 2, M]
    W, bias, use, ign,  # out
    W_size, bias_size, slots, beta_slots,
    ADD: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Partial sums of shared parameters' gradients into their buffers. grid (tiles of W, bias and betas)."""
    W_tiles = tl.cdiv(W_size, BLOCK)
    bias_tiles = tl.cdiv(bias_size, BLOCK)
    tile = tl.program_id(0)
    if tile < W_tiles:
        at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        keep = at < W_size
        total = slot_sums(W_part, at, tl.cast(W_size, tl.int64), slots, keep, BLOCK, BLOCK_S)
        if ADD:
            total += tl.load(W + at, mask=keep)
        tl.store(W + at, total, mask=keep)
    elif tile < W_tiles + bias_tiles:
        at = (tile - W_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        keep = at < bias_size
        total = slot_sums(bias_part, at, tl.cast(bias_size, tl.int64), slots, keep, BLOCK, BLOCK_S)
        if ADD:
            total += tl.load(bias + at, mask=keep)
        tl.store(bias + at, total, mask=keep)
    else:
        at = (tile - W_tiles - bias_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = slot_sums(beta_part, at, tl.cast(2 * M, tl.int64), beta_slots, at < 2 * M, BLOCK, BLOCK_S)
        used, ignored = at < M, (at >= M) & (at < 2 * M)
        if ADD:
            total += tl.load(use + at, mask=used, other=0.0) + tl.load(ign + at - M, mask=ignored, other=0.0)
        tl.store(use + at, total, mask=used)
        tl.store(ign + at - M, total, mask=ignored)
