"""``trajectory_loss`` on every backend: losses and gradients against their definition, masks, and what is not a number.

That the definition is the classes' formulas is shown sample by sample in ``tests/networks/test_losses.py``.
Axes: B (b) samples, T decisions.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fastroute
from fastroute import functional, use_backend
from fastroute.ops.trajectory_loss import contract, plain
from fastroute.ops.trajectory_loss import reference as reference
from fastroute.ops.trajectory_loss.contract import AIDED, ALGORITHMS, BOOTSTRAPPING, CRITICS, SILENT
from fastroute.ops.trajectory_loss.op import laid_out
from tests.helpers import seeds, strategies
from tests.helpers.backends import HERE, each_backend, needs_native
from tests.helpers.budget import check, yardstick_of
from tests.helpers.cases import Case, evaluate
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_all_same, assert_same, check_compiled, check_exported, gradcheck, opcheck
from tests.helpers.process_wide import on_threads
from tests.helpers.trajectory_losses import LOG_P, arguments, loss_case, loss_op, loss_truth

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LEARNING = tuple(kind for kind in ALGORITHMS if kind != SILENT)
each_kind = pytest.mark.parametrize("kind", LEARNING)
each_dtype = pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=["fp32", "fp64", "bf16", "fp16"])


@each_backend
@each_kind
@each_dtype
def test_losses(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Three decisions of a class, discounted, with and without masks, and one alone."""
    for T, masked, options in ((3, True, {"gamma": 0.7}), (3, False, {"normalize": False}), (1, False, {})):
        kinds = (kind,) * T
        cases = [loss_case(kinds, 67, dtype, masked=masked, seed=seed) for seed in range(3)]
        op, truth = loss_op(backend, kinds, **options), loss_truth(kinds, **options)
        if dtype == F64:
            assert_all_same(evaluate(op, cases[0]), evaluate(truth, cases[0]))
            continue
        found = check(op, truth, cases, dtype=dtype)
        assert all(t is not None and t.dtype == dtype for t in found.values())


@each_backend
@hypothesis.given(data=st.data())
def test_mixtures(backend: str, data: st.DataObject) -> None:
    """Any classes one after another, in float64."""
    kinds = data.draw(st.lists(st.sampled_from(ALGORITHMS), min_size=1, max_size=6))
    B, seed = data.draw(st.sampled_from([0, 1, 2, 9, 300])), data.draw(strategies.seeds)
    case = loss_case(kinds, B, F64, masked=data.draw(st.booleans()), own=data.draw(st.booleans()), seed=seed)
    layout = LAYOUTS[data.draw(strategies.layouts)]
    case = case.with_inputs(**{k: None if t is None else layout(t) for k, t in case.inputs.items()})
    options = {"gamma": data.draw(st.sampled_from([1.0, 0.7, 0.0])), "normalize": data.draw(st.booleans())}
    if not case.wrt:
        made = loss_op(backend, kinds, **options)(**case.inputs)["loss"]
        assert made is not None and torch.equal(made, torch.zeros(B, dtype=F64)) and not made.requires_grad
        return
    assert_all_same(evaluate(loss_op(backend, kinds, **options), case), evaluate(loss_truth(kinds, **options), case))


@each_backend
@pytest.mark.parametrize("kind", ["REINFORCE", "REINFORCEBl1", "EGreedyREINFORCE", "QLearning", "SARSA"])
def test_gradcheck(backend: str, kind: str) -> None:
    """Of those in whose gradient nothing is held still that depends on a column."""
    gradcheck(loss_op(backend, (kind, kind), gamma=0.7), loss_case((kind, kind), 5, masked=True))


# ------------------------------------------------------------------------------------------------------------ laws


@each_backend
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_a_decision_for_nobody_is_none(backend: str, kind: str) -> None:
    """Whatever its numbers are, and exactly."""
    B, kinds = 40, ("ActorCritic", kind, "QLearning", "AAC")
    case = loss_case(kinds, B, masked=True)
    nothing = {k: torch.full((B,), math.nan) for k, t in case.inputs.items() if k.endswith(".1") and t is not None}
    nothing["active.1"] = torch.zeros(B, dtype=torch.bool)
    found = evaluate(loss_op(backend, kinds, gamma=0.7), case.with_inputs(**nothing))
    left = {0: 0, 2: 1, 3: 2}
    names = {f"{name}.{t}": f"{name}.{to}" for name in ("s0", "s1", "aux", "own", "look", "active")
             for t, to in left.items()}  # fmt: skip
    inputs = {"f": case.inputs["f"]} | {to: case.inputs[k] for k, to in names.items()}
    short = Case(inputs, case.cotangents, dict.fromkeys([*inputs, "loss"], "b"), tuple(k for k in inputs if k in (
        "s0.0", "s1.0", "s0.1", "s0.2", "s1.2")))  # fmt: skip
    expected = evaluate(loss_op(backend, ("ActorCritic", "QLearning", "AAC"), gamma=0.7), short)
    renamed = {f"d{k}": f"d{to}" for k, to in names.items()} | {"loss": "loss"}
    for name, t in found.items():
        assert t is not None
        if name.endswith(".1"):
            assert not t.any()
        else:
            assert torch.equal(t, expected[renamed[name]])  # type: ignore[arg-type]


