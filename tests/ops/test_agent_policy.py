"""``agent_policy`` on every backend: choices, values and gradients against the definition, and laws that they keep.

Axes: N (n) rows, A (a) agents, F (f) features in, K (k) choices, C (c) outputs of a critic: K, or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fastroute
from fastroute import ops, use_backend
from fastroute.ops import dispatch
from fastroute.ops.agent_policy import AgentChoice
from fastroute.ops.policy import KINDS
from fastroute.reference import agent_policy as reference
from tests.helpers import strategies
from tests.helpers.backends import HERE, each_backend
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.dispatch_cases import actions_of, each_histogram
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_same, check_compiled, check_exported, gradcheck, opcheck

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
each_dtype = pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
each_kind = pytest.mark.parametrize("kind", KINDS)
needs_native = pytest.mark.skipif("native" not in HERE, reason="the C++ extension is not built")

PARAMETERS = ("weights", "biases", "critic_weights", "critic_biases")
DIFFERENTIABLE = ("value", "scores", "critic", "critic_at")

#: What there is: weights, biases, of the policy and of the critic, and how many outputs that has (None: K).
NETS: dict[str, dict[str, Any]] = {
    "alone": {"has": (True, True, False, False)},
    "without-bias": {"has": (True, False, True, False)},
    "critic": {"has": (True, True, True, True)},
    "state-value": {"has": (True, True, True, True), "outputs": 1},
    "tables": {"has": (False, True, False, True)},
    "table-and-state-value": {"has": (False, True, True, True), "outputs": 1},
}
each_net = pytest.mark.parametrize("net", NETS)


def case_of(
    agents: Tensor, A: int, F: int, K: int, net: str = "critic", dtype: torch.dtype = F32, seed: int = 0
) -> Case:
    """Of forced actions, some negative: then no rounding can change a choice. Parameters are stacked: [A, ...]."""
    generator = torch.Generator().manual_seed(seed)
    has, C = NETS[net]["has"], NETS[net].get("outputs", K)
    N, acc = len(agents), torch.promote_types(dtype, F32)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(to)

    shapes = dict(zip(PARAMETERS, ((A, K, F), (A, K), (A, C, F), (A, C)), strict=True))
    parameters = {k: normal(*shapes[k]) if wanted else None for k, wanted in zip(PARAMETERS, has, strict=True)}
    inputs = {"x": normal(N, F) if has[0] or has[2] else None, **parameters, "agents": agents}
    inputs["forced"] = torch.randint(-1, K, (N,), generator=generator)
    cotangents = {"value": normal(N, to=acc), "scores": normal(N, K)}
    if has[2] or has[3]:
        cotangents |= {"critic": normal(N, C), "critic_at": normal(N, to=acc)}
    return Case(
        inputs, cotangents,
        {"x": "nf", "weights": "akf", "biases": "ak", "critic_weights": "acf", "critic_biases": "ac", "agents": "n",
         "forced": "n", "value": "n", "scores": "nk", "critic": "nc", "critic_at": "n"},
        tuple(k for k in ("x", *PARAMETERS) if inputs[k] is not None),
    )  # fmt: skip


def lists(given: dict[str, Tensor | None]) -> dict[str, list[Tensor]]:
    """A tensor per agent of each kind, tables as [1, K]."""
    made = {k: [] if (t := given[k]) is None else list(t.unbind()) for k in PARAMETERS}
    for w, b in (PARAMETERS[:2], PARAMETERS[2:]):
        if not made[w]:
            made[b] = [t[None] for t in made[b]]
    return made


def results(made: AgentChoice) -> dict[str, Tensor]:
    found = {k: getattr(made, k) for k in DIFFERENTIABLE}
    return {k: t for k, t in found.items() if t is not None}


def op(backend: str, *, stacked: bool = False, no_plan: bool = False, **options: Any) -> Callable[..., Any]:
    def call(x: Tensor | None, agents: Tensor, **inputs: Any) -> dict[str, Tensor]:
        given = {k: inputs.pop(k) for k in PARAMETERS}
        A = len(given["biases"] if given["weights"] is None else given["weights"])
        nets = {k: () if t is None else t for k, t in given.items()} if stacked else lists(given)
        with use_backend(backend):
            plan = None if no_plan else dispatch.plan(agents, A)
            rows = agents if x is None and no_plan else x
            return results(ops.agent_policy(rows, plan, **nets, **inputs, keep_empty=True, **options))

    return call


def truth(**options: Any) -> Callable[..., Any]:
    def call(x: Tensor | None, agents: Tensor, **inputs: Any) -> dict[str, Tensor]:
        nets = lists({k: inputs.pop(k) for k in PARAMETERS})
        return results(reference.agent_policy(x, agents, *nets.values(), **inputs, **options))

    return call


def some_agents(N: int, A: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, A, (N,), generator=torch.Generator().manual_seed(seed))


def zeros_for_none(found: dict[str, Tensor | None], like: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {k: torch.zeros_like(like[k]) if t is None and like[k] is not None else t for k, t in found.items()}


# ------------------------------------------------------------------------------------------------ values, gradients


@each_backend
@each_net
@each_kind
@each_dtype
def test_values(backend: str, net: str, kind: str, dtype: torch.dtype) -> None:
    options = {"kind": kind, "temperature": 0.6}
    for N, A, F, K in ((64, 3, 9, 5),) if kind != "softmax" else ((64, 3, 9, 5), (33, 20, 33, 17), (9, 2, 3, 1)):
        cases = [case_of(some_agents(N, A, s), A, F, K, net, dtype, s) for s in range(4)]
        if dtype == F64:
            found, exact = (evaluate(fn(**options), cases[0]) for fn in (partial(op, backend), truth))
            for name, t in exact.items():
                assert_same(found[name], t, name)  # type: ignore[arg-type]
        else:
            axes = "n" if net == "tables" else "nf"
            found = check(op(backend, **options), truth(**options), cases, dtype=dtype, permute=axes, count=2)
        assert found["value"].dtype == torch.promote_types(dtype, F32)  # type: ignore[union-attr]
        agents = cases[0].inputs["agents"]
        for name in DIFFERENTIABLE:
            if name in found:
                assert not found[name][agents < 0].any()  # type: ignore[index]


@each_backend
@each_histogram
@pytest.mark.parametrize("stacked", [False, True], ids=["lists", "stacked"])
def test_histograms(backend: str, histogram: list[int], stacked: bool) -> None:
    A = len(histogram) - 1
    for net in NETS:
        if stacked and net == "table-and-state-value":
            continue
        case = case_of(actions_of(histogram), A, 6, 4, net, F64)
        found, exact = evaluate(op(backend, stacked=stacked), case), evaluate(truth(), case)
        for name, t in exact.items():
            assert_same(found[name], t, name)  # type: ignore[arg-type]


@each_backend
@each_net
def test_one_agent_needs_no_plan(backend: str, net: str) -> None:
    case = case_of(torch.zeros(37, dtype=torch.int64), 1, 7, 5, net, F64)
    for stacked in (False, True):
        found, exact = evaluate(op(backend, no_plan=True, stacked=stacked), case), evaluate(truth(), case)
        for name, t in exact.items():
            assert_same(found[name], t, name)  # type: ignore[arg-type]


@each_backend
@each_kind
@pytest.mark.parametrize("net", ["critic", "state-value", "tables"])
def test_gradcheck(backend: str, kind: str, net: str) -> None:
    gradcheck(op(backend, kind=kind, temperature=0.7), case_of(some_agents(6, 2), 2, 3, 4, net))


@each_backend
@pytest.mark.parametrize("only", DIFFERENTIABLE)
def test_any_output_alone_may_have_the_gradient(backend: str, only: str) -> None:
    agents = torch.tensor([0, 2, 1, 0, -1, 2, 0])
    case = case_of(agents, 3, 4, 5, "critic", F64)
    case.cotangents.pop("value")
    for name in DIFFERENTIABLE:
        case.cotangents.pop(name, None)
    case.cotangents[only] = torch.randn(7 if only in ("value", "critic_at") else (7, 5), dtype=F64)  # type: ignore[arg-type]
    found, exact = evaluate(op(backend), case), evaluate(truth(), case)
    for name, t in exact.items():
        if t is None:
            assert found[name] is None, name
        else:
            assert_same(found[name], t, name)  # type: ignore[arg-type]
