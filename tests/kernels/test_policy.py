"""The Triton kernels of ``policy`` and ``agent_policy`` against plain PyTorch: compiled on a GPU, else interpreted.

Axes: N rows, A agents, F features in, K choices, C outputs of a critic.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import ops, use_backend
from fastroute.ops import dispatch
from fastroute.ops._backends import BackendUnavailable
from fastroute.ops.policy import CHOICES, KINDS
from tests.helpers.budget import assert_within_budget
from tests.helpers.dispatch_cases import actions_of, each_histogram
from tests.helpers.poison import poisoned_memory

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
WAYS = ("greedy", "draw", "coin", "forced")


@pytest.fixture(autouse=True)
def nothing_unwritten() -> Any:
    torch.manual_seed(0)
    with poisoned_memory():
        yield


def some_choices(way: str, N: int, K: int) -> dict[str, Any]:
    if way == "forced":
        return {"forced": torch.randint(-1, K, (N,), device=DEVICE)}
    made: dict[str, Any] = {"uniform": torch.rand(N, K, device=DEVICE)} if way != "greedy" else {}
    return made | ({"coin": torch.rand(N, device=DEVICE), "exploration": 0.4} if way == "coin" else {})


def run_policy(backend: str, scores: Tensor, grad: Tensor, **options: Any) -> list[Tensor]:
    leaf = scores.detach().requires_grad_()
    with use_backend(backend):
        made = ops.policy(leaf, **options)
    (gradient,) = torch.autograd.grad(made.value, leaf, grad)
    return [made.actions, made.greedy, made.value.detach(), gradient]


@pytest.mark.parametrize("way", WAYS)
@each_kind
@each_dtype
def test_policy(kind: str, way: str, dtype: torch.dtype) -> None:
    for N, K in ((70, 5), (33, 20), (9, 1), (3, 200)):
        scores, grad = (3 * torch.randn(N, K, device=DEVICE)).to(dtype), torch.randn(N, device=DEVICE)
        options = {"kind": kind, "temperature": 0.7, **some_choices(way, N, K)}
        found = run_policy("triton", scores, grad, **options)
        plain = run_policy("reference", scores, grad, **options)
        assert torch.equal(found[1], plain[1]) and int((found[0] != plain[0]).sum()) <= N // 50
        same = {"kind": kind, "temperature": 0.7, "forced": found[0]}
        plain = run_policy("reference", scores, grad, **same)
        exact = run_policy("reference", scores.double(), grad.double(), **same)
        assert_within_budget(found[2], exact[2], plain[2], f"value {N} {K}")
        assert_within_budget(found[3], exact[3], plain[3], f"gradient {N} {K}")


@each_kind
def test_extreme_scores(kind: str) -> None:
    scores = torch.zeros(6, 5, device=DEVICE)
    scores[1] = torch.tensor([1.0, -torch.inf, 3.0, 3.0, -torch.inf])
    scores[2, 3] = torch.nan
    scores[3] = torch.tensor([1e-45, 0.0, 3e37, -3e37, 1.0])
    scores[4] = torch.tensor([-100.0, -200.0, 0.0, -87.5, -1000.0])
    grad = torch.randn(6, device=DEVICE)
    for choices in ({}, {"uniform": torch.rand(6, 5, device=DEVICE)}, some_choices("forced", 6, 5)):
        found, plain = (run_policy(b, scores, grad, kind=kind, **choices) for b in ("triton", "reference"))
        finite = torch.tensor([0, 3, 4, 5], device=DEVICE)
        assert torch.equal(found[1], plain[1])
        assert torch.equal(found[0][finite], plain[0][finite])
        assert ((found[0] >= -1) & (found[0] < 5)).all()
        torch.testing.assert_close(found[2][finite], plain[2][finite])
        torch.testing.assert_close(found[3][finite], plain[3][finite])


#: weights, biases, critic's weights and biases: what there is; and outputs of the critic (0: K).
NETS: dict[str, tuple[tuple[bool, bool, bool, bool], int]] = {
    "alone": ((True, True, False, False), 0),
    "critic": ((True, True, True, True), 0),
    "state-value": ((True, False, True, True), 1),
    "tables": ((False, True, False, True), 0),
    "table-and-state-value": ((False, True, True, True), 1),
}


def nets_of(net: str, A: int, F: int, K: int, dtype: torch.dtype) -> list[list[Tensor]]:
    has, C = NETS[net][0], NETS[net][1] or K
    shapes = ((K, F), (K,) if has[0] else (1, K), (C, F), (C,) if has[2] else (1, C))
    return [
        [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(A)] if there else []
        for there, shape in zip(has, shapes, strict=True)
    ]


def run(
    backend: str, x: Tensor, agents: Tensor, nets: list[list[Tensor]], grads: list[Tensor], stacked: bool = False,
    dtype: torch.dtype | None = None, **options: Any,
) -> list[Tensor]:  # fmt: skip
    """Outputs with a gradient, and all gradients, in ``dtype``."""
    A = len(nets[0] or nets[1])
    to = dtype or x.dtype
    given = [[t.to(to) for t in of] for of in nets]
    if stacked:
        given = [[(torch.cat if t[0].shape[0] == 1 and t[0].dim() == 2 and i % 2 else torch.stack)(t)] if t else []
                 for i, t in enumerate(given)]  # fmt: skip
    given = [[t.detach().requires_grad_() for t in of] for of in given]
    leaf = x.to(to).detach().requires_grad_()
    with use_backend(backend):
        plan = None
        if A > 1:
            with use_backend("reference"):
                plan = dispatch.plan(agents, A)
        made = ops.agent_policy(
            leaf, plan, given[0], given[1], critic_weights=given[2], critic_biases=given[3], keep_empty=True, **options
        )
    ends = [t for t in (made.value, made.scores, made.critic, made.critic_at) if t is not None]
    leaves = [t for of in given for t in of] + ([leaf] if given[0] or given[2] else [])
    back = torch.autograd.grad(ends, leaves, [g.to(t.dtype) for g, t in zip(grads, ends, strict=False)])
    return [*(t.detach() for t in ends), *back, *([made.expected] if made.expected is not None else [])]


def compare(
    net: str, kind: str, dtype: torch.dtype, agents: Tensor, A: int, F: int, K: int, stacked: bool = False
) -> None:
    N, C = len(agents), NETS[net][1] or K
    agents, nets = agents.to(DEVICE), nets_of(net, A, F, K, dtype)
    x = torch.randn(N, F, device=DEVICE).to(dtype)
    grads = [torch.randn(s, device=DEVICE).to(dtype) for s in ((N,), (N, K), (N, C), (N,))]
    options: dict[str, Any] = {"kind": kind, "temperature": 0.7, "forced": torch.randint(-1, K, (N,), device=DEVICE)}
    options["expected"] = kind != "score" and C == K and bool(nets[2] or nets[3])
    found = run("triton", x, agents, nets, grads, stacked, **options)
    plain = run("reference", x, agents, nets, grads, stacked, **options)
    exact = run("reference", x, agents, nets, grads, stacked, F64, **options)
    for i, (got, wanted, other) in enumerate(zip(found, exact, plain, strict=True)):
        assert got.dtype == other.dtype
        assert_within_budget(got, wanted, other, f"result {i} of {len(found)}")


@pytest.mark.parametrize("net", NETS)
@each_kind
@each_dtype
def test_agent_policy(net: str, kind: str, dtype: torch.dtype) -> None:
    compare(net, kind, dtype, torch.randint(-1, 3, (60,)), 3, 21, 7)


@each_histogram
@pytest.mark.parametrize("stacked", [False, True], ids=["lists", "stacked"])
def test_histograms(histogram: list[int], stacked: bool) -> None:
    if sum(histogram):
        compare("critic", "softmax", F32, actions_of(histogram), len(histogram) - 1, 5, 4, stacked)


@pytest.mark.parametrize("net", NETS)
def test_one_agent_without_a_plan(net: str) -> None:
    compare(net, "softmax", F32, torch.zeros(150, dtype=torch.int64), 1, 70, 9)


@pytest.mark.parametrize("size", [(40, 5, 100, 40), (300, 2, 33, 100), (5, 3, 3, 1), (20, 2, 130, 256)], ids=str)
def test_sizes(size: tuple[int, int, int, int]) -> None:
    N, A, F, K = size
    compare("critic", "softmax", F32, torch.randint(0, A, (N,)), A, F, K)


def test_choices_are_those_of_policy() -> None:
    agents, nets = torch.randint(-1, 4, (90,), device=DEVICE), nets_of("alone", 4, 12, 6, F32)
    x = torch.randn(90, 12, device=DEVICE)
    with use_backend("reference"):
        plan = dispatch.plan(agents, 4)
    for kind in KINDS:
        for way in WAYS:
            options = {"kind": kind, "temperature": 0.7, **some_choices(way, 90, 6)}
            with use_backend("triton"):
                made = ops.agent_policy(x, plan, nets[0], nets[1], **options)
                alone = ops.policy(made.scores, **options)
            has = agents >= 0
            assert torch.equal(made.actions[has], alone.actions[has]) and torch.equal(made.greedy, alone.greedy)
            assert torch.equal(made.value[has], alone.value[has]) and not made.value[~has].any()
            assert torch.equal(made.actions[~has], options.get("forced", torch.zeros_like(agents))[~has])


def test_no_rows() -> None:
    nets = nets_of("critic", 2, 3, 4, F32)
    grads = [torch.zeros(s, device=DEVICE) for s in ((0,), (0, 4), (0, 4), (0,))]
    found = run("triton", torch.zeros(0, 3, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE), nets, grads)
    assert all(not t.any() and t.isfinite().all() for t in found)


def test_same_bits_every_time() -> None:
    nets, agents = nets_of("critic", 3, 20, 8, F32), torch.randint(0, 3, (200,), device=DEVICE)
    x = torch.randn(200, 20, device=DEVICE)
    grads = [torch.randn(s, device=DEVICE) for s in ((200,), (200, 8), (200, 8), (200,))]
    forced = torch.randint(0, 8, (200,), device=DEVICE)
    made = [run("triton", x, agents, nets, grads, forced=forced) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_too_many_choices() -> None:
    scores = torch.zeros(2, CHOICES + 1, device=DEVICE)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match=f"up to {CHOICES} choices, not {CHOICES + 1}"):
        ops.policy(scores)
    assert ops.policy(scores).actions.tolist() == [0, 0]
