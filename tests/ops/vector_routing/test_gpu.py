"""The compiled kernels on a GPU: real sizes and precisions, graph capture, no synchronisation, over 2**31 elements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.helpers.graphs import captured

from .oracle import Problem, Size, answer, assert_within_budget, empty_grads, forward_passes, passes_of, problem, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

KINDS = {
    "next": {},
    "next-linear": {"linear": True},
    "first-made": {"first": True, "made": True},
    "first-linear-made": {"first": True, "made": True, "linear": True},
}


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Keep a failed capture or a precision from reaching the next test."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.empty_cache()


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = on
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def check(case: Problem) -> None:
    from fastroute.kernels.vector_routing import launch as vector_routing

    with tf32(case.step.precision == "tf32"):
        assert_within_budget(run(vector_routing, case), case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "size",
    [Size(4, 2000, 1000, 256), Size(2, 5000, 100, 1024), Size(3, 4925, 64, 192), Size(1, 1000, 4096, 96)],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"), (torch.float16, "ieee")],
    ids=["ieee", "tf32", "bf16", "fp16"],
)
def test_real_sizes(kind: str, size: Size, dtype: torch.dtype, precision: str) -> None:
    check(problem(size, dtype=dtype, precision=precision, device="cuda", **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("one_pass", [True, False], ids=["one-pass", "two-phase"])
def test_both_paths(kind: str, one_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastroute.kernels.vector_routing import launch as vector_routing

    monkeypatch.setattr(vector_routing, "force_one_pass", one_pass)
    check(problem(Size(3, 3000, 50, 200), device="cuda", lengths=[3000, 0, 1111], **KINDS[kind]))


@pytest.mark.parametrize("size", [Size(2, 5000, 100, 1024), Size(3, 4925, 48, 192), Size(1, 3000, 1000, 512)], ids=str)
def test_narrow(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pass reads what the first one left of x, not x; repeated, it has the same bits."""
    from fastroute.kernels.vector_routing import launch as vector_routing

    monkeypatch.setattr(vector_routing, "force_narrow", True)
    with tf32(True):
        cases = passes_of(vector_routing, size, device="cuda")
        found, again = (forward_passes(vector_routing, cases, lost=True)[0] for _ in range(2))
        for made, repeated, case in zip(found, again, cases, strict=True):
            assert_within_budget(made, case, forward=True)
            assert all(torch.equal(t, repeated[name]) for name, t in made.items())


@pytest.mark.parametrize("kind", KINDS)
def test_captures_in_a_graph_without_synchronising(kind: str) -> None:
    """Forward and backward replay on new values to the bits of a plain call."""
    from fastroute.kernels.vector_routing import launch as vector_routing

    case = problem(Size(2, 3000, 50, 200), device="cuda", lengths=[3000, 1111], **KINDS[kind])
    other = problem(Size(2, 3000, 50, 200), device="cuda", lengths=[7, 2999], seed=1, **KINDS[kind])
    expected = run(vector_routing, other)
    graph, found = captured(lambda: run(vector_routing, case))
    for t, new in zip((*case.step, case.dM, case.dp), (*other.step, other.dM, other.dp), strict=True):
        if isinstance(t, torch.Tensor):
            t.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_same_input_same_bits(kind: str) -> None:
    from fastroute.kernels.vector_routing import launch as vector_routing

    case = problem(Size(2, 50_000, 100, 256), device="cuda", precision="tf32", **KINDS[kind])
    once, again = run(vector_routing, case), run(vector_routing, case)
    assert all(torch.equal(once[name], again[name]) for name in once)


def tail(case: Problem, rows: int) -> Problem:
    """The same with the last rows alone, in float64."""
    step = case.step
    last = {
        name: None if (t := getattr(step, name)) is None else t[:, -rows:] if name in ("x", "gate") else t[-rows:]
        for name in ("x", "gate", "gate_weight", "gate_bias", "score_weight", "score_bias", "use", "ign")
    }
    return case._replace(step=step._replace(**last))


@pytest.mark.parametrize(
    ("size", "gigabytes"), [(Size(1, 2_200_000, 16, 1024), 40), (Size(1, 22_000_000, 100, 16), 80)], ids=str
)
def test_more_than_2_31_elements(size: Size, gigabytes: int) -> None:
    """x, then the parameters, pass 2**31 elements; only the last rows have an open gate: they are the whole answer."""
    from fastroute.kernels.vector_routing import launch as vector_routing

    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB")
    B, n, m, d = size

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    case = problem(Size(B, 64, m, d), dtype=torch.bfloat16, device="cuda")
    gate = torch.zeros(B, n, device="cuda")
    gate[:, -64:] = 0.5
    step = case.step._replace(
        x=tensor(B, n, d),
        gate=gate,
        score_weight=tensor(n, m),
        score_bias=tensor(n, m),
        use=tensor(n, m),
        ign=tensor(n, m),
    )
    case = case._replace(step=step)
    M, p, _ = vector_routing.forward(step)
    grads = empty_grads(step)
    dpred = vector_routing.backward(step, case.dM, case.dp, grads)
    last = tail(case, 64)
    found = {
        "M": M,
        "p": p,
        "gate": last.step.gate,
        "dpred": dpred,
        "dx": grads.x[:, -64:],
        "dgate": grads.gate[:, -64:],
    }
    found |= {f"d{name}": getattr(grads, name)[-64:] for name in ("score_weight", "score_bias", "use", "ign")}
    assert_within_budget(found, last)
    assert not grads.use[:-64].any() and not grads.x[:, :-64].any()


def test_agrees_with_float64_at_a_million() -> None:
    """The headline shape, forward: by norm within four roundings to tf32 (x and pred, phi and x) of float64."""
    from fastroute.kernels.vector_routing import launch as vector_routing

    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB")
    case = problem(Size(1, 1_000_000, 100, 1024), precision="tf32", device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    M, p, _ = vector_routing.forward(case.step)
    assert torch.cuda.max_memory_allocated() - before < 100 << 20
    exact_M, exact_p = torch.zeros_like(M, dtype=torch.float64), torch.zeros_like(p, dtype=torch.float64)
    for start in range(0, 1_000_000, 50_000):
        rows = slice(start, start + 50_000)
        part = case.step._replace(
            x=case.step.x[:, rows], gate=case.step.gate[:, rows],
            **{k: getattr(case.step, k)[rows] for k in ("score_weight", "score_bias", "use", "ign")},
        )  # fmt: skip
        some = answer(case._replace(step=part), torch.float64)
        exact_M += some["M"]
        exact_p += some["p"]
    for found, exact in ((M, exact_M), (p, exact_p)):
        assert (found - exact).norm() <= 4 * 2**-10 * exact.norm()
