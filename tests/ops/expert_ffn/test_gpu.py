"""``expert_ffn`` on a GPU, both designs: real sizes, graph capture, no synchronisation, over 2**31 elements.

Axes: B samples, k experts that each takes, K experts, D features in, H hidden ones, P features out.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastroute import use_backend
from fastroute.functional import expert_ffn
from fastroute.ops import dispatch
from fastroute.ops.activations import ACTIVATIONS
from tests.helpers import seeds
from tests.helpers.budget import assert_within_budget
from tests.ops.grouped_linear.test_gpu import KINDS, tf32

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def after() -> Iterator[None]:
    """Keep a failed capture from reaching the next test."""
    yield
    torch.cuda.set_sync_debug_mode("default")
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(params=[True, False], ids=["fused", "apart"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastroute.kernels import expert_ffn as kernels

    monkeypatch.setattr(kernels, "force_fused", request.param)


class Problem(NamedTuple):
    actions: Tensor
    x: Tensor
    weights: Tensor
    w_in: Tensor
    w_out: Tensor
    dy: Tensor


class Size(NamedTuple):
    B: int
    k: int
    K: int
    D: int
    H: int
    P: int


def problem(size: Size, dtype: torch.dtype = F32, *, gated: bool = True, seed: int = 0) -> Problem:
    """A tenth of the entries is dropped, one expert has a fifth of all, hidden numbers are of order one."""
    B, k, K, D, H, P = size
    generator = seeds.generator(seed, "cuda")

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)

    actions = torch.randint(K, (B, k), generator=generator, device="cuda")
    chance = torch.rand(B, k, generator=generator, device="cuda")
    actions = torch.where(chance < 0.1, -1, torch.where(chance < 0.3, K // 2, actions))
    weights = torch.rand(B, k, generator=generator, device="cuda") / k
    rows = (2 if gated else 1) * H
    return Problem(actions, normal(B, D), weights, normal(K, rows, D, scale=D**-0.5), normal(K, P, H, scale=H**-0.5),
                   normal(B, P))  # fmt: skip


def run(p: Problem, **options: Any) -> dict[str, Tensor]:
    """y and every gradient."""
    leaves = [t.detach().requires_grad_() for t in p[1:5]]
    x, *parameters = leaves
    with use_backend("triton"):
        y = expert_ffn(x, dispatch.plan(p.actions, len(p.w_in)), *parameters, **options)
        made = torch.autograd.grad(y, leaves, p.dy)
    return {"y": y.detach()} | dict(zip(("dx", "dweights", "dw_in", "dw_out"), made, strict=True))


def defined(p: Problem, activation: str, gated: bool) -> dict[str, Tensor]:
    """Expert by expert, each on the entries that take it, with PyTorch's own autograd."""
    leaves = [t.detach().requires_grad_() for t in p[1:5]]
    x, weights, w_in, w_out = leaves
    k, flat = p.actions.shape[1], p.actions.reshape(-1)
    y = torch.zeros_like(p.dy)
    for e in range(len(w_in)):
        entries = (flat == e).nonzero()[:, 0]
        u = x[entries // k] @ w_in[e].mT
        h = ACTIVATIONS[activation](u[:, : w_out.shape[2]])
        h = h * u[:, w_out.shape[2] :] if gated else h
        y = y.index_add(0, entries // k, weights.reshape(-1)[entries, None] * (h @ w_out[e].mT))
    made = torch.autograd.grad(y, leaves, p.dy)
    return {"y": y.detach()} | dict(zip(("dx", "dweights", "dw_in", "dw_out"), made, strict=True))


def check(p: Problem, activation: str = "silu", gated: bool = True) -> None:
    dtype = p.x.dtype
    exact = Problem(p.actions, *(t.to(torch.float64) for t in p[1:]))
    found = run(p, activation=activation, gated=gated)
    assert_within_budget(found, lambda: defined(exact, activation, gated), dtype, stored=dtype)


@pytest.mark.parametrize("dtype, precision", KINDS, ids=["ieee", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "size", [Size(100, 2, 5, 64, 48, 64), Size(1500, 1, 4, 1024, 512, 256), Size(3000, 4, 32, 256, 130, 77)], ids=str
)
def test_real_sizes(size: Size, dtype: torch.dtype, precision: str, fused: None) -> None:
    with tf32(precision == "tf32"):
        check(problem(size, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_activations(activation: str, gated: bool, dtype: torch.dtype) -> None:
    check(problem(Size(2000, 2, 8, 128, 384, 64), dtype, gated=gated), activation, gated)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_same_input_same_bits(dtype: torch.dtype) -> None:
    """Fifty times."""
    p = problem(Size(4000, 4, 16, 512, 256, 512), dtype)
    once = run(p)
    for _ in range(50):
        again = run(p)
        assert all(torch.equal(t, again[name]) for name, t in once.items())


def test_dropped_entries_may_be_anything() -> None:
    p = problem(Size(2000, 4, 16, 256, 128, 256), BF16)
    expected = run(p)
    p.weights.masked_fill_(p.actions < 0, torch.nan)
    found = run(p)
    assert all(torch.equal(t, found[name]) for name, t in expected.items())


def test_captures_in_a_graph_without_synchronising(fused: None) -> None:
    """Plan, forward and backward replay on new values to the bits of a plain call."""
    size = Size(4000, 4, 16, 512, 256, 512)
    p, other = problem(size, BF16), problem(size, BF16, seed=1)
    expected = run(other)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    run(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(p)
    torch.cuda.set_sync_debug_mode("default")
    for t, new in zip(p, other, strict=True):
        t.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_more_than_2_31_elements() -> None:
    """u and h pass 2**31 elements; the last rows are right."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB")
    size = Size(1_100_000, 2, 3, 64, 1024, 64)
    p = problem(size, BF16)._replace(actions=torch.arange(2_200_000, device="cuda").view(-1, 2) * 3 // 2_200_000)
    found = run(p)
    last = slice(size.B - 200, size.B)
    part = Problem(*(t[last] for t in p[:3]), p.w_in, p.w_out, p.dy[last])
    exact = Problem(part.actions, *(t.to(torch.float64) for t in part[1:]))

    def truth() -> dict[str, Tensor]:
        made = defined(exact, "silu", True)
        return {name: made[name] for name in ("y", "dx", "dweights")}

    assert_within_budget({k: found[k][last] for k in ("y", "dx", "dweights")}, truth, BF16, stored=BF16)
    assert all(t.isfinite().all() for t in found.values())


def test_the_hidden_layer_takes_little_memory() -> None:
    """Forward makes h, a row for each entry and its sum: neither u, nor anything in float32."""
    size = Size(32_768, 8, 128, 2048, 768, 2048)
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB")
    p = problem(size, BF16)
    with use_backend("triton"), torch.no_grad():
        plan = dispatch.plan(p.actions, size.K)
        expert_ffn(p.x, plan, *p[2:5])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        expert_ffn(p.x, plan, *p[2:5])
        entries = size.B * size.k
        whole = 2 * (entries * (size.H + size.P) + size.B * size.P)
        assert torch.cuda.max_memory_allocated() - before < whole + (32 << 20)
