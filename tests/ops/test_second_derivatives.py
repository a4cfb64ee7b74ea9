"""Second derivatives and torch.func of every op, on every backend: kernels have neither, plain PyTorch takes over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import functional, use_backend
from fastroute.ops import dispatch
from fastroute.ops.trajectory_loss.reference import trajectory_loss
from tests.helpers import seeds
from tests.helpers.backends import HERE
from tests.helpers.cases import Case
from tests.helpers.matrix_cases import Size as MatrixSize
from tests.helpers.matrix_cases import matrix_case, matrix_op
from tests.helpers.routing_cases import Size, efficient_case, efficient_op, some_mask, vector_case, vector_op

from .expert_ffn import test_op as test_expert_ffn
from .grouped_linear import test_op as test_grouped_linear

F64 = torch.float64
Op = Callable[..., Mapping[str, Tensor | None]]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeds.generator(seed), dtype=F64)


def plain_case(wrt: tuple[str, ...], **inputs: Tensor | None) -> Case:
    return Case(inputs, {}, {}, wrt)


def masked_batch_norm(training: bool) -> Op:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        mapping, task = (rand(3, 4, seed=5) > 0).to(F64), torch.tensor([0, 2, 1, 1, 0])
        running = None if training else rand(4), None if training else rand(4).square() + 0.5
        args = mapping, task, *running, weight, bias, training, 0.1, 1e-5
        return {"y": functional.batch_norm_mask_relu(x, *args)}

    return call


def masked(relu: bool) -> Op:
    mapping, task = (rand(3, 4, seed=5) > 0).to(F64), torch.tensor([0, 2, 1, 1, 0])
    return lambda x: {"y": functional.task_mask(x.tanh(), mapping, task, relu=relu)}


def policy(kind: str) -> Op:
    forced = torch.tensor([0, 2, -1, 1, 0])
    return lambda scores: {"value": functional.policy(scores, forced=forced, kind=kind).value}


def agent_policy(stacked: bool) -> Op:
    agents, forced = torch.tensor([0, 1, -1, 1, 0]), torch.tensor([0, 2, 1, 1, 0])

    def call(x: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor) -> dict[str, Tensor | None]:
        nets = [t if stacked else list(t.unbind()) for t in (W, b, V, c)]
        made = functional.agent_policy(
            x, dispatch.plan(agents, 2), *nets[:2], critic_weights=nets[2], critic_biases=nets[3], forced=forced
        )
        return {"value": made.value, "scores": made.scores, "critic": made.critic, "critic_at": made.critic_at}

    return call


def loss_by(of: Callable[..., Tensor]) -> Op:
    def call(s0: Tensor, s1: Tensor) -> dict[str, Tensor]:
        kinds = ("ActorCritic", "WPL", "QLearning")
        rows = list(s0.unbind()), list(s1.unbind()), [rand(5, seed=6 + t) for t in range(3)]
        nothing = [None] * 3
        return {"loss": of(kinds, *rows, nothing, nothing, nothing, rand(5, seed=9), 0.9, choices=[3] * 3)}

    return call


def combine(z: Tensor, weights: Tensor) -> dict[str, Tensor]:
    return {"y": functional.combine(z, weights, rand(5, 2, seed=3) > -0.5)}


SMALL = Size(2, 5, 3, 4, 3)
LINEAR = {"x", "W0", "W1", "W2", "b0", "b1", "b2"}
CASES: dict[str, tuple[Op, Case]] = {
    "vector_routing, first": (vector_op, vector_case(SMALL, first=True, dtype=F64)),
    "vector_routing, next": (vector_op, vector_case(SMALL, dtype=F64, lengths=[5, 3], mask=some_mask(2, 5, 3))),
    "vector_routing, linear": (vector_op, vector_case(SMALL, linear=True, dtype=F64)),
    "efficient_routing": (efficient_op(2), efficient_case(SMALL, dtype=F64)),
    "efficient_routing, gram": (efficient_op(2), efficient_case(SMALL, linear=True, dtype=F64, lengths=[5, 3])),
    "matrix_routing": (matrix_op(2), matrix_case(MatrixSize(2, 5, 3, 2, 2, 2), dtype=F64)),
    "soft_assignment": (
        lambda **t: {"y": functional.soft_assignment(**t)},
        plain_case(
            ("scores", "votes", "gate"), scores=rand(2, 5, 3), votes=rand(2, 5, 3, 4), gate=rand(2, 5).sigmoid()
        ),
    ),
    "expert_ffn": (test_expert_ffn.op("auto"), test_expert_ffn.ffn_case(test_expert_ffn.ACTIONS["mixed"], dtype=F64)),
    "grouped_linear": (
        test_grouped_linear.op("auto", activation="silu"), test_grouped_linear.linear_case([2, 0, 3], dtype=F64)
    ),
    "grouped_linear, stacked": (
        test_grouped_linear.op("auto", activation="tanh", stacked=True),
        test_grouped_linear.linear_case([2, 0, 3], dtype=F64),
    ),
    "combine": (combine, plain_case(("z", "weights"), z=rand(5, 2, 3), weights=rand(5, 2, seed=1))),
    **{
        f"policy, {kind}": (policy(kind), plain_case(("scores",), scores=rand(5, 3)))
        for kind in ("softmax", "shifted", "score")
    },
    **{
        f"agent_policy{', stacked' * stacked}": (
            agent_policy(stacked),
            plain_case(
                ("x", "W", "b", "V", "c"), x=rand(5, 4), W=rand(2, 3, 4), b=rand(2, 3), V=rand(2, 3, 4, seed=2),
                c=rand(2, 3, seed=2),
            ),
        )
        for stacked in (False, True)
    },
    "trajectory_loss": (
        loss_by(functional.trajectory_loss), plain_case(("s0", "s1"), s0=-rand(3, 5).square(), s1=rand(3, 5, seed=1))
    ),
    "task_mask": (masked(False), plain_case(("x",), x=rand(5, 4, 2))),
    "task_mask, relu": (masked(True), plain_case(("x",), x=rand(5, 4, 2))),
    **{
        f"batch_norm_mask_relu, {name}": (
            masked_batch_norm(name == "training"),
            plain_case(("x", "weight", "bias"), x=rand(5, 4, 2), weight=rand(4).exp(), bias=rand(4, seed=1)),
        )
        for name in ("training", "evaluation")
    },
}  # fmt: skip


def function(name: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    op, case = CASES[name]
    names = [k for k in case.wrt if case.inputs[k] is not None]

    def f(*given: Tensor) -> tuple[Tensor, ...]:
        made = op(**{**case.inputs, **dict(zip(names, given, strict=True))})
        return tuple(t for t in made.values() if t is not None and t.is_floating_point())

    return f, [case.inputs[k].detach().clone() for k in names]  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", [k for k in CASES if k != "trajectory_loss"])
def test_second_derivative(name: str, backend: str) -> None:
    f, given = function(name)
    with use_backend(backend):
        assert torch.autograd.gradgradcheck(f, [t.requires_grad_() for t in given], fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("backend", HERE)
def test_second_derivative_of_a_trajectory_loss(backend: str) -> None:
    """Its targets are constants to a first derivative, which so is no derivative to differences: to the definition."""
    _, given = function("trajectory_loss")

    def second(op: Op) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in given]
        made = torch.autograd.grad(op(*leaves)["loss"], leaves, rand(5, seed=4), create_graph=True)  # type: ignore[arg-type]
        total = sum(((g * rand(3, 5, seed=8 + i)).sum() for i, g in enumerate(made)), leaves[0].new_zeros(()))
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]

    with use_backend(backend):
        found = second(loss_by(functional.trajectory_loss))
    for a, b in zip(found, second(loss_by(trajectory_loss)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert any(t.any() for t in found)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", CASES)
def test_transforms(name: str, backend: str) -> None:
    """grad, jvp and many gradients at a time, against autograd's of one."""
    f, given = function(name)
    with use_backend(backend):
        outputs = f(*[t.requires_grad_() for t in given])
        back = [rand(*y.shape, seed=4) for y in outputs]
        expected = torch.autograd.grad(outputs, given, back, retain_graph=True, allow_unused=True)
        many = torch.autograd.grad(
            outputs, given, [torch.stack([g, 2 * g]) for g in back], is_grads_batched=True, allow_unused=True
        )
        given = [t.detach() for t in given]

        def weighed(*x: Tensor) -> Tensor:
            return sum(((y * g).sum() for y, g in zip(f(*x), back, strict=True)), back[0].new_zeros(()))

        found = torch.func.grad(weighed, tuple(range(len(given))))(*given)
        v = tuple(rand(*t.shape, seed=7) for t in given)
        _, slope = torch.func.jvp(weighed, tuple(given), v)
    close: Any = torch.testing.assert_close
    total = torch.zeros((), dtype=F64)
    for t, g, both, again, direction in zip(given, expected, many, found, v, strict=True):
        g = torch.zeros_like(t) if g is None else g
        close(again, g, rtol=1e-9, atol=1e-10)
        if both is not None:
            close(both, torch.stack([g, 2 * g]), rtol=1e-9, atol=1e-10)
        total = total + (g * direction).sum()
    close(slope, total, rtol=1e-9, atol=1e-10)
