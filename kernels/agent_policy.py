"""``agent_policy`` as Triton kernels: the layer of every row's agent, then ``policy``, beside it the critic.

Axes: n rows of a tile, k choices, c outputs of the critic, f features. Rows of one agent make up tiles of their own,
found from the offsets by every program itself, so that nothing waits for the host: the grid is a bound, programs past
the last tile leave. Layers of all agents come in one tensor of each kind.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import cdiv, dot, multiprocessors, power_of_2
from .policy import decide, entry, rounded, row_block, score_gradient, weights_of


@triton.jit
def tile_of(offsets, order, rows, tile, A: tl.constexpr, A_PAD: tl.constexpr, BLOCK_N: tl.constexpr):
    """(agent, rows [n] of a tile, sorted places [n], which of them there are); agent A: what the plan drops.

    Every agent's rows begin a tile. Past the last tile there is no row.
    """
    if offsets is None:
        agent = tile * 0
        place = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        live = place < rows
        b = place
    else:
        a = tl.arange(0, A_PAD)
        start = tl.load(offsets + a, mask=a <= A, other=0)
        stop = tl.load(offsets + a + 1, mask=a < A, other=0)
        stop = tl.where(a == A, rows, stop)
        tiles = tl.where(a <= A, (stop - start + BLOCK_N - 1) // BLOCK_N, 0)
        ends = tl.cumsum(tiles, 0)
        agent = tl.sum((ends <= tile).to(tl.int32), 0)
        mine = a == agent
        first = tl.sum(tl.where(mine, start + (tile - (ends - tiles)) * BLOCK_N, 0), 0)
        last = tl.sum(tl.where(mine, stop, 0), 0)
        place = first + tl.arange(0, BLOCK_N)
        live = place < last
        b = tl.load(order + place, mask=live, other=0)
    return agent, b, place, live


@triton.jit
def layer(acc, x, x_row, b, live, weight, bias, agent, k, real, F: tl.constexpr, K: tl.constexpr,
          BLOCK_F: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """[n, k]: x W^T + b of one agent, or its table's row."""
    a = agent.to(tl.int64)
    if weight is not None:
        for start in range(0, F, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            x_tile = tl.load(x + b[:, None] * x_row + f[None, :], mask=live[:, None] & (f < F)[None, :], other=0.0)
            w_tile = tl.load(
                weight + a * (K * F) + k[None, :] * F + f[:, None], mask=real & (f < F)[:, None], other=0.0
            )
            acc = dot(x_tile, w_tile, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + a * K + k[None, :], mask=real, other=0.0).to(tl.float32)
    return acc


@triton.jit
def agent_forward_kernel(
    x, order, offsets, weight, bias, critic_weight, critic_bias, uniform, coin, forced,
    actions, value, greedy, scores, critic, critic_at, mean,
    rows, x_row, uniform_row, temperature, exploration,
    A: tl.constexpr, A_PAD: tl.constexpr, F: tl.constexpr, K: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """grid (a bound on the row tiles): everything of ``agent_policy``'s forward pass."""
    agent, b, _, live = tile_of(offsets, order, rows, tl.program_id(0), A, A_PAD, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    real = (k < K)[None, :]
    keep = live[:, None] & real
    if agent > A:
        return
    has = agent < A
    known = tl.minimum(agent, A - 1)
    z = layer(tl.zeros([BLOCK_N, BLOCK_K], tl.float32), x, x_row, b, live, weight, bias, known, k, real, F, K, BLOCK_F,
              PRECISION)  # fmt: skip
    z = rounded(tl.where(has, z, 0.0), scores.dtype.element_ty)
    tl.store(scores + b[:, None] * K + k[None, :], z, mask=keep)
    z = z.to(tl.float32)
    a, v, best = decide(
        z, k, real, b, live, K, uniform, uniform_row, coin, forced, temperature, exploration, KIND
    )  # fmt: skip
    if forced is None:
        a = tl.where(has, a, 0)
    tl.store(actions + b, a, mask=live)
    tl.store(value + b, tl.where(has, v, 0.0), mask=live)
    tl.store(greedy + b, best.to(tl.int64), mask=live)
    if critic is not None:
        c = tl.arange(0, BLOCK_C)
        q = layer(tl.zeros([BLOCK_N, BLOCK_C], tl.float32), x, x_row, b, live, critic_weight, critic_bias, known, c,
                  (c < C)[None, :], F, C, BLOCK_F, PRECISION)  # fmt: skip
        q = rounded(tl.where(has, q, 0.0), critic.dtype.element_ty)
        tl.store(critic + b[:, None] * C + c[None, :], q, mask=live[:, None] & (c < C)[None, :])
        q = q.to(tl.float32)
        at = a
        if C == 1:
            at = a * 0
        tl.store(critic_at + b, entry(q, c, at), mask=live)
        if mean is not None:  # then C is K
            weight_k, total, _, _ = weights_of(z, k, real, temperature, KIND)
            tl.store(mean + b, tl.math.div_rn(tl.sum(weight_k * q, 1), total), mask=live)


@triton.jit
def gradients_of(
    grad_value, grad_scores, scores, actions, b, live, temperature,
    K: tl.constexpr, KIND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[n, k]: of the scores of some rows, from all that comes to them."""
    k = tl.arange(0, BLOCK_K)
    real = (k < K)[None, :]
    keep = live[:, None] & real
    made = tl.zeros([b.shape[0], BLOCK_K], tl.float32)
    at = b[:, None] * K + k[None, :]
    if grad_value is not None:
        z = tl.load(scores + at, mask=keep, other=0.0).to(tl.float32)
        a, g = tl.load(actions + b, mask=live, other=-1), tl.load(grad_value + b, mask=live, other=0.0)
        made = tl.where(keep, score_gradient(z, k, real, a, g, temperature, K, KIND), 0.0)
    if grad_scores is not None:
        made += tl.load(grad_scores + at, mask=keep, other=0.0).to(tl.float32)
    return made


@triton.jit
def critic_gradients_of(
    grad_critic, grad_critic_at, actions, b, live,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[n, c]: of the critic's outputs of some rows."""
    c = tl.arange(0, BLOCK_C)
    made = tl.zeros([b.shape[0], BLOCK_C], tl.float32)
    if grad_critic is not None:
        keep = live[:, None] & (c < C)[None, :]
        made += tl.load(grad_critic + b[:, None] * C + c[None, :], mask=keep, other=0.0).to(tl.float32)
    if grad_critic_at is not None:
        at = tl.load(actions + b, mask=live, other=-1)
        if C == 1:
            at = tl.where(live, 0, -1).to(tl.int64)
        made += tl.where(c[None, :] == at[:, None], tl.load(grad_critic_at + b, mask=live, other=0.0)[:, None], 0.0)
    return made


@triton.jit
def transposed_product(acc, g, x_tile, PRECISION: tl.constexpr):
    """acc + g^T x: [k, f]."""
    return dot(tl.trans(rounded(g, x_tile.dtype)), x_tile, acc, PRECISION)


@triton.jit
def agent_parameters_kernel(
    grad_value, grad_scores, grad_critic, grad_critic_at, scores, actions, x, order, offsets,
    dw, db, critic_dw, critic_db,
    rows, x_row, temperature, splits,
    A: tl.constexpr, F: tl.constexpr, K: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    HAS_POLICY: tl.constexpr, HAS_CRITIC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """grid (agents * column tiles, splits): gradients [splits, A, ...] of layers and biases, always summed alike."""
    column_tiles: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F if F > 0 else 1
    agent = tl.program_id(0) // column_tiles
    column = tl.program_id(0) % column_tiles
    split = tl.program_id(1)
    if offsets is None:
        begin, end = tl.cast(0, tl.int64), tl.cast(rows, tl.int64)
    else:
        begin, end = tl.load(offsets + agent), tl.load(offsets + agent + 1)
    share = ((end - begin + BLOCK_N - 1) // BLOCK_N + splits - 1) // splits * BLOCK_N
    begin = begin + split * share
    end = tl.minimum(begin + share, end)
    f = column * BLOCK_F + tl.arange(0, BLOCK_F)
    k, c = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    w_acc, w_sum = tl.zeros([BLOCK_K, BLOCK_F], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    q_acc, q_sum = tl.zeros([BLOCK_C, BLOCK_F], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        live = place < end
        b = place
        if order is not None:
            b = tl.load(order + place, mask=live, other=0)
        if F > 0:
            x_tile = tl.load(x + b[:, None] * x_row + f[None, :], mask=live[:, None] & (f < F)[None, :], other=0.0)
        if HAS_POLICY:
            g = gradients_of(grad_value, grad_scores, scores, actions, b, live, temperature, K, KIND, BLOCK_K)
            w_sum += tl.sum(g, 0)
            if dw is not None:
                w_acc = transposed_product(w_acc, g, x_tile, PRECISION)
        if HAS_CRITIC:
            h = critic_gradients_of(grad_critic, grad_critic_at, actions, b, live, C, BLOCK_C)
            q_sum += tl.sum(h, 0)
            if critic_dw is not None:
                q_acc = transposed_product(q_acc, h, x_tile, PRECISION)
    place = (split * A + agent).to(tl.int64)
    if dw is not None:
        tl.store(dw + place * (K * F) + k[:, None] * F + f[None, :], w_acc, mask=(k < K)[:, None] & (f < F)[None, :])
    if critic_dw is not None:
        tl.store(
            critic_dw + place * (C * F) + c[:, None] * F + f[None, :], q_acc, mask=(c < C)[:, None] & (f < F)[None, :]
        )
    if column == 0:
        if db is not None:
            tl.store(db + place * K + k, w_sum, mask=k < K)
        if critic_db is not None:
            tl.store(critic_db + place * C + c, q_sum, mask=c < C)


@triton.jit
def agent_input_kernel(
    grad_value, grad_scores, grad_critic, grad_critic_at, scores, actions, order, offsets, weight, critic_weight, dx,
    rows, temperature,
    A: tl.constexpr, A_PAD: tl.constexpr, F: tl.constexpr, K: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    HAS_POLICY: tl.constexpr, HAS_CRITIC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """grid (a bound on the row tiles): the gradient of x, zeros in rows that the plan drops."""
    agent, b, place, live = tile_of(offsets, order, rows, tl.program_id(0), A, A_PAD, BLOCK_N)
    if agent > A:
        return
    keep_agent = live & (place < tl.where(agent < A, rows, 0))  # the mask of a scalar that the interpreter takes
    known = tl.minimum(agent, A - 1).to(tl.int64)
    k, c = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    if HAS_POLICY:
        g = gradients_of(grad_value, grad_scores, scores, actions, b, keep_agent, temperature, K, KIND, BLOCK_K)
    if HAS_CRITIC:
        h = critic_gradients_of(grad_critic, grad_critic_at, actions, b, keep_agent, C, BLOCK_C)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        acc = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
        if HAS_POLICY:
            w_tile = tl.load(
                weight + known * (K * F) + k[:, None] * F + f[None, :],
                mask=(k < K)[:, None] & (f < F)[None, :],
                other=0.0,
            )
            acc = dot(rounded(g, w_tile.dtype), w_tile, acc, PRECISION)
        if HAS_CRITIC:
            w_tile = tl.load(
                critic_weight + known * (C * F) + c[:, None] * F + f[None, :],
                mask=(c < C)[:, None] & (f < F)[None, :], other=0.0,
            )  # fmt: skip
            acc = dot(rounded(h, w_tile.dtype), w_tile, acc, PRECISION)
        acc = tl.where(keep_agent[:, None], acc, 0.0)  # what is not a number in some agent's layer stays out
        tl.store(dx + b[:, None] * F + f[None, :], acc, mask=live[:, None] & (f < F)[None, :])


_PARTIAL = 1 << 24  #: numbers of partial sums over rows


class _Sizes:
    """What launches of one call share."""

    def __init__(
        self, scores: Tensor, x: Tensor | None, offsets: Tensor | None, agents: int, width: int, precision: str
    ) -> None:  # fmt: skip
        self.N, self.K = scores.shape
        self.F = 0 if x is None else x.shape[1]
        self.A, self.C = agents, width
        widest = max(self.K, width)
        self.block = row_block(widest, cdiv(self.N, agents))
        self.tiles = cdiv(self.N, self.block) + (0 if offsets is None else agents + 1)
        on_tensor_cores = scores.dtype != torch.float32 or precision != "ieee"
        self.columns = min(power_of_2(max(self.F, 1)), 64 if on_tensor_cores and widest <= 64 else 32)
        #: rows that gradients of parameters add at a time: without tensor cores a product is unrolled over them
        self.depth = self.block if on_tensor_cores else 16
        self.warps = 4 if widest <= 64 else 8
        self.constants: dict[str, Any] = {
            "A": agents, "F": self.F, "K": self.K, "C": width, "BLOCK_N": self.block, "BLOCK_K": power_of_2(self.K),
            "BLOCK_C": power_of_2(max(width, 1)), "BLOCK_F": self.columns,
        }  # fmt: skip


def forward(
    x: Tensor | None, order: Tensor | None, offsets: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    critic_weight: Tensor | None, critic_bias: Tensor | None, uniform: Tensor | None, coin: Tensor | None,
    forced: Tensor | None, kind: int, temperature: float, exploration: float, expected: bool, precision: str,
) -> list[Tensor]:  # fmt: skip
    """The fields of an AgentChoice that there are. Weights [A, K, F] and biases [A, K], dense; ``kind`` as in KINDS."""
    first, critic_first = (w if w is not None else b for w, b in ((weight, bias), (critic_weight, critic_bias)))
    rows = order if order is not None else x
    if first is None or rows is None:
        raise ValueError("agent_policy: expected a layer and rows for it")
    N, A, K = rows.shape[0], first.shape[0], first.shape[1]
    C = 0 if critic_first is None else critic_first.shape[1]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return first.new_empty(shape, dtype=dtype)

    actions, greedy = (empty(N, dtype=torch.int64) for _ in range(2))
    made = [actions, empty(N), greedy, empty(N, K, dtype=first.dtype)]
    if critic_first is not None:
        made += [empty(N, C, dtype=first.dtype), empty(N)]
    if expected:
        made.append(empty(N))
    outputs = made + [None] * (7 - len(made))  # type: ignore[operator]
    uniform, coin, forced = (None if t is None else t.contiguous() for t in (uniform, coin, forced))
    given = x if weight is not None or critic_weight is not None else None
    sizes = _Sizes(made[3], given, offsets, A, C, precision)
    if N:
        launch.launch(
            agent_forward_kernel, (sizes.tiles,),
            given, order, offsets, weight, bias, critic_weight, critic_bias, uniform, coin, forced, *outputs,
            N, 0 if given is None else given.stride(0), 0 if uniform is None else uniform.stride(0), temperature,
            exploration,
            A_PAD=power_of_2(A + 1), KIND=kind, PRECISION=precision, warps=sizes.warps, stages=2, **sizes.constants,
        )  # fmt: skip
    return made


def backward(
    grad_value: Tensor | None, grad_scores: Tensor | None, grad_critic: Tensor | None, grad_critic_at: Tensor | None,
    scores: Tensor, actions: Tensor, x: Tensor | None, order: Tensor | None, offsets: Tensor | None,
    weight: Tensor | None, critic_weight: Tensor | None, agents: int, critic_width: int, kind: int, temperature: float,
    want_x: bool, wants: tuple[bool, bool, bool, bool], precision: str,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """The gradient of x, and those of weights, biases and the critic's two, [A, ...] each, as wanted."""
    of_policy = grad_value is not None or grad_scores is not None
    of_critic = grad_critic is not None or grad_critic_at is not None
    given = x if weight is not None or critic_weight is not None else None
    sizes = _Sizes(scores, given, offsets, agents, critic_width, precision)
    A, N = agents, sizes.N
    flows = (of_policy and weight is not None, of_policy, of_critic and critic_weight is not None, of_critic)
    shapes = ((sizes.K, sizes.F), (sizes.K,), (critic_width, sizes.F), (critic_width,))
    wanted = [want and flow for want, flow in zip(wants, flows, strict=True)]
    grads = (grad_value, grad_scores, grad_critic, grad_critic_at)
    common = {"KIND": kind, "HAS_POLICY": of_policy, "HAS_CRITIC": of_critic, "PRECISION": precision, **sizes.constants}
    x_row = 0 if given is None else given.stride(0)
    made: list[Tensor | None] = [None] * 4
    if any(wanted):
        programs = A * cdiv(max(sizes.F, 1), sizes.columns)
        most = max(1, min(cdiv(N, 4 * sizes.block), _PARTIAL // (A * max(sizes.K, critic_width) * max(sizes.F, 1))))
        splits = min(most, cdiv(2 * multiprocessors(scores.device), programs))
        dtype = scores.dtype if splits == 1 else torch.float32
        parts = [
            scores.new_empty((splits, A, *shape), dtype=dtype) if want else None
            for want, shape in zip(wanted, shapes, strict=True)
        ]
        launch.launch(
            agent_parameters_kernel, (programs, splits),
            *grads, scores, actions, given, order, offsets, *parts, N, x_row, temperature, splits,
            warps=sizes.warps, stages=2, **(common | {"BLOCK_N": sizes.depth}),
        )  # fmt: skip
        made = [None if p is None else p[0] if splits == 1 else p.sum(0).to(scores.dtype) for p in parts]
    if not (want_x and given is not None and (flows[0] or flows[2])):
        return None, made
    dx = scores.new_empty(N, sizes.F)
    if N:
        common |= {"HAS_POLICY": flows[0], "HAS_CRITIC": flows[2]}
        launch.launch(
            agent_input_kernel, (sizes.tiles,),
            *grads, scores, actions, order, offsets, weight, critic_weight, dx, N, temperature,
            A_PAD=power_of_2(A + 1), warps=sizes.warps, stages=2, **common,
        )  # fmt: skip
    return dx, made
