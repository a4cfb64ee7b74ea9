"""``policy`` as Triton kernels: a choice per row of scores, and what other kernels need of that.

Axes: n rows of a tile, k choices. A row's scores lie in registers, which bounds the number of choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import _INTERPRETED, cdiv, power_of_2

SHIFT = tl.constexpr(1e-6)  # of fastroute.ops.policy.reference.shifted, and the epsilon of clamped
CLAMP = tl.constexpr(1.1920928955078125e-07)
SOFTMAX = tl.constexpr(0)  # indices into KINDS
SCORE = tl.constexpr(1)
SHIFTED = tl.constexpr(2)


@triton.jit
def rounded(v, TYPE: tl.constexpr):
    """float32 to the nearest number of a type."""
    if _INTERPRETED and tl.bfloat16 == TYPE:  # it would cut off the last bits
        bits = v.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v.to(TYPE)


@triton.jit
def first_extreme(v, k, real, LARGEST: tl.constexpr):
    """[n]: where the first largest (smallest) of a row is, or its first NaN."""
    wrong = v != v
    if LARGEST:
        clean = tl.where(wrong | ~real, -float("inf"), v)
        best = tl.max(clean, 1)
    else:
        clean = tl.where(wrong | ~real, float("inf"), v)
        best = tl.min(clean, 1)
    far = 1 << 30
    nan_at = tl.min(tl.where(wrong & real, k[None, :], far), 1)
    at = tl.min(tl.where((clean == best[:, None]) & real, k[None, :], far), 1)
    return tl.where(nan_at < far, nan_at, at)


@triton.jit
def entry(v, k, at):
    """[n]: v at one choice of each row, zero where there is no such choice; what is elsewhere does not matter."""
    return tl.sum(tl.where(k[None, :] == at[:, None], v, 0.0), 1)


@triton.jit
def weights_of(z, k, real, temperature, KIND: tl.constexpr):
    """([n, k] probabilities up to their sum, the sum, what was subtracted from z, where that was)."""
    if KIND == SHIFTED:
        least_at = first_extreme(z, k, real, False)
        extreme = entry(z, k, least_at)
        weight = tl.where(real, z - extreme[:, None] + SHIFT, 0.0)
    else:
        least_at = tl.zeros([z.shape[0]], tl.int32)
        z = tl.where(real, tl.math.div_rn(z, temperature + tl.zeros_like(z)), -float("inf"))
        extreme = tl.max(z, 1)
        weight = tl.where(real, tl.exp(z - extreme[:, None]), 0.0)
    return weight, tl.sum(weight, 1), extreme, least_at


@triton.jit
def decide(
    z, k, real, b, live, K, uniform, uniform_row, coin, forced, temperature, exploration,
    KIND: tl.constexpr,
):  # fmt: skip
    """(actions, value, greedy), [n] each."""
    greedy = first_extreme(z, k, real, True)
    weight, total, top, _ = weights_of(z, k, real, temperature, KIND)
    action = greedy.to(tl.int64)
    if forced is not None:
        action = tl.load(forced + b, mask=live, other=0)
    elif uniform is not None:
        u = tl.load(uniform + b[:, None] * uniform_row + k[None, :], mask=live[:, None] & real, other=0.5)
        exponential = -tl.log(u)
        if KIND == SOFTMAX:
            race = tl.math.div_rn(z, temperature + tl.zeros_like(z)) - tl.log(exponential)
        elif KIND == SCORE:
            race = u
        else:
            race = tl.math.div_rn(weight, exponential)
        drawn = first_extreme(race, k, real, True)
        if coin is not None:
            drawn = tl.where(tl.load(coin + b, mask=live, other=0.0) < exploration, drawn, greedy)
        action = drawn.to(tl.int64)
    if KIND == SOFTMAX:
        value = entry(tl.math.div_rn(z, temperature + tl.zeros_like(z)), k, action) - top - tl.log(total)
    elif KIND == SCORE:
        value = entry(z, k, action)
    else:
        p = tl.math.div_rn(entry(weight, k, action), total)
        p = tl.where(p < CLAMP, CLAMP, tl.where(p > 1 - CLAMP, 1 - CLAMP, p))
        value = tl.log(p)
    return action, tl.where((action >= 0) & (action < K), value, 0.0), greedy


@triton.jit
def score_gradient(z, k, real, action, grad, temperature, K, KIND: tl.constexpr):
    """[n, k]: of the scores, from that of the value; zero where the action is none."""
    g = tl.where((action >= 0) & (action < K), grad, 0.0)
    taken = (k[None, :] == action[:, None]).to(tl.float32)
    if KIND == SCORE:
        made = taken * g[:, None]
    else:
        weight, total, _, least_at = weights_of(z, k, real, temperature, KIND)
        if KIND == SOFTMAX:
            p = tl.math.div_rn(weight, total[:, None] + tl.zeros_like(weight))
            made = (taken - p) * tl.math.div_rn(g, temperature + tl.zeros_like(g))[:, None]
        else:
            own = entry(weight, k, action)
            share = tl.math.div_rn(own, total)
            g = tl.where((share >= CLAMP) & (share <= 1 - CLAMP), g, 0.0)
            each = tl.math.div_rn(g, total)
            # the lowest score is taken from every weight: from its own, nothing is left
            of_own = tl.where((action == least_at) | (g == 0), 0.0, tl.math.div_rn(g, tl.where(g == 0, 1.0, own)))
            least = (k[None, :] == least_at[:, None]).to(tl.float32)
            made = taken * of_own[:, None] - each[:, None] + least * (K * each - of_own)[:, None]
    return tl.where(real & ((action >= 0) & (action < K))[:, None], made, 0.0)


@triton.jit
def forward_kernel(
    scores, uniform, coin, forced, actions, value, greedy,
    rows, scores_row, uniform_row, temperature, exploration,
    K: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grid (row tiles): ``policy``, of scores that are already there."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    live, real = b < rows, (k < K)[None, :]
    z = tl.load(scores + b[:, None] * scores_row + k[None, :], mask=live[:, None] & real, other=0.0).to(tl.float32)
    a, v, best = decide(
        z, k, real, b, live, K, uniform, uniform_row, coin, forced, temperature, exploration, KIND
    )  # fmt: skip
    tl.store(actions + b, a, mask=live)
    tl.store(value + b, v, mask=live)
    tl.store(greedy + b, best.to(tl.int64), mask=live)


@triton.jit
def backward_kernel(
    grad, scores, actions, out, rows, scores_row, temperature,
    K: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grid (row tiles)."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    live, real = b < rows, (k < K)[None, :]
    keep = live[:, None] & real
    z = tl.load(scores + b[:, None] * scores_row + k[None, :], mask=keep, other=0.0).to(tl.float32)
    a, g = tl.load(actions + b, mask=live, other=-1), tl.load(grad + b, mask=live, other=0.0)
    made = score_gradient(z, k, real, a, g, temperature, K, KIND)
    tl.store(out + b[:, None] * K + k[None, :], made, mask=keep)


_NUMBERS = 2048  #: of a tile of scores


def row_block(choices: int, rows: int) -> int:
    """Rows of a tile."""
    return max(16, min(_NUMBERS // power_of_2(choices), 64, power_of_2(rows)))


def forward(
    scores: Tensor, uniform: Tensor | None, coin: Tensor | None, forced: Tensor | None, kind: int, temperature: float,
    exploration: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(actions, value, greedy) of dense scores [N, K]; ``kind`` is an index into KINDS."""
    N, K = scores.shape
    actions = scores.new_empty(N, dtype=torch.int64)
    value, greedy = scores.new_empty(N, dtype=torch.float32), torch.empty_like(actions)
    uniform, coin, forced = (None if t is None else t.contiguous() for t in (uniform, coin, forced))
    block = row_block(K, N)
    if N:
        launch.launch(
            forward_kernel, (cdiv(N, block),),
            scores, uniform, coin, forced, actions, value, greedy,
            N, scores.stride(0), 0 if uniform is None else uniform.stride(0), temperature, exploration,
            K=K, KIND=kind, BLOCK_N=block, BLOCK_K=power_of_2(K), warps=4, stages=1,
        )  # fmt: skip
    return actions, value, greedy


def backward(grad: Tensor, scores: Tensor, actions: Tensor, kind: int, temperature: float) -> Tensor:
    """The gradient of scores [N, K] from that of the value."""
    N, K = scores.shape
    made = scores.new_empty(N, K)
    block = row_block(K, N)
    if N:
        launch.launch(
            backward_kernel, (cdiv(N, block),),
            grad, scores, actions, made, N, scores.stride(0), temperature,
            K=K, KIND=kind, BLOCK_N=block, BLOCK_K=power_of_2(K), warps=4, stages=1,
        )  # fmt: skip
    return made
