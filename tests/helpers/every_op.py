"""A call of each op that has kernels, large enough to be divided among threads, on the native backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastroute import functional, use_backend
from fastroute.ops import dispatch
from fastroute.ops.policy.contract import KINDS as POLICIES
from fastroute.ops.trajectory_loss.contract import ALGORITHMS as LOSSES
from tests.helpers import agent_policy_cases, assignment_cases, matrix_cases, routing_cases
from tests.helpers.cases import Case, Results, evaluate
from tests.helpers.trajectory_losses import loss_case, loss_op

F64 = torch.float64


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=F64)


def _integers(below: int, count: int) -> Tensor:
    return torch.randint(-1, below, (count,), generator=torch.Generator().manual_seed(0))


def _linear_case() -> Case:
    inputs = {"actions": _integers(5, 3000), "x": _normal(3000, 33), "W": _normal(5, 50, 33), "b": _normal(5, 50)}
    return Case(inputs, {"y": _normal(3000, 50)}, {}, ("x", "W", "b"))


def _linear(actions: Tensor, x: Tensor, W: Tensor, b: Tensor) -> dict[str, Tensor]:
    plan = dispatch.plan(actions, len(W))
    y = functional.grouped_linear(x, plan, W, b, activation="silu", keep_empty=True)
    return {"order": plan.order, "offsets": plan.offsets, "y": y}


def _policy(scores: Tensor, forced: Tensor) -> dict[str, Tensor]:
    return {kind: functional.policy(scores, forced=forced, kind=kind, temperature=0.7).value for kind in POLICIES}


def _policy_case() -> Case:
    values = {kind: _normal(3000) for kind in POLICIES}
    return Case({"scores": _normal(3000, 20), "forced": _integers(20, 3000)}, values, {}, ("scores",))


def _masked(inputs: dict[str, Tensor | None]) -> Case:
    x = _normal(9, 33, 17, 16)
    mapping, tasks = (_normal(4, 33) > 0).double(), torch.arange(9) % 4
    wrt = "x", *(k for k in inputs if k in ("weight", "bias"))
    return Case({"x": x, "mapping": mapping, "task": tasks, **inputs}, {"y": _normal(9, 33, 17, 16)}, {}, wrt)


def _mask(**inputs: Any) -> dict[str, Tensor]:
    return {"y": functional.task_mask(**inputs, relu=True)}


def _batch_norm(mean: Tensor, var: Tensor, **inputs: Any) -> dict[str, Tensor]:
    running = {"running_mean": mean.clone(), "running_var": var.clone()}
    return {"y": functional.batch_norm_mask_relu(**inputs, **running, training=True, momentum=0.1, eps=1e-5), **running}


#: By the op's name: how it is called, and a float64 call.
EVERY_OP: dict[str, tuple[Callable[..., Any], Callable[[], Case]]] = {
    "vector_routing": (
        routing_cases.vector_op,
        lambda: routing_cases.vector_case(routing_cases.Size(2, 900, 40, 48), dtype=F64),
    ),
    "efficient_routing": (
        routing_cases.efficient_op(),
        lambda: routing_cases.efficient_case(routing_cases.Size(2, 600, 40, 48, 64), dtype=F64),
    ),
    "matrix_routing": (
        matrix_cases.matrix_op(),
        lambda: matrix_cases.matrix_case(matrix_cases.Size(2, 300, 20, 2, 3, 4), dtype=F64),
    ),
    "soft_assignment": (
        assignment_cases.op("native", "routing"),
        lambda: assignment_cases.case_of("routing", (2, 700, 20, 32), dtype=F64),
    ),
    "grouped_linear": (_linear, _linear_case),
    "policy": (_policy, _policy_case),
    "agent_policy": (
        agent_policy_cases.op("native"),
        lambda: agent_policy_cases.case_of(agent_policy_cases.some_agents(900, 5), 5, 17, 20, dtype=F64),
    ),
    "trajectory_loss": (loss_op("native", LOSSES), lambda: loss_case(LOSSES, 3000, F64)),
    "task_mask": (_mask, lambda: _masked({})),
    "batch_norm_mask_relu": (
        _batch_norm,
        lambda: _masked({"mean": _normal(33), "var": _normal(33).abs(), "weight": _normal(33), "bias": _normal(33)}),
    ),
}


def _same_bits(a: Results, b: Results) -> list[str]:
    """What differs. NaN would be equal to itself."""
    assert a.keys() == b.keys()
    return [k for k, t in a.items() if (t is None) != (b[k] is None) or (t is not None and not torch.equal(t, b[k]))]  # type: ignore[arg-type]


def save_results(path: Path) -> None:
    """Of every op in float64, after a check that neither its nor float32's bits depend on the number of threads."""
    found = {}
    for name, (fn, case) in EVERY_OP.items():
        for dtype in (torch.float32, F64):
            made = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                with use_backend("native"):
                    made.append(evaluate(fn, case().to(dtype)))
            for other in made[1:]:
                assert not (differ := _same_bits(made[0], other)), f"{name}, {dtype}: {differ}"
        found[name] = made[0]
    torch.save(found, path)