@each_backend
def test_samples_are_apart(backend: str) -> None:
    """Batches one after another, or as one: the same bits."""
    case = loss_case(LEARNING, 30, masked=True)
    whole = evaluate(loss_op(backend, LEARNING, gamma=0.7), case)
    parts = [torch.arange(0, 7), torch.arange(7, 30)]
    made = [evaluate(loss_op(backend, LEARNING, gamma=0.7), case.select("b", part)) for part in parts]
    for name, t in whole.items():
        assert torch.equal(t, torch.cat([part[name] for part in made]))  # type: ignore[arg-type,misc]


@each_backend
def test_what_is_not_a_number_stays_in_its_sample(backend: str) -> None:
    case = loss_case(ALGORITHMS, 9, masked=True)
    op = loss_op(backend, ALGORITHMS, gamma=0.7)
    clean, others = evaluate(op, case), torch.arange(9) != 2
    for spoiled in (math.nan, math.inf):
        for name, t in case.inputs.items():
            if t is None or t.dtype == torch.bool:
                continue
            bad = t.clone()
            bad[2] = spoiled
            found = evaluate(op, case.with_inputs(**{name: bad}))
            assert all(torch.equal(found[k][others], clean[k][others]) for k in clean)  # type: ignore[index]
            on = case.inputs.get(f"active.{name[3:]}") if "." in name else None
            if name in case.wrt and (on is None or on[2]):
                assert not found["loss"][2].isfinite()  # type: ignore[index]


@each_backend
def test_a_sample_without_a_decision(backend: str) -> None:
    case = loss_case(LEARNING, 6)
    nobody = {f"active.{t}": torch.tensor([True, False] * 3) for t in range(len(LEARNING))}
    for t in evaluate(loss_op(backend, LEARNING), case.with_inputs(**nobody)).values():
        assert t is not None and t.isfinite().all() and not t[1::2].any() and t[::2].any()


@each_backend
def test_no_decisions(backend: str) -> None:
    with use_backend(backend):
        made = functional.trajectory_loss([], [], [], [], [], [], [], torch.randn(4, dtype=F64))
    assert torch.equal(made, torch.zeros(4, dtype=F64)) and not made.requires_grad


@each_backend
def test_dtypes(backend: str) -> None:
    """The result's is what its makers promote to; a gradient has its column's; integers are rewards, too."""
    case = loss_case(("AAC", "QLearning"), 8)
    wider = {"s0.0": F64, "s1.0": BF16, "f": F16, "own.0": torch.int64, "look.1": BF16}
    inputs = {k: t.to(wider.get(k, t.dtype)) if t is not None else None for k, t in case.inputs.items()}
    for changed, dtype in ((inputs, F64), (inputs | {"s0.0": case.inputs["s0.0"]}, F32)):
        case = replace(case, inputs=changed)
        found = evaluate(loss_op(backend, ("AAC", "QLearning")), case)
        assert found["loss"].dtype == dtype  # type: ignore[union-attr]
        assert all(found[f"d{k}"].dtype == case.inputs[k].dtype for k in case.wrt)  # type: ignore[union-attr]
        yardstick_of(loss_truth(("AAC", "QLearning")), case, dtype).check(found)


