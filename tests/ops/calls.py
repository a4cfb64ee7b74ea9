"""A call of every op of ``fastroute.functional`` in any size, for tests that go over all ops.

Axes: b samples, n input vectors (or features), m output vectors (or choices), d width of an input, h of an output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastroute import functional
from fastroute.ops import dispatch
from fastroute.ops.activations import ACTIVATIONS
from fastroute.ops.policy.contract import KINDS as POLICIES
from fastroute.ops.trajectory_loss.contract import ALGORITHMS as LOSSES
from tests.helpers import agent_policy_cases, assignment_cases, matrix_cases, routing_cases, seeds
from tests.helpers.cases import Case, Function
from tests.helpers.routing_cases import Size
from tests.helpers.trajectory_losses import arguments, loss_case, loss_truth

MODULES = 3
#: Numbers that every piece and every thread has some of, however wide they are.
MANY = 1 << 19


class Call(NamedTuple):
    op: str  #: of ``fastroute.functional``
    fn: Function
    case: Callable[[Size, torch.dtype], Case]
    constants: tuple[str, ...] = ()  #: inputs that have no gradient, as the op's page says
    truth: Function | None = None  #: the definition, where its gradient is not the derivative: something is held fixed


def numbers(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Normal ones."""
    generator = seeds.generator(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _fewer(size: Size) -> Size:
    """For tensors of b * m * n * d numbers: so few n that these are not many more than :data:`MANY`."""
    return size._replace(n=min(size.n, 1 + MANY // (size.b * size.m * size.d)))


def _plan(rows: int, per_sample: int = 1) -> dispatch.Plan:
    actions = torch.randint(-1, MODULES, (rows, per_sample), generator=seeds.generator(1))
    return dispatch.plan(actions if per_sample > 1 else actions[:, 0], MODULES)


def _vector(**options: Any) -> Callable[[Size, torch.dtype], Case]:
    def case(size: Size, dtype: torch.dtype) -> Case:
        made = routing_cases.vector_case(size, dtype=dtype, **options)
        return replace(made, wrt=(*made.wrt, "prior")) if options.get("first") else made

    return case


def _efficient(**options: Any) -> Callable[[Size, torch.dtype], Case]:
    return lambda size, dtype: routing_cases.efficient_case(size, dtype=dtype, **options)


def _learned_prior(size: Size, dtype: torch.dtype) -> Case:
    case = routing_cases.efficient_case(size, dtype=dtype)
    return replace(case, wrt=(*case.wrt, "prior"))


def _matrix(size: Size, dtype: torch.dtype) -> Case:
    b, n, m, d, h = size
    return matrix_cases.matrix_case(matrix_cases.Size(b, n, m, 2, min(d, 5), min(h, 5)), dtype=dtype)


def _assignment(form: str, shared: str = "") -> Callable[[Size, torch.dtype], Case]:
    def case(size: Size, dtype: torch.dtype) -> Case:
        made: Case = assignment_cases.case_of(form, _fewer(size)[:4], shared, dtype=dtype)
        return replace(made, wrt=(*made.wrt, "prior")) if form == "first" else made

    return case


def _with_cotangent(fn: Function, inputs: dict[str, Tensor | None], *wrt: str) -> Case:
    with torch.no_grad():
        outputs = {k: t for k, t in fn(**inputs).items() if t is not None and t.is_floating_point()}
    made = {k: numbers(t.dtype)(*t.shape) for k, t in outputs.items()}
    return Case(inputs, made, {}, wrt)


def _linear(activation: str) -> Function:
    def call(x: Tensor, W: Tensor, b: Tensor) -> dict[str, Tensor]:
        made = functional.grouped_linear(x, _plan(x.shape[0]), W, b, activation=activation)
        return {"y": made}

    return call


def _linear_case(size: Size, dtype: torch.dtype) -> Case:
    b, n, m, d, _ = size
    normal = numbers(dtype)
    inputs = {"x": normal(b * n, d), "W": normal(MODULES, m, d), "b": normal(MODULES, m)}
    return _with_cotangent(_linear("none"), inputs, *inputs)


def _ffn(activation: str, gated: bool) -> Function:
    def call(x: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> dict[str, Tensor]:
        plan = _plan(x.shape[0], 2)
        w_in = torch.cat([w_in, w_in.roll(1, 2)], 1) if gated else w_in
        return {"y": functional.expert_ffn(x, plan, weights, w_in, w_out, activation=activation, gated=gated)}

    return call


def _ffn_case(size: Size, dtype: torch.dtype) -> Case:
    b, n, m, d, h = size
    normal = numbers(dtype)
    inputs = {
        "x": normal(b * n, d), "weights": normal(b * n, 2).sigmoid(), "w_in": normal(MODULES, m, d),
        "w_out": normal(MODULES, h, m),
    }  # fmt: skip
    return _with_cotangent(_ffn("none", False), inputs, *inputs)


def _policy(kind: str) -> Function:
    def call(scores: Tensor, uniform: Tensor, coin: Tensor) -> dict[str, Tensor]:
        made = functional.policy(scores, uniform=uniform, coin=coin, kind=kind, exploration=0.5)
        return {"value": made.value, "actions": made.actions}

    return call


def _policy_case(size: Size, dtype: torch.dtype) -> Case:
    b, n, m, _, _ = size
    normal = numbers(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    draws = normal(b * n, m).sigmoid().to(wide), normal(b * n).sigmoid().to(wide)
    inputs = {"scores": normal(b * n, m), "uniform": draws[0], "coin": draws[1]}
    return _with_cotangent(_policy("softmax"), inputs, *inputs)


def _agents(size: Size, dtype: torch.dtype) -> Case:
    b, n, m, d, _ = size
    agents = torch.randint(-1, MODULES, (b * n,), generator=seeds.generator(1))
    return agent_policy_cases.case_of(agents, MODULES, d, m, dtype=dtype)


def _agent_policy(**inputs: Any) -> dict[str, Tensor]:
    agents = inputs.pop("agents")
    nets = {k: inputs.pop(k) for k in agent_policy_cases.PARAMETERS}
    return agent_policy_cases.results(
        functional.agent_policy(inputs.pop("x"), dispatch.plan(agents, MODULES), **nets, **inputs)
    )


def _loss(**inputs: Any) -> dict[str, Tensor]:
    return {"loss": functional.trajectory_loss(**arguments(LOSSES, inputs))}


def _loss_case(size: Size, dtype: torch.dtype) -> Case:
    case = loss_case(LOSSES, size.b * size.n, dtype)
    floats = (k for k, t in case.inputs.items() if t is not None and t.is_floating_point())
    return replace(case, wrt=tuple(floats))


def _mask(x: Tensor, mapping: Tensor, relu: bool = False) -> dict[str, Tensor]:
    return {"y": functional.task_mask(x, mapping, torch.arange(x.shape[0]) % mapping.shape[0], relu=relu)}


def _mask_case(size: Size, dtype: torch.dtype) -> Case:
    b, n, m, d, _ = _fewer(size)
    normal = numbers(dtype)
    inputs = {"x": normal(b, m, n, d), "mapping": (normal(4, m) > 0).to(dtype)}
    return _with_cotangent(_mask, inputs, *inputs)


def _norm(training: bool) -> Function:
    def call(x: Tensor, mapping: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        running = (mean.detach().clone(), var.detach().clone()) if training else (mean, var)  # written in training
        tasks = torch.arange(x.shape[0]) % mapping.shape[0]
        y = functional.batch_norm_mask_relu(x, mapping, tasks, *running, weight, bias, training, 0.1, 1e-5)
        return {"y": y}

    return call


def _norm_case(size: Size, dtype: torch.dtype) -> Case:
    b, n, m, d, _ = _fewer(size)
    normal = numbers(dtype)
    inputs = {"x": normal(b + 1, m, n, d), "mapping": (normal(4, m) > 0).to(dtype), "mean": normal(m)}
    inputs |= {"var": normal(m).abs() + 0.1, "weight": normal(m), "bias": normal(m)}
    return _with_cotangent(_norm(False), inputs, *inputs)


def _combine(z: Tensor, weights: Tensor) -> dict[str, Tensor]:
    return {"y": functional.combine(z, weights)}


def _combine_case(size: Size, dtype: torch.dtype) -> Case:
    b, n, m, d, _ = size
    normal = numbers(dtype)
    inputs = {"z": normal(b * n, m, d), "weights": normal(b * n, m)}
    return _with_cotangent(_combine, inputs, *inputs)


_RUNNING = ("mapping", "mean", "var")
#: Of every op some, in its forms.
CALLS = {
    "vector_routing": Call("vector_routing", routing_cases.vector_op, _vector()),
    "vector_routing, linear": Call("vector_routing", routing_cases.vector_op, _vector(linear=True, shared_scores=True)),
    "vector_routing, first": Call("vector_routing", routing_cases.vector_op, _vector(first=True)),
    "efficient_routing": Call("efficient_routing", routing_cases.efficient_op(), _efficient()),
    "efficient_routing, linear": Call("efficient_routing", routing_cases.efficient_op(), _efficient(linear=True)),
    "efficient_routing, learned prior": Call("efficient_routing", routing_cases.efficient_op(), _learned_prior),
    "matrix_routing": Call("matrix_routing", matrix_cases.matrix_op(), _matrix),
    **{
        f"soft_assignment, {form}{', shared votes' * bool(shared)}": Call(
            "soft_assignment", assignment_cases.of_form(form), _assignment(form, shared)
        )
        for form, shared in product(("routing", "first", "mean", "masked mean"), ("", "m"))
    },
    **{f"grouped_linear, {name}": Call("grouped_linear", _linear(name), _linear_case) for name in ACTIVATIONS},
    **{
        f"expert_ffn, {name}{', gated' * gated}": Call("expert_ffn", _ffn(name, gated), _ffn_case)
        for name, gated in product(ACTIVATIONS, (False, True))
    },
    **{f"policy, {kind}": Call("policy", _policy(kind), _policy_case, ("uniform", "coin")) for kind in POLICIES},
    "agent_policy": Call("agent_policy", _agent_policy, _agents),
    "trajectory_loss": Call(
        "trajectory_loss", _loss, _loss_case,
        ("f", *(f"{name}.{t}" for name in ("aux", "own", "look") for t in range(len(LOSSES)))), loss_truth(LOSSES),
    ),
    "task_mask": Call("task_mask", _mask, _mask_case, ("mapping",)),
    "batch_norm_mask_relu": Call("batch_norm_mask_relu", _norm(False), _norm_case, _RUNNING),
    "batch_norm_mask_relu, training": Call("batch_norm_mask_relu", _norm(True), _norm_case, _RUNNING),
    "combine": Call("combine", _combine, _combine_case),
}  # fmt: skip
assert {call.op for call in CALLS.values()} == set(functional.__all__)
