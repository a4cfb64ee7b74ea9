"""One iteration of matrix routing as kernels: logits of pairs, their softmax, moments of votes that are never stored.

A tile of votes is [P, Q]: P stands for pairs (lane s, row c of a capsule's matrix), Q for pairs (output j, column h),
both padded to powers of two. Lanes are samples that meet the same input, whose parameters a program then reads once for
all of them; where one set of parameters serves every input (SHARED), lanes are inputs of one sample.
Axes: b sample, i input, j output, c row, d column before, h column after routing.

What is [batch, rows, M] is scratch of a chunk of inputs; partial sums over inputs are kept apart, split by split, until
``merge_kernel`` puts them together in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import dot, open_pairs


@triton.jit
def lanes(bt, row, last, batch, S: tl.constexpr, CP: tl.constexpr, SHARED: tl.constexpr):
    """(sample, input) of each p, and which p have one."""
    s = tl.arange(0, S * CP) // CP
    if SHARED:
        b = (bt + tl.zeros_like(s)).to(tl.int64)
        i = (row + s).to(tl.int64)
    else:
        b = (bt * S + s).to(tl.int64)
        i = (row + tl.zeros_like(s)).to(tl.int64)
    return b, i, (b < batch) & (i < last)


@triton.jit
def pair_lanes(bt, row, last, batch, S: tl.constexpr, SHARED: tl.constexpr):
    """The same for each s."""
    return lanes(bt, row, last, batch, S, 1, SHARED)


@triton.jit
def tile_of(
    first, last, per_split, splits,
    M: tl.constexpr, H: tl.constexpr, S: tl.constexpr, CP: tl.constexpr, J: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    """Output tile, split of inputs, tile or group of the batch, first and last input; c [P], j, h and which [Q] are."""
    jt = tl.program_id(0) % tl.cdiv(M, J)
    rest = tl.program_id(0) // tl.cdiv(M, J)
    split = rest % splits
    bt = rest // splits
    lo = first + split * per_split
    hi = tl.minimum(lo + per_split, last)
    c = tl.arange(0, S * CP) % CP
    j = jt * J + tl.arange(0, J * HP) // HP
    h = tl.arange(0, J * HP) % HP
    return jt, split, bt, lo, hi, c, j, h, (j < M) & (h < H)


@triton.jit
def votes(
    gate, mu_inp, W, bias, gate_stride, mu_stride, row, b, i, live, c, j, h, keep_q, keep,
    M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SHARED: tl.constexpr,
    S: tl.constexpr, CP: tl.constexpr, J: tl.constexpr, HP: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """V = mu_inp W + bias; pointers to mu_inp's rows, which of them to read, and to W's.

    A few columns at a time; a matrix product proper where d is as deep as one needs. A gate of 0 shuts out whatever is
    there. The bias comes last: a large one would cost every sum before it the digits that it cannot hold.
    """
    own = tl.cast(row, tl.int64) * (1 - SHARED)
    open_ = tl.load(gate + b * gate_stride + i, mask=live, other=0.0) != 0.0
    x_rows, keep_rows = mu_inp + b * mu_stride + i * (C * D) + c * D, live & open_ & (c < C)
    w_rows = W + own * (M * D * H) + j * (D * H) + h
    b_rows = (bias + own * (M * C * H) + c * H)[:, None] + (j * (C * H) + h)[None, :]
    V = tl.zeros([S * CP, J * HP], dtype=tl.float32)
    if DOT:
        for column in range(0, D, BLOCK_D):
            d = column + tl.arange(0, BLOCK_D)
            x = tl.load(x_rows[:, None] + d[None, :], mask=keep_rows[:, None] & (d < D)[None, :], other=0.0)
            w = tl.load(w_rows[None, :] + (d * H)[:, None], mask=keep_q[None, :] & (d < D)[:, None], other=0.0)
            V = dot(x, w.to(tl.float32), V, "ieee")
    else:
        for d in tl.static_range(D):
            x = tl.load(x_rows + d, mask=keep_rows, other=0.0)
            w = tl.load(w_rows + d * H, mask=keep_q, other=0.0).to(tl.float32)
            V += x[:, None] * w[None, :]
    return V + tl.load(b_rows, mask=keep, other=0.0).to(tl.float32), x_rows, keep_rows, w_rows


@triton.jit
def over_matrix(t, S: tl.constexpr, CP: tl.constexpr, J: tl.constexpr, HP: tl.constexpr):
    """[S, J], a tile summed over c and h."""
    return tl.sum(tl.sum(tl.reshape(t, [S, CP, J, HP]), 3), 1)


@triton.jit
def pairs_kernel(
    gate, mu_inp, W, bias,  # [batch, n], [batch, n, C, D], [n or 1, M, D, H], [n or 1, M, C, H]
    before_a, before, sig2,  # of the previous iteration: a [batch, M], mu and sig2 [batch, M, C, H]
    center, g1, g2, k,  # of this one's gradient: [batch, M, C, H] three times, [batch, M]
    logit, slope,  # out [batch, rows, M]
    gate_stride, mu_stride, first, last, rows, batch, per_split, splits,
    M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    SHARED: tl.constexpr, SCORED: tl.constexpr, GAUSSIAN: tl.constexpr, SLOPED: tl.constexpr,
    S: tl.constexpr, CP: tl.constexpr, J: tl.constexpr, HP: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What is per pair (i, j): l_ij if SCORED, and if SLOPED sum_ch e (g1 + g2 e) - k, the moments' part of dD_ij.

    grid (output tiles x splits of the inputs x batch tiles).
    """
    jt, _split, bt, lo, hi, c, j, h, keep_q = tile_of(first, last, per_split, splits, M, H, S, CP, J, HP)
    js = jt * J + tl.arange(0, J)

    # a program's samples stay, so what is per output is read once
    b, i, live = lanes(bt, lo, hi, batch, S, CP, SHARED)
    bs, i_s, live_s = pair_lanes(bt, lo, hi, batch, S, SHARED)
    keep = ((b < batch) & (c < C))[:, None] & keep_q[None, :]
    at = (b * (M * C * H) + c * H)[:, None] + (j * (C * H) + h)[None, :]
    keep_s = (bs < batch)[:, None] & (js < M)[None, :]
    at_s = (bs * M)[:, None] + js[None, :]
    if SCORED:
        mu = tl.load(before + at, mask=keep, other=0.0)
        half = keep.to(tl.float32)
        a = tl.load(before_a + at_s, mask=keep_s, other=0.0)
        log_prior = tl.minimum(a, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(a)))
        if GAUSSIAN:
            variance = tl.load(sig2 + at, mask=keep, other=1.0)
            log_prior -= 0.5 * over_matrix(tl.log(variance), S, CP, J, HP)
            half = 0.5 / variance
    if SLOPED:
        middle = tl.load(center + at, mask=keep, other=0.0)
        linear = tl.load(g1 + at, mask=keep, other=0.0)
        square = tl.load(g2 + at, mask=keep, other=0.0)
        constant = tl.load(k + at_s, mask=keep_s, other=0.0)

    STEP: tl.constexpr = S if SHARED else 1
    for row in range(lo, hi, STEP):
        b, i, live = lanes(bt, row, hi, batch, S, CP, SHARED)
        V, _x_rows, _keep_rows, _w_rows = votes(
            gate, mu_inp, W, bias, gate_stride, mu_stride, row, b, i, live, c, j, h, keep_q, keep,
            M, C, D, H, SHARED, S, CP, J, HP, BLOCK_D, DOT,
        )  # fmt: skip
        bs, i_s, live_s = pair_lanes(bt, row, hi, batch, S, SHARED)
        out = ((bs * rows + i_s - first) * M)[:, None] + js[None, :]
        keep_out = live_s[:, None] & (js < M)[None, :]
        if SCORED:
            off = V - mu
            tl.store(logit + out, log_prior - over_matrix(off * off * half, S, CP, J, HP), mask=keep_out)
        if SLOPED:
            e = V - middle
            tl.store(slope + out, over_matrix(e * (linear + square * e), S, CP, J, HP) - constant, mask=keep_out)


