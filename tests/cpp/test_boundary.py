"""C++ does not trust its caller: arguments that do not fit are errors, whoever calls ``torch.ops.fastroute``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastroute import functional, use_backend
from fastroute.ops import dispatch
from tests.cpp import boundary
from tests.helpers.backends import needs_native
from tests.helpers.subprocesses import check_python, run_python

pytestmark = needs_native

F64 = torch.float64
OPS = torch.ops.fastroute
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_plan_of_actions_of_any_integer_dtype(dtype: torch.dtype, backend: str) -> None:
    actions = torch.tensor([2, 0, 1, 1, 2, 0, 0])
    x, weights = torch.randn(7, 6), torch.randn(300, 4, 6)
    with use_backend(backend):
        found, expected = dispatch.plan(actions.to(dtype), 300), dispatch.plan(actions, 300)
        assert torch.equal(found.order, expected.order) and torch.equal(found.offsets, expected.offsets)
        y = functional.grouped_linear(x, found, weights)
    torch.testing.assert_close(y, torch.einsum("nf,nof->no", x, weights[actions]))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64], ids=str)
def test_a_plan_takes_integers_only(dtype: torch.dtype, backend: str) -> None:
    with use_backend(backend), pytest.raises(TypeError, match="actions: expected an integer tensor"):
        dispatch.plan(torch.ones(4, dtype=dtype), 3)


def test_a_plan_of_a_million_bytes() -> None:
    check_python(
        "import torch, fastroute\nfrom fastroute.ops import dispatch\n"
        "actions = torch.arange(10**6).to(torch.uint8) % 3\n"
        "with fastroute.use_backend('native'):\n"
        "    assert torch.equal(dispatch.plan(actions, 3).order, actions.long().argsort(stable=True))"
    )


def test_an_absent_list_is_an_empty_one() -> None:
    """AOTInductor's packages give None for a list without tensors: every list is ``Tensor[]?``."""
    met = set()
    for name, calls in boundary.valid_calls().items():
        (schema,) = torch._C._jit_get_schemas_for_operator(f"fastroute::{name}")
        kinds = [str(argument.type) for argument in schema.arguments]
        assert "List[Tensor]" not in kinds, name
        for args in calls:
            absent = [k for k, kind in enumerate(kinds) if kind == "Optional[List[Tensor]]" and not args[k]]
            if absent:
                met.add(name)
                given = [None if k in absent else arg for k, arg in enumerate(args)]
                made, expected = (tree_leaves(getattr(OPS, name)(*each)) for each in (given, args))
                assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True)), name
    assert {"_agent_policy_native", "_grouped_linear_native", "_trajectory_loss_native"} <= met


def test_a_call_loads_the_extension() -> None:
    """Of a program that was exported elsewhere: nothing but the import has been done."""
    check_python(
        "import torch, fastroute\nop = torch.ops.fastroute._dispatch_plan_native\n"
        "try:\n    op(torch.sparse_coo_tensor(size=(3,)), 3)\n"
        "except NotImplementedError as error:\n    assert 'has no C++ for these tensors' in str(error), error\n"
        "else:\n    raise AssertionError\n"
        "assert op(torch.tensor([1, 0, 1]), 2)[0].tolist() == [1, 0, 2]"
    )


def zeros(*sizes: int) -> Tensor:
    return torch.zeros(sizes, dtype=F64)


def plan(**changes: Any) -> None:
    given = {"actions": torch.tensor([0, 1, 2]), "modules": 3, **changes}
    OPS._dispatch_plan_native(*given.values())


def linear(**changes: Any) -> None:
    rows = {"x": zeros(3, 4), "take": torch.arange(3), "put": torch.arange(3), "offsets": torch.tensor([0, 2, 3])}
    modules = {"weights": [zeros(5, 4)] * 2, "biases": [zeros(5)] * 2, "activation": 0, "keep": False}
    OPS._grouped_linear_native(*{**rows, **modules, **changes}.values())