@each_backend
def test_what_has_a_gradient(backend: str) -> None:
    kinds = ("EGreedyAAC", "ActorCritic", "WPL")
    inputs = {k: t.requires_grad_() if t is not None and t.dtype != torch.bool else t
              for k, t in loss_case(kinds, 5, masked=True).inputs.items()}  # fmt: skip
    made = loss_op(backend, kinds)(**inputs)["loss"]
    assert made is not None
    leaves = {k: t for k, t in inputs.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(made.sum(), list(leaves.values()), allow_unused=True)
    assert [k for k, g in zip(leaves, grads, strict=True) if g is not None] == [
        "s0.0", "s1.0", "s0.1", "s1.1", "s0.2", "s1.2"]  # fmt: skip
    with torch.no_grad():
        assert torch.equal(loss_op(backend, kinds)(**inputs)["loss"], made)  # type: ignore[arg-type]
    frozen = {k: None if t is None else t.detach() for k, t in inputs.items()}
    again = loss_op(backend, kinds)(**frozen)["loss"]
    assert again is not None and torch.equal(again, made) and not again.requires_grad


# --------------------------------------------------------------------------------------------- what PyTorch expects


@needs_native
@pytest.mark.parametrize(
    "dtype",
    [F32, *(pytest.param(d, marks=pytest.mark.long) for d in (F64, BF16, F16))],
    ids=["fp32", "fp64", "bf16", "fp16"],
)
@pytest.mark.parametrize("want", [True, pytest.param(False, marks=pytest.mark.long)])
def test_opcheck(dtype: torch.dtype, want: bool) -> None:
    for kinds in (ALGORITHMS, ("QLearning",), (SILENT,)):
        given = arguments(kinds, dict(loss_case(kinds, 6, dtype, masked=True).inputs))
        columns, others, masks, layout = laid_out(**given)
        args = (given["f"], columns, others, masks, layout, 0.7, True, want)
        opcheck(torch.ops.fastroute._trajectory_loss_native.default, args, grad=False)
        loss, slopes = torch.ops.fastroute._trajectory_loss_native(*args)
        assert slopes.shape == (len(columns) if want else 0, 6)
        for grad in (torch.randn_like(loss), torch.ones_like(loss[0]).expand(6)):
            opcheck(torch.ops.fastroute._trajectory_loss_native_backward.default, (grad, slopes), grad=False)


@pytest.mark.parametrize("backend", HERE)
def test_compile(backend: str) -> None:
    kinds = ("WPL", "REINFORCEBl2", "QLearning", SILENT)
    names: list[str] = []
    calls = []
    for B in (16, 7, 33):
        case = loss_case(kinds, B, F64, masked=True)
        names = [k for k, t in case.inputs.items() if t is not None]
        calls.append([case.inputs[k].requires_grad_(k in case.wrt) for k in names])  # type: ignore[union-attr]

    def call(*tensors: Tensor) -> Tensor:
        return functional.trajectory_loss(**arguments(kinds, dict(zip(names, tensors, strict=True))), gamma=0.7)

    with use_backend(backend):
        check_compiled(call, calls)


class Evaluated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        s0, s1, f = x.unbind(1)
        none = [None, None]
        return functional.trajectory_loss(["AAC", "QLearning"], [s0, s1], [s1, None], none, none, [None, s1], none, f)


@each_backend
def test_export(backend: str) -> None:
    example, *others = [torch.randn(B, 3, generator=seeds.generator(B)) for B in (6, 2, 33)]
    with use_backend(backend):
        check_exported(Evaluated(), example, others, {0: torch.export.Dim("batch", min=2)})


def test_explain() -> None:
    for backend in HERE:
        with use_backend(backend):
            made = fastroute.explain(Evaluated(), torch.randn(6, 3))
        assert [(d.backend, d.case.op, d.case.sizes) for d in made] == [
            (backend, "trajectory_loss", (("B", 6), ("T", 2)))]  # fmt: skip


def test_what_backends_take() -> None:
    from fastroute.ops.backends import Case as Call
    from fastroute.ops.trajectory_loss.op import _native_refuses, triton_refuses

    for dtype in (F32, BF16, F16):
        assert triton_refuses(Call("trajectory_loss", "cuda", dtype, ())) is None
        assert _native_refuses(Call("trajectory_loss", "cpu", dtype, ())) is None
    assert "not float64" in str(triton_refuses(Call("trajectory_loss", "cuda", F64, ())))
    assert "not torch.float8" in str(_native_refuses(Call("trajectory_loss", "cpu", torch.float8_e5m2, ())))


@needs_native
def test_same_bits_on_any_number_of_threads() -> None:
    kinds = "ActorCritic", "WPL", "AAC"
    case = loss_case(kinds, 40_001, masked=True)
    made = on_threads((1, 2, 7), lambda: evaluate(loss_op("native", kinds), case))
    for other in made[1:]:
        assert all(torch.equal(t, other[name]) for name, t in made[0].items())  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- bad input


def given(**changed: Any) -> dict[str, Any]:
    made = arguments(("AAC", "WPL"), dict(loss_case(("AAC", "WPL"), 4).inputs))
    return made | changed


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"f": torch.zeros(4, dtype=torch.int64)}, TypeError, "f: .*floating-point.*int64"),
        ({"f": torch.zeros(())}, ValueError, r"f: expected the final rewards \[B\], got \[\]"),
        ({"kinds": ["AAC"]}, ValueError, "s0: expected one entry per decision, 1, got 2"),
        ({"choices": [3]}, ValueError, "choices: expected one entry per decision, 2, got 1"),
        ({"choices": []}, ValueError, "choices: expected one entry per decision, 2, got 0"),
        ({"kinds": ["AAC", "RELAX"]}, ValueError, "kinds: expected names among REINFORCE, .*, got 'RELAX'"),
        ({"kinds": ["AAC", "REINFORCEBl2"], "choices": None}, ValueError, "choices: REINFORCEBl2 needs K"),
        ({"s0": [torch.zeros(4), None]}, ValueError, r"s0\[1\]: WPL needs it, got None"),
        ({"s1": [None, torch.zeros(4)]}, ValueError, r"s1\[0\]: AAC needs it, got None"),
        ({"aux": [None, None]}, ValueError, r"aux\[1\]: WPL needs it, got None"),
        ({"own": [torch.zeros(4, 1), None]}, ValueError, r"own\[0\]: expected shape \[4\] \(B\), got \[4, 1\]"),
        ({"look": [None, torch.zeros(5)]}, ValueError, r"look\[1\]: expected shape \[4\] \(B\), got \[5\]"),
        ({"active": [torch.ones(4), None]}, TypeError, r"active\[0\]: expected bool, got torch.float32"),
        ({"s0": [torch.zeros(4).long()] * 2}, TypeError, r"s0\[0\]: expected a floating-point tensor, got torch.int64"),
        ({"s0": [torch.zeros(4, device="meta")] * 2}, ValueError, r"s0\[0\]: expected a tensor on cpu like f, .*meta"),
    ],
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.trajectory_loss(**given(**changed))


