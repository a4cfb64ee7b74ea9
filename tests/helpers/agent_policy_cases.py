"""Calls of ``agent_policy`` as cases, and its definition, for every backend.

Axes: N (n) rows, A (a) agents, F (f) features in, K (k) choices, C (c) outputs of a critic: K, or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import functional, use_backend
from fastroute.ops import dispatch
from fastroute.ops.agent_policy import reference as reference
from fastroute.ops.agent_policy.op import AgentChoice
from fastroute.ops.policy.op import KINDS
from tests.helpers.cases import Case

from . import seeds

F32, F64 = torch.float32, torch.float64

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
each_kind = pytest.mark.parametrize("kind", KINDS)


def case_of(
    agents: Tensor, A: int, F: int, K: int, net: str = "critic", dtype: torch.dtype = F32, seed: int = 0,
    device: str = "cpu",
) -> Case:  # fmt: skip
    """Of forced actions, some negative: then no rounding can change a choice. Parameters are stacked: [A, ...]."""
    generator = seeds.generator(seed)
    has, C = NETS[net]["has"], NETS[net].get("outputs", K)
    N, acc = len(agents), torch.promote_types(dtype, F32)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(device, to)

    shapes = dict(zip(PARAMETERS, ((A, K, F), (A, K), (A, C, F), (A, C)), strict=True))
    parameters = {k: normal(*shapes[k]) if wanted else None for k, wanted in zip(PARAMETERS, has, strict=True)}
    inputs = {"x": normal(N, F) if has[0] or has[2] else None, **parameters, "agents": agents.to(device)}
    inputs["forced"] = torch.randint(-1, K, (N,), generator=generator).to(device)
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
        with use_backend("reference" if backend == "triton" else backend):
            plan = None if no_plan else dispatch.plan(agents, A)
        with use_backend(backend):
            rows = agents if x is None and no_plan else x
            return results(functional.agent_policy(rows, plan, **nets, **inputs, keep_empty=True, **options))

    return call


def truth(**options: Any) -> Callable[..., Any]:
    def call(x: Tensor | None, agents: Tensor, **inputs: Any) -> dict[str, Tensor]:
        nets = lists({k: inputs.pop(k) for k in PARAMETERS})
        return results(reference.agent_policy(x, agents, *nets.values(), **inputs, **options))

    return call


def some_agents(N: int, A: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, A, (N,), generator=seeds.generator(seed))
