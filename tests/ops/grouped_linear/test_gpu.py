"""``dispatch`` and ``grouped_linear`` on a GPU: real sizes, graph capture, no synchronisation, over 2**31 elements.

Axes: B samples, N (n) entries, K modules, F (f) features in, O (o) features out.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastroute import use_backend
from fastroute.functional import grouped_linear
from fastroute.ops import activations, dispatch
from fastroute.ops.backends import missing
from fastroute.ops.dispatch import reference as reference_dispatch
from fastroute.ops.grouped_linear import reference as reference
from tests.helpers import seeds
from tests.helpers.budget import assert_within_budget

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Keep a failed capture or a precision from reaching the next test."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.cuda.set_sync_debug_mode("default")
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = on
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


class Problem(NamedTuple):
    """K modules, actions, what they get, and what comes back from the loss."""

    actions: Tensor
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    dy: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.actions, self.x, *self.weights, *self.biases, self.dy]

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(self.actions, *(
            [t.detach().to(dtype) for t in part] if isinstance(part, list) else part.detach().to(dtype)
            for part in self[1:]
        ))  # fmt: skip


def problem(N: int, K: int, F: int, O: int, dtype: torch.dtype = F32, *, k: int = 1, seed: int = 0) -> Problem:
    """Some dropped, one module with a fifth of all, logits of order one."""
    generator = seeds.generator(seed, "cuda")

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)

    actions = torch.randint(-1, K, (N, k), generator=generator, device="cuda")
    actions[: N // 5] = K // 2
    weights = [normal(O, F, scale=F**-0.5) for _ in range(K)]
    return Problem(actions if k > 1 else actions[:, 0], normal(N, F), weights,
                   [normal(O) for _ in range(K)], normal(N * k, O))  # fmt: skip


def run(p: Problem, backend: str = "triton", activation: str = "none", stacked: bool = False) -> dict[str, Tensor]:
    """y and every gradient, those of parameters stacked."""
    x = p.x.detach().requires_grad_()
    W = [torch.stack(p.weights)] if stacked else list(p.weights)
    b = [torch.stack(p.biases)] if stacked else list(p.biases)
    W, b = [t.detach().requires_grad_() for t in W], [t.detach().requires_grad_() for t in b]
    with use_backend(backend):
        plan = dispatch.plan(p.actions, len(p.weights))
        given: Any = (W[0], b[0]) if stacked else (W, b)
        y = grouped_linear(x, plan, *given, activation=activation)
        dx, *rest = torch.autograd.grad(y, [x, *W, *b], p.dy)
    dw, db = rest[: len(W)], rest[len(W) :]
    made = (dw[0], db[0]) if stacked else (torch.stack(dw), torch.stack(db))
    return {"y": y.detach(), "dx": dx, "dW": made[0], "db": made[1]}


def defined(p: Problem, activation: str) -> dict[str, Tensor]:
    """By sorted rows, one plain product after the other, with PyTorch's own autograd."""
    k = p.actions.numel() // p.x.shape[0]
    x = p.x.detach().requires_grad_()
    W, b = (torch.stack(part).detach().requires_grad_() for part in (p.weights, p.biases))
    flat = p.actions.reshape(-1)
    y = torch.zeros_like(p.dy)
    for m in range(len(p.weights)):
        rows = (flat == m).nonzero()[:, 0]
        made = torch.addmm(b[m], x[rows // k], W[m].mT)
        y = y.index_copy(0, rows, activations.ACTIVATIONS[activation](made))
    dx, dw, db = torch.autograd.grad(y, [x, W, b], p.dy)
    return {"y": y.detach(), "dx": dx, "dW": dw, "db": db}


def check(p: Problem, activation: str = "none", **options: Any) -> None:
    exact = p.to(torch.float64)
    assert_within_budget(run(p, activation=activation, **options), lambda: defined(exact, activation), p.x.dtype)


KINDS = [(F32, "ieee"), (F32, "tf32"), (BF16, "ieee"), (F16, "ieee")]


@pytest.mark.parametrize("dtype, precision", KINDS, ids=["ieee", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "size",
    [(64, 5, 128, 48), (1024, 20, 128, 48), (4096, 4, 512, 512), (4096, 100, 64, 33), (20_000, 8, 1024, 768)],
    ids=str,
)
def test_real_sizes(size: tuple[int, int, int, int], dtype: torch.dtype, precision: str) -> None:
    with tf32(precision == "tf32"):
        check(problem(*size, dtype), "relu")


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [(1000, 7, 96, 64), (60_000, 16, 1024, 256)], ids=str)
def test_activations(activation: str, dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    """In the loop of the products, and before them."""
    check(problem(*size, dtype), activation)


@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("stacked", [False, True])
def test_mixture_of_experts(k: int, stacked: bool) -> None:
    check(problem(3000, 32, 512, 256, BF16, k=k), "silu", stacked=stacked)


@pytest.mark.parametrize("K", [1, 20, 128, 5000])
@pytest.mark.parametrize("N", [0, 1, 1000, 8192, 8193, 16384, 262_144, 3_000_000])
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_plans(N: int, K: int, backend: str) -> None:
    if backend == "native":
        if (why := missing("native", "cuda", ("cpu", "cuda"))) is not None:
            pytest.skip(why)
        if N > dispatch.NATIVE_ENTRIES:
            pytest.skip("more entries than one block takes")
    actions = torch.randint(-2, K + 2, (N,), device="cuda")
    for given in (actions, torch.stack([actions, actions + 1], 1)[:, 0]):
        made = getattr(torch.ops.fastroute, f"_dispatch_plan_{backend}")(given, K)
        expected = reference_dispatch.plan(given, K)
        assert all(torch.equal(a, b) for a, b in zip(made, expected[:3], strict=True))


@pytest.mark.parametrize("size", [(1024, 20, 128, 48), (30_000, 8, 512, 512)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_same_input_same_bits(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """A hundred times."""
    p = problem(*size, dtype)
    once = run(p, activation="gelu")
    for _ in range(100):
        again = run(p, activation="gelu")
        assert all(torch.equal(t, again[name]) for name, t in once.items())


@pytest.mark.parametrize("size", [(1024, 20, 128, 48), (20_000, 8, 512, 256)], ids=str)
@pytest.mark.parametrize("stacked", [False, True])
def test_captures_in_a_graph_without_synchronising(size: tuple[int, int, int, int], stacked: bool) -> None:
    """Plan, forward and backward replay on new values to the bits of a plain call; parameters through their table."""
    from fastroute.kernels.grouped_linear import parameters as grouped_linear_parameters

    p, other = problem(*size), problem(*size, seed=1)
    expected = run(other, activation="silu", stacked=stacked)
    run(p, activation="silu", stacked=stacked)  # compiles and makes the tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    run(p, activation="silu", stacked=stacked)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(p, activation="silu", stacked=stacked)
    torch.cuda.set_sync_debug_mode("default")
    if not stacked:
        assert (p.x.device, tuple(w.data_ptr() for w in p.weights)) in grouped_linear_parameters._in_graphs
    grouped_linear_parameters.forget()
    for t, new in zip(p.tensors(), other.tensors(), strict=True):
        t.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_captures_without_a_table() -> None:
    """Parameters that no call has seen before: a copy of them is made in the graph."""
    p = problem(500, 6, 64, 32)
    run(problem(500, 6, 64, 32, seed=2))  # some tables, of other parameters
    run(p, stacked=True)  # compiles the kernels that read one tensor
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(p)
    p.weights[3].zero_()
    graph.replay()
    torch.cuda.synchronize()
    expected = run(p)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_reduce_overhead_with_separate_parameters() -> None:
    """The first call ever with them is the warm-up of a compiled graph, whose pool is checked for what stays alive."""
    from fastroute.kernels.grouped_linear import parameters as grouped_linear_parameters

    grouped_linear_parameters.forget()
    linears = nn.ModuleList(nn.Linear(48, 32) for _ in range(6)).cuda()
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]
    x, actions = torch.randn(300, 48, device="cuda"), torch.randint(-1, 6, (300,), device="cuda")

    def step(x: Tensor, actions: Tensor) -> Tensor:
        return grouped_linear(x, dispatch.plan(actions, 6), weights, biases, activation="relu")

    with use_backend("triton"):
        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):  # warm-up, recording, replays
            torch.compiler.cudagraph_mark_step_begin()
            linears.zero_grad()
            compiled(x, actions).square().sum().backward()
        found = [m.weight.grad.clone() for m in linears]
        linears.zero_grad()
        step(x, actions).square().sum().backward()
    assert all(torch.equal(a, m.weight.grad) for a, m in zip(found, linears, strict=True))


def test_a_step_of_an_optimizer_in_a_graph() -> None:
    """Parameters change in place between replays, and are read anew where they are."""
    seeds.manual_seed(0)
    linears = nn.ModuleList(nn.Linear(64, 32) for _ in range(12)).cuda()
    twin = nn.ModuleList(nn.Linear(64, 32) for _ in range(12)).cuda()
    twin.load_state_dict(linears.state_dict())
    x, actions = torch.randn(700, 64, device="cuda"), torch.randint(-1, 12, (700,), device="cuda")

    def step(modules: nn.ModuleList, optimizer: torch.optim.Optimizer) -> Tensor:
        with use_backend("triton"):
            plan = dispatch.plan(actions, 12)
            y = grouped_linear(x, plan, [m.weight for m in modules], [m.bias for m in modules], activation="tanh")
        loss = (y - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (linears, twin))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ours.zero_grad(set_to_none=True)
            step(linears, ours)
    torch.cuda.current_stream().wait_stream(side)
    ours.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(linears, ours)
    for _ in range(5):
        graph.replay()
    losses = []
    for _ in range(8):
        theirs.zero_grad(set_to_none=True)
        losses.append(step(twin, theirs))
    torch.cuda.synchronize()
    assert torch.equal(loss, losses[-1]) and losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(linears.parameters(), twin.parameters(), strict=True))


def test_parameters_on_another_stream() -> None:
    """A table made on one stream is read on another at once."""
    p = problem(900, 10, 64, 64)
    expected = run(p, stacked=True)
    for _ in range(20):
        fresh = Problem(p.actions, p.x, [w.clone() for w in p.weights], [b.clone() for b in p.biases], p.dy)
        run(fresh)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = run(fresh)
        torch.cuda.synchronize()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_out_of_range_actions_are_dropped() -> None:
    p = problem(300, 5, 32, 16)
    p.actions[::3] = 1 << 40
    p.actions[1::3] = -(1 << 40)
    found = run(p)
    assert not found["y"][::3].any() and not found["dx"][1::3].any()


@pytest.mark.parametrize("what", ["rows", "weights"])
def test_more_than_2_31_elements(what: str) -> None:
    """x and y, then the stacked weights, pass 2**31 elements; the last rows, and modules, are right."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB")
    N, K, F, O = (2_200_000, 3, 1024, 1024) if what == "rows" else (256, 2100, 1024, 1024)
    x = torch.randn(N, F, dtype=BF16, device="cuda")
    W = torch.randn(K, O, F, dtype=BF16, device="cuda").mul_(F**-0.5).requires_grad_()
    actions = torch.full((N,), K - 1, device="cuda") if what == "weights" else torch.arange(N, device="cuda") * K // N
    x.requires_grad_()
    with use_backend("triton"):
        y = grouped_linear(x, dispatch.plan(actions, K), W, activation="relu")
        dx, dW = torch.autograd.grad(y, [x, W], torch.ones_like(y))
    rows = slice(N - 200, N)

    def last(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        some, w = x[rows].detach().to(dtype).requires_grad_(), W[K - 1].detach().to(dtype)
        made = torch.relu(some @ w.mT)
        return made.detach(), torch.autograd.grad(made.sum(), some)[0]

    found = {"y": y[rows].detach(), "dx": dx[rows]}
    assert_within_budget(found, lambda: dict(zip(found, last(torch.float64), strict=True)), BF16)
    if what == "weights":
        assert not dW[: K - 1].any() and dW[K - 1].any()
    assert y.isfinite().all()


@pytest.mark.parametrize("shape", [(32_768, 8, 128, 2048, 768)], ids=str)
def test_large_regime_takes_little_memory(shape: tuple[int, ...]) -> None:
    """Forward makes y and the plan, nothing of x's size sorted or copied."""
    B, k, K, F, O = shape
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB")
    x, W = torch.randn(B, F, dtype=BF16, device="cuda"), torch.randn(K, O, F, dtype=BF16, device="cuda")
    actions = torch.randint(K, (B, k), device="cuda")
    with use_backend("triton"), torch.no_grad():
        grouped_linear(x, dispatch.plan(actions, K), W)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = grouped_linear(x, dispatch.plan(actions, K), W)
        assert torch.cuda.max_memory_allocated() - before < y.numel() * 2 + (32 << 20)