def policy_gradient(**changes: Any) -> None:
    given = {
        "grad": zeros(3),
        "scores": zeros(3, 2),
        "actions": torch.tensor([0, 1, -1]),
        "kind": 0,
        "t": 1.0,
        **changes,
    }
    OPS._policy_native_backward(*given.values())


def mask(**changes: Any) -> None:
    given = {
        "g": zeros(2, 3),
        "y": None,
        "mapping": torch.ones(4, 3),
        "tasks": torch.tensor([0, 9]),
        "task": 0,
        **changes,
    }
    OPS._task_mask_gate_native(*given.values())


def mask_(x: Tensor) -> None:
    OPS._task_mask_mask__native(x, torch.ones(4, 3), None, 0, False)


def loss(layout: list[int]) -> None:
    OPS._trajectory_loss_native(zeros(3), [zeros(3)], [], [], layout, 1.0, False, True)


def vector(**changes: Any) -> None:
    given = dict.fromkeys(("gate_weight", "gate_bias", "scale", "pred", "score_weight", "score_bias"))
    after = {"use": zeros(3, 2), **dict.fromkeys(("ign", "use_bias", "ign_bias"))}
    last = {"prior": zeros(2), "mask": None, "lengths": None}
    first = {"x": zeros(2, 3, 4), "gate": zeros(2, 3)}
    OPS._vector_routing_native(*{**first, **given, **after, **last, **changes}.values())


def routed(**changes: Any) -> None:
    per_row = {"W_S": zeros(3, 2), "B_S": zeros(3, 2), "beta_use": zeros(3, 2), "beta_ign": zeros(3, 2)}
    outputs = {"W_F1": zeros(2, 4), "W_F2": zeros(4, 5), "B_F2": zeros(2, 5)}
    predictions = {"W_G1": zeros(5, 4), "W_G2": zeros(2, 4), "B_G2": zeros(2, 4)}
    gates = {"x": zeros(2, 3, 4), "W_A": zeros(3, 4), "B_A": zeros(3)}
    last = {"bias_use": None, "bias_ign": None, "prior": zeros(2), "mask": None, "lengths": None}
    last |= {"n_iters": 2, "normalize": True}
    OPS._efficient_routing_native(*{**gates, **outputs, **predictions, **per_row, **last, **changes}.values())


def matrix(**changes: Any) -> None:
    given = {
        "gate": zeros(2, 3),
        "mu_inp": zeros(2, 3, 2, 2),
        "W": zeros(3, 4, 2, 2),
        "bias": zeros(3, 4, 2, 2),
        "use": zeros(3, 4),
        "ign": zeros(3, 4),
        "mask": None,
        "prior": None,
        "mu": None,
        "weight": None,
        **changes,
    }
    OPS._matrix_routing_native(*given.values())


def votes(**changes: Any) -> None:
    given = {
        "votes": zeros(2, 3, 4, 5),
        "scores": zeros(2, 3, 4),
        "gate": None,
        "use": None,
        "ign": None,
        "prior": None,
        "mask": None,
        "lengths": None,
        "eps": 0.0,
        "mean": False,
        **changes,
    }
    OPS._soft_assignment_native(*given.values())