def test_the_tables_agree() -> None:
    """Sets of kinds are of known names, and the C++ and the kernels count them in this order."""
    assert set(LEARNING) >= CRITICS | AIDED | BOOTSTRAPPING | reference.ADVANTAGES
    assert (
        (ALGORITHMS.index("REINFORCE"), ALGORITHMS.index("WPL"), ALGORITHMS.index(SILENT))
        == (0, 13, 14)
        == (0, 13, len(ALGORITHMS) - 1)
    )
    assert contract.FIELDS == 2 + 6
    (source,) = (Path(__file__).resolve().parents[3] / "csrc").rglob("trajectory_loss.cpp")
    (enumerators,) = re.findall(r"enum Kind : int64_t \{(.*?)\}", source.read_text(), re.DOTALL)
    assert tuple(re.findall(r"\bk(\w+),", enumerators)) == ALGORITHMS
    of_cpp = {  # what the functions of the C++ that are sets of kinds name
        name: set(re.findall(r"\bk([A-Z]\w*)", body))
        for name, body in re.findall(r"bool (\w+)\(int64_t kind\) \{(.*?)\}", source.read_text(), re.DOTALL)
    }
    assert of_cpp == {"has_critic": set(ALGORITHMS) - CRITICS, "is_aided": AIDED}


def test_the_kernels_sets_of_kinds_agree() -> None:
    kernels = pytest.importorskip("fastroute.kernels.trajectory_loss")

    def names(bits: Any) -> set[str]:
        return {kind for number, kind in enumerate(ALGORITHMS) if bits.value >> number & 1}

    assert names(kernels.ADVANTAGES) == reference.ADVANTAGES
    entries = {kind: contract.Entry(kind, 3, *(torch.tensor(float(i)) for i in range(5))) for kind in CRITICS}
    assert names(kernels.RETURNS) == {kind for kind, e in entries.items() if reference.critics_target(e) is e.R}
    assert names(kernels.VALUES) == set(ALGORITHMS) - LOG_P - reference.ADVANTAGES - {SILENT}


@each_kind
def test_the_slopes_are_those_of_the_formula(kind: str) -> None:
    """What is written out beside the definition is its derivative."""
    s0, s1, aux, R, y = (torch.randn(9, generator=seeds.generator(i), dtype=F64) for i in range(5))
    columns = [s0.requires_grad_(), *([s1.requires_grad_()] if kind in CRITICS else [])]
    entry = contract.Entry(kind, 3, s0, s1 if kind in CRITICS else None, aux if kind in AIDED else None, R, y)
    found = torch.autograd.grad(reference.loss_of(entry).sum(), columns)
    for ours, exact in zip(plain.slopes_of(entry), found, strict=False):
        assert ours is not None
        assert_same(ours.detach(), exact, kind)


def test_a_kind_without_a_formula_is_an_error() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match="kinds: expected one with a formula here, got 'Unknown'"):
        reference.loss_of(contract.Entry("Unknown", 3, one, one, one, one, one))