@triton.jit
def routing_weights(logit, open_, SCORED: tl.constexpr):
    """R: softmax over the open outputs of a row, all equal without logits; 0 where closed."""
    if SCORED:
        z = tl.where(open_, tl.load(logit, mask=open_, other=0.0), float("-inf"))
        top = tl.max(z, 1)[:, None]
        share = tl.where(open_, tl.exp(z - tl.where(top == float("-inf"), 0.0, top)), 0.0)
        total = tl.sum(share, 1)[:, None]
    else:
        share = tl.where(open_, 1.0, 0.0)
        total = tl.sum(share, 1)[:, None]
    return share / tl.where(total == 0.0, 1.0, total)


@triton.jit
def assign_kernel(
    gate, beta_use, beta_ign,  # [batch, n], [n or 1, M] twice
    mask, mask_stride_b, mask_stride_n, mask_stride_m,
    weight,  # [batch, rows, M]: logits come in (if SCORED), D goes out
    a_sums,  # out [slots, batch, M]: sums of beta_use D - beta_ign (f - D)
    gate_stride, a_stride, slot, first, last, rows, per_split, splits,
    BETA_ROW: tl.constexpr, M: tl.constexpr, SCORED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """D_ij, and what a_out sums; all outputs of a row together. grid (splits of the inputs x samples)."""
    b = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    lo = first + split * per_split
    hi = tl.minimum(lo + per_split, last)
    j = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for row in range(lo, hi, BLOCK_N):
        i = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        live = i < hi
        open_ = open_pairs(mask, b, i, j, live, mask_stride_b, mask_stride_n, mask_stride_m, M)
        at = weight + ((b * rows + i - first) * M)[:, None] + j[None, :]
        R = routing_weights(at, open_, SCORED)
        f = tl.load(gate + b * gate_stride + i, mask=live, other=0.0)[:, None]
        D = tl.where(open_ & (f != 0.0), f * R, 0.0)
        tl.store(at, D, mask=live[:, None] & (j < M)[None, :])
        beta = (i * BETA_ROW)[:, None] + j[None, :]
        use = tl.load(beta_use + beta, mask=open_, other=0.0).to(tl.float32)
        ign = tl.load(beta_ign + beta, mask=open_, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(open_, use * D - ign * (f - D), 0.0), 0)
    tl.store(a_sums + (slot + split).to(tl.int64) * a_stride + b * M + j, total, mask=j < M)


@triton.jit
def chan(N, mean, low, M2):
    """(weight, mean, what rounding took from the mean, M2) along axis 0 together, by Chan's formula."""
    total = tl.sum(N, 0)
    scale = tl.where(total > 1e-36, total, 1.0)
    some = N != 0.0
    rough = tl.sum(tl.where(some, N * mean, 0.0), 0) / scale
    apart = tl.where(some, mean - tl.expand_dims(rough, 0) + low, 0.0)
    shift = tl.sum(N * apart, 0) / scale
    apart = tl.where(some, apart - tl.expand_dims(shift, 0), 0.0)
    shift += tl.sum(N * apart, 0) / scale
    made = rough + shift
    return total, made, shift - (made - rough), tl.sum(M2 + N * apart * apart, 0)


@triton.jit
def moments_kernel(
    gate, mu_inp, W, bias,
    weight,  # [batch, rows, M], D
    N_part, mean_part, low_part, M2_part,  # out: [slots, B, M], [slots, B, M, C, H] three times
    gate_stride, mu_stride, N_stride, slot, first, last, rows, batch, per_split, splits,
    M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SHARED: tl.constexpr,
    S: tl.constexpr, CP: tl.constexpr, J: tl.constexpr, HP: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Weight, mean and centred second moment of the votes of a split of the inputs.

    Sums are of deviations from a centre, which moves to a vote that outweighs all before it, and to the mean after 4,
    16 and every 32 steps, so that little weight is ever far from it. grid as ``pairs_kernel``.
    """
    _jt, split, bt, lo, hi, c, j, h, keep_q = tile_of(first, last, per_split, splits, M, H, S, CP, J, HP)
    STEP: tl.constexpr = S if SHARED else 1

    N = tl.zeros([S * CP, J * HP], dtype=tl.float32)
    center = tl.zeros([S * CP, J * HP], dtype=tl.float32)
    first_sum = tl.zeros([S * CP, J * HP], dtype=tl.float32)
    second_sum = tl.zeros([S * CP, J * HP], dtype=tl.float32)
    for row in range(lo, hi, STEP):
        b, i, live = lanes(bt, row, hi, batch, S, CP, SHARED)
        keep = (live & (c < C))[:, None] & keep_q[None, :]
        V, _x_rows, _keep_rows, _w_rows = votes(
            gate, mu_inp, W, bias, gate_stride, mu_stride, row, b, i, live, c, j, h, keep_q, keep,
            M, C, D, H, SHARED, S, CP, J, HP, BLOCK_D, DOT,
        )  # fmt: skip
        share = tl.load(weight + ((b * rows + i - first) * M)[:, None] + j[None, :], mask=keep, other=0.0)
        ahead = share > N
        shift = tl.where(ahead, V - center, 0.0)
        second_sum -= shift * (2.0 * first_sum - shift * N)
        first_sum -= shift * N
        center = tl.where(ahead, V, center)
        off = tl.where(share != 0.0, V - center, 0.0)
        N += share
        first_sum += share * off
        second_sum += share * off * off
        count = (row - lo) // STEP + 1
        if count == 4 or count == 16 or count % 32 == 0:
            shift = tl.where(N > 1e-36, first_sum / tl.where(N > 1e-36, N, 1.0), 0.0)
            moved = center + shift
            shift = moved - center
            second_sum -= shift * (2.0 * first_sum - shift * N)
            first_sum -= shift * N
            center = moved
    shift = tl.where(N > 1e-36, first_sum / tl.where(N > 1e-36, N, 1.0), 0.0)
    mean = center + shift
    low = shift - (mean - center)
    M2 = second_sum - shift * first_sum
    M2 = tl.where(M2 < 0.0, 0.0, M2)

    b, i, live = lanes(bt, lo, hi, batch, S, CP, SHARED)
    own_slot = (slot + split).to(tl.int64) * N_stride
    if SHARED:  # the lanes are inputs of one sample: put them together
        N3 = tl.reshape(N, [S, CP, J * HP])
        mean3 = tl.reshape(mean, [S, CP, J * HP])
        low3 = tl.reshape(low, [S, CP, J * HP])
        total, mean_all, low_all, M2_all = chan(N3, mean3, low3, tl.reshape(M2, [S, CP, J * HP]))
        c1 = tl.arange(0, CP)
        keep1 = (c1 < C)[:, None] & keep_q[None, :]
        base = own_slot + tl.cast(bt, tl.int64) * M
        at = (base * (C * H) + c1 * H)[:, None] + (j * (C * H) + h)[None, :]
        tl.store(mean_part + at, mean_all, mask=keep1)
        tl.store(low_part + at, low_all, mask=keep1)
        tl.store(M2_part + at, M2_all, mask=keep1)
        at_N = base + (c1 * 0)[:, None] + j[None, :]
        tl.store(N_part + at_N, total, mask=keep1 & (c1 == 0)[:, None] & (h == 0)[None, :])
    else:
        keep1 = ((b < batch) & (c < C))[:, None] & keep_q[None, :]
        base = own_slot + b * M
        at = (base * (C * H) + c * H)[:, None] + (j * (C * H) + h)[None, :]
        tl.store(mean_part + at, mean, mask=keep1)
        tl.store(low_part + at, low, mask=keep1)
        tl.store(M2_part + at, M2, mask=keep1)
        tl.store(N_part + base[:, None] + j[None, :], N, mask=keep1 & (c == 0)[:, None] & (h == 0)[None, :])


@triton.jit
def settled(N, mean, M2, eps):
    """mu and sig2 of an output, as ``reference.matrix_step.settle``."""
    s = N + eps
    share = tl.div_rn(N, s)
    shift = mean * tl.div_rn(eps, s)
    return share * mean, tl.div_rn(M2, s) + share * (shift * shift) + eps


@triton.jit
def merge_kernel(
    N_part, mean_part, low_part, M2_part,  # [slots, outputs], [slots, outputs, CH] three times
    a_part,  # [a_slots, outputs]
    N, mean, low, M2, a,  # out, without slots
    a_out, mu_out, sig2_out, eps,  # out (if SETTLE): a again, mu and sig2
    outputs, slots, a_slots,
    SETTLE: tl.constexpr, CH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The splits put together, in their order: Chan's formula. grid (outputs x c x h of all samples)."""
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    width = tl.cast(outputs, tl.int64)
    keep = e < width * CH
    o = e // CH
    total = tl.zeros([BLOCK_E], dtype=tl.float32)
    center = tl.zeros([BLOCK_E], dtype=tl.float32)
    rest = tl.zeros([BLOCK_E], dtype=tl.float32)
    square = tl.zeros([BLOCK_E], dtype=tl.float32)
    a_total = tl.zeros([BLOCK_E], dtype=tl.float32)
    for slot in range(0, slots, BLOCK_S):
        s = (slot + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = (s < slots)[:, None] & keep[None, :]
        w = tl.load(N_part + (s * width)[:, None] + o[None, :], mask=inside, other=0.0)
        at = (s * width * CH)[:, None] + e[None, :]
        some = inside & (w != 0.0)
        m = tl.load(mean_part + at, mask=some, other=0.0)
        r = tl.load(low_part + at, mask=some, other=0.0)
        q = tl.load(M2_part + at, mask=some, other=0.0)
        here, here_mean, here_rest, here_square = chan(w, m, r, q)
        both = total + here
        ratio = here / tl.where(both > 1e-36, both, 1.0)
        step = tl.where(here != 0.0, here_mean - center + (here_rest - rest), 0.0)
        square += here_square + step * step * total * ratio
        rest += step * ratio
        moved = center + rest
        rest = tl.where(total == 0.0, here_rest, rest - (moved - center))
        center = tl.where(total == 0.0, here_mean, moved)
        total = both
    for slot in range(0, a_slots, BLOCK_S):
        s = (slot + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = (s < a_slots)[:, None] & keep[None, :]
        a_total += tl.sum(tl.load(a_part + (s * width)[:, None] + o[None, :], mask=inside, other=0.0), 0)
    tl.store(mean + e, center, mask=keep)
    tl.store(low + e, rest, mask=keep)
    tl.store(M2 + e, square, mask=keep)
    per_output = keep & (e % CH == 0)
    tl.store(N + o, total, mask=per_output)
    tl.store(a + o, a_total, mask=per_output)
    if SETTLE:
        mu, sig2 = settled(total, center, square, eps)
        tl.store(mu_out + e, mu, mask=keep)
        tl.store(sig2_out + e, sig2, mask=keep)
        tl.store(a_out + o, a_total, mask=per_output)