#: What each call names as wrong. Without a check each would read or write elsewhere, or give numbers of no meaning.
WRONG: dict[str, tuple[Callable[[], None], str]] = {
    "plan int32": (lambda: plan(actions=torch.zeros(3, dtype=torch.int32)), "actions: expected Long, got Int"),
    "plan uint8": (lambda: plan(actions=torch.zeros(3, dtype=torch.uint8)), "actions: expected Long, got Byte"),
    "plan 2d": (lambda: plan(actions=torch.zeros(3, 2, dtype=torch.int64)), "actions: expected sizes"),
    "plan negative": (lambda: plan(modules=-2), "modules: expected 0 to"),
    "plan absurd": (lambda: plan(modules=2**62), "modules: expected 0 to"),
    "plan meta": (lambda: linear(put=torch.arange(3, device="meta")), "one device"),
    "take": (lambda: linear(take=torch.tensor([0, 1, 3])), "take: expected indices from 0 to 2"),
    "put twice": (lambda: linear(put=torch.tensor([0, 1, 1])), "put: expected each of 0 to 2 once"),
    "offsets": (lambda: linear(offsets=torch.tensor([0, 2, 4])), "offsets: expected numbers from 0"),
    "offsets fall": (lambda: linear(offsets=torch.tensor([0, 3, 2])), "offsets: expected numbers from 0"),
    "no modules": (lambda: linear(weights=[], biases=[]), "weights: expected some"),
    "fewer biases": (lambda: linear(biases=[zeros(5)]), "biases: expected 2, got 1"),
    "another dtype": (lambda: linear(weights=[zeros(5, 4), zeros(5, 4).float()]), "weights: expected Double"),
    "another width": (lambda: linear(x=zeros(3, 3)), "x: expected sizes"),
    "columns": (lambda: linear(x=zeros(4, 3).mT), "x: expected a contiguous last axis"),
    "activation": (lambda: linear(activation=99), "activation: there is none"),
    "nothing to keep": (lambda: linear(keep=True), "activation: expected one to keep for"),
    "no choices": (lambda: policy_gradient(scores=zeros(3, 0)), "scores: expected at least one choice"),
    "action": (lambda: policy_gradient(actions=torch.tensor([0, 1, 2])), "actions: expected indices"),
    "kind": (lambda: policy_gradient(kind=3), "kind: expected 0 to 2"),
    "expanded grad": (lambda: policy_gradient(grad=zeros(1).expand(3)), "grad: expected a contiguous"),
    "short y": (lambda: mask(y=zeros(1, 3)), "y: expected"),
    "fewer tasks": (lambda: mask(tasks=torch.tensor([0])), "task: expected sizes"),
    "no such task": (lambda: mask(tasks=None, task=4), "task: expected 0 to 3, got 4"),
    "no memory": (lambda: mask(g=boundary.freed(zeros(2, 3))), "x: expected a tensor whose memory is there"),
    "one axis": (lambda: mask(g=zeros(3)), "x: expected .B, C"),
    "in one place": (lambda: mask_(zeros(2, 1).expand(2, 3)), "x: expected every number in a place of its own"),
    "layout": (lambda: loss([0, 3, 0, -1, -1, -1, -1]), "layout: expected 8 numbers"),
    "column": (lambda: loss([0, 3, 1, -1, -1, -1, -1, -1]), "layout: expected places"),
    "no second column": (lambda: loss([6, 3, 0, -1, -1, -1, -1, -1]), "layout: expected the columns"),
    "unknown kind": (lambda: loss([15, 3, 0, -1, -1, -1, -1, -1]), "layout: there is no kind"),
    "no gate": (lambda: vector(gate=None), "gate: expected one"),
    "mask of bytes": (lambda: vector(mask=torch.zeros(2, 3, 2, dtype=torch.uint8)), "mask: expected Bool"),
    "fewer lengths": (lambda: vector(lengths=torch.tensor([3])), "lengths: expected sizes"),
    "fewer rows": (lambda: vector(use=zeros(2, 2)), "use: expected sizes"),
    "no prior": (lambda: vector(prior=None), "pred: expected with score_weight, or a prior"),
    "one gate for all": (lambda: routed(W_A=zeros(1, 4)), "W_A: expected sizes"),
    "no iteration": (lambda: routed(n_iters=0), "n_iters: expected at least 1"),
    "no inputs": (lambda: routed(x=zeros(2, 0, 4)), "expected none empty"),
    "halves": (lambda: routed(x=zeros(2, 3, 4).half()), "x: expected another dtype"),
    "bfloat16 beside float64": (lambda: routed(x=zeros(2, 3, 4).bfloat16()), "W_A: expected Float, got Double"),
    "one bias": (lambda: routed(bias_use=zeros(2)), "bias_use, bias_ign: expected both or neither"),
    "biases of no linear betas": (
        lambda: routed(bias_use=zeros(2), bias_ign=zeros(2)), "W_A: expected sizes 1 4, got 3 4"
    ),
    "a mask of numbers": (lambda: routed(mask=zeros(2, 3, 2)), "mask: expected Bool, got Double"),
    "a mask of inputs": (lambda: routed(mask=torch.ones(2, 3, dtype=torch.bool)), "mask: expected sizes 2 3 2"),
    "lengths of no dtype": (lambda: routed(lengths=zeros(2)), "lengths: expected Long, got Double"),
    "a length too few": (lambda: routed(lengths=torch.tensor([3])), "lengths: expected sizes 2"),
    "two dtypes": (lambda: routed(B_S=zeros(3, 2).float()), "B_S: expected Double, got Float"),
    "columns first": (lambda: routed(W_F2=zeros(5, 4).mT), "W_F2: expected a contiguous tensor"),
    "empty capsules": (lambda: matrix(mu_inp=zeros(2, 0, 2, 2)), "expected"),
    "half of the parameters": (lambda: matrix(W=zeros(3, 4, 2, 2).bfloat16()), "W: expected Double"),
    "mu without weight": (lambda: matrix(prior=zeros(2, 4), mu=zeros(2, 4, 2, 2)), "prior: expected with mu"),
    "other samples": (lambda: votes(votes=zeros(3, 3, 4, 5)), "votes: expected sizes"),
    "neither": (lambda: votes(scores=None), "scores: expected some"),
    "no variants": (lambda: OPS._choose_isa("auto", []), "here: expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((RuntimeError, ValueError), match=message):
        call()


def test_what_is_written_is_apart() -> None:
    """An output that is also an input, or another output."""
    for args in boundary.valid_calls()["_vector_routing_native_backward"][:4]:
        x, dgate, dx = 0, 18, 19
        assert args[dx] is not None
        for k, other in ((dx, args[x]), (dgate, args[1])):
            with pytest.raises(RuntimeError, match="memory of its own"):
                OPS._vector_routing_native_backward(*args[:k], other, *args[k + 1 :])


def test_every_op_is_called_and_has_its_reference() -> None:
    calls = boundary.valid_calls()
    assert calls.keys() == set(boundary.names()) and all(calls.values())
    assert calls.keys() - boundary.REFERENCE.keys() == {"_matrix_routing_native_backward"}
    for name, some in calls.items():
        for args in some:
            boundary.compare(name, args, boundary.outcome(name, getattr(OPS, name), args))


def fuzz(calls: int, trace: Path, library: str = "", environment: dict[str, str | None] | None = None) -> None:
    """In a process of its own, which may crash."""
    code = f"import sys; sys.argv = ['boundary', {str(calls)!r}, {str(trace)!r}, *{[library] if library else []!r}]\n"
    code += "import runpy; runpy.run_module('tests.cpp.boundary', run_name='__main__')"
    ran = run_python(code, environment, timeout=3600)
    last = trace.read_text() if trace.exists() else "none"
    assert ran.returncode == 0, f"exit status {ran.returncode}; last call: {last}\n{ran.stderr[-6000:]}"
    raised, accepted = (int(word) for word in ran.stdout.split() if word.isdigit())
    assert min(raised, accepted) > calls // 20, ran.stdout


def test_random_calls_raise_or_are_right(tmp_path: Path) -> None:
    fuzz(300, tmp_path / "trace")


@pytest.mark.long
def test_many_random_calls_raise_or_are_right(tmp_path: Path) -> None:
    fuzz(100_000, tmp_path / "trace")
