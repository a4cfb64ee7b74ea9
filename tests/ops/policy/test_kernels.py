"""The Triton kernels of ``policy`` and ``agent_policy`` against plain PyTorch: compiled on a GPU, else interpreted.

Axes: N rows, A agents, F features in, K choices, C outputs of a critic.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import functional, use_backend
from fastroute.ops import dispatch
from fastroute.ops.backends import BackendUnavailable
from fastroute.ops.policy.op import CHOICES, KINDS
from tests.helpers.agent_policy_cases import case_of, each_kind, each_net, lists, op, some_agents, truth
from tests.helpers.budget import assert_within_budget, check
from tests.helpers.cases import Case, evaluate
from tests.helpers.covering import in_pairs
from tests.helpers.dispatch_cases import actions_of, each_histogram

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
WAYS = ("greedy", "draw", "coin", "forced")


def some_choices(way: str, N: int, K: int) -> dict[str, Any]:
    if way == "forced":
        return {"forced": torch.randint(-1, K, (N,), device=DEVICE)}
    made: dict[str, Any] = {"uniform": torch.rand(N, K, device=DEVICE)} if way != "greedy" else {}
    return made | ({"coin": torch.rand(N, device=DEVICE), "exploration": 0.4} if way == "coin" else {})


def run_policy(backend: str, scores: Tensor, grad: Tensor, **options: Any) -> list[Tensor]:
    leaf = scores.detach().requires_grad_()
    with use_backend(backend):
        made = functional.policy(leaf, **options)
    (gradient,) = torch.autograd.grad(made.value, leaf, grad)
    return [made.actions, made.greedy, made.value.detach(), gradient]


@pytest.mark.parametrize("way", WAYS)
@each_kind
def test_choices(kind: str, way: str) -> None:
    for N, K in ((70, 5), (9, 1), (5, 200)):
        scores, grad = 3 * torch.randn(N, K, device=DEVICE), torch.randn(N, device=DEVICE)
        options = {"kind": kind, "temperature": 0.7, **some_choices(way, N, K)}
        found, plain = (run_policy(backend, scores, grad, **options) for backend in ("triton", "reference"))
        different = int((found[0] != plain[0]).sum())  # two races so close that rounding decides them
        assert torch.equal(found[1], plain[1]) and different <= N // 50


@each_kind
@each_dtype
def test_values(kind: str, dtype: torch.dtype) -> None:
    def op(backend: str) -> Any:
        def call(scores: Tensor, forced: Tensor) -> dict[str, Tensor]:
            with use_backend(backend):
                return {"value": functional.policy(scores, forced=forced, kind=kind, temperature=0.7).value}

        return call

    for N, K in ((40, 5), (20, 200)):
        cases = []
        for _ in range(4):
            scores, forced = (3 * torch.randn(N, K, device=DEVICE)).to(dtype), torch.randint(-1, K, (N,), device=DEVICE)
            axes = {"scores": "nk", "forced": "n", "value": "n"}
            cases.append(
                Case({"scores": scores, "forced": forced}, {"value": torch.randn(N, device=DEVICE)}, axes, ("scores",))
            )
        check(op("triton"), op("reference"), cases, dtype=dtype)


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


def check_op(
    net: str, kind: str, dtype: torch.dtype, agents: Sequence[Tensor], A: int, F: int, K: int,
    **options: bool,
) -> None:  # fmt: skip
    """Cases of the same kind, an ``agents`` each."""
    cases = [case_of(a, A, F, K, net, dtype, seed, DEVICE) for seed, a in enumerate(agents)]
    how = {"kind": kind, "temperature": 0.7}
    check(op("triton", **how, **options), truth(**how), cases, dtype=dtype, stored=dtype)


@each_net
@each_kind
def test_agent_policy(net: str, kind: str) -> None:
    check_op(net, kind, F32, [some_agents(40, 3, s) for s in range(2)], 3, 21, 7)


@in_pairs(net=["critic", "table-and-state-value"], kind=KINDS, dtype={"bf16": BF16, "fp16": F16})
def test_half_precision(net: str, kind: str, dtype: torch.dtype) -> None:
    check_op(net, kind, dtype, [some_agents(40, 3, s) for s in range(2)], 3, 21, 7)


@each_histogram
def test_histograms(histogram: list[int]) -> None:
    agents = [actions_of(histogram, seed) for seed in range(2)]
    for net, stacked in (("critic", False), ("tables", True)):
        check_op(net, "softmax", F32, agents, len(histogram) - 1, 5, 4, stacked=stacked)


@each_net
def test_one_agent_without_a_plan(net: str) -> None:
    check_op(net, "softmax", F32, [torch.zeros(70, dtype=torch.int64)] * 2, 1, 70, 9, no_plan=True)


@pytest.mark.parametrize("size", [(40, 5, 100, 40), (130, 2, 33, 100), (5, 3, 3, 1), (20, 2, 130, 256)], ids=str)
def test_sizes(size: tuple[int, int, int, int]) -> None:
    N, A, F, K = size
    check_op("critic", "softmax", F32, [some_agents(N, A, s) for s in range(2)], A, F, K)


@pytest.mark.parametrize("kind", ["softmax", "shifted"])
def test_mean_of_the_critic(kind: str) -> None:
    case = case_of(some_agents(50, 3), 3, 8, 6, "critic", F32, device=DEVICE)
    plan = dispatch.plan(case.inputs["agents"], 3)  # type: ignore[arg-type]

    def mean(backend: str, dtype: torch.dtype) -> Tensor:
        given = case.to(dtype).inputs
        nets, x = lists(given), given["x"]
        with use_backend(backend):
            made = functional.agent_policy(x, plan, **nets, kind=kind, temperature=0.7, expected=True)  # type: ignore[arg-type]
        assert made.expected is not None and not made.expected.requires_grad
        return made.expected

    assert_within_budget({"mean": mean("triton", F32)}, lambda: {"mean": mean("reference", F64)}, F32)


def test_choices_are_those_of_policy() -> None:
    case = case_of(some_agents(40, 4), 4, 12, 6, "alone", F32, device=DEVICE)
    agents, nets = case.inputs["agents"], lists(case.inputs)
    plan = dispatch.plan(agents, 4)  # type: ignore[arg-type]
    for kind in KINDS:
        for way in WAYS:
            options = {"kind": kind, "temperature": 0.7, **some_choices(way, 40, 6)}
            with use_backend("triton"):
                made = functional.agent_policy(case.inputs["x"], plan, **nets, **options)
                alone = functional.policy(made.scores, **options)
            has = agents >= 0  # type: ignore[operator]
            assert torch.equal(made.actions[has], alone.actions[has]) and torch.equal(made.greedy, alone.greedy)
            assert torch.equal(made.value[has], alone.value[has]) and not made.value[~has].any()
            assert torch.equal(made.actions[~has], options.get("forced", torch.zeros_like(made.actions))[~has])


def test_what_is_not_a_number_stays_with_its_agent() -> None:
    """The last agent's layer is what tiles of dropped rows load, too."""
    case = case_of(torch.tensor([0, -1, 1, -1, 0, 1], device=DEVICE), 2, 5, 4, "critic", F32, device=DEVICE)
    for name in ("weights", "critic_weights"):
        case.inputs[name][1] = torch.nan  # type: ignore[index]
    found = evaluate(op("triton"), case)
    of_last = (case.inputs["agents"] == 1).cpu()  # type: ignore[union-attr]
    for name in ("value", "scores", "critic", "critic_at", "dx"):
        assert torch.equal(found[name].isfinite().reshape(6, -1).all(1).cpu(), ~of_last), name  # type: ignore[union-attr]
    assert not found["dx"][[1, 3]].any()  # type: ignore[index]


def test_same_bits_every_time() -> None:
    case = case_of(some_agents(200, 3), 3, 20, 8, "critic", F32, device=DEVICE)
    a, b = (evaluate(op("triton"), case) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)  # type: ignore[arg-type]


def test_too_many_choices() -> None:
    scores = torch.zeros(2, CHOICES + 1, device=DEVICE)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match=f"up to {CHOICES} choices, not {CHOICES + 1}"):
        functional.policy(scores)
    assert functional.policy(scores).actions.tolist() == [0, 0]
