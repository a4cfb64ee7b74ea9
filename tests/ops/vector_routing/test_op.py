"""``vector_routing`` on every backend against float64 autograd of the literal equations.

Axes: b samples, n input vectors, m output vectors, d width of an input vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastroute import functional, use_backend
from fastroute.ops.backends import Case as Shape
from fastroute.ops.backends import choose
from fastroute.ops.vector_routing.contract import Grads, Step
from tests.helpers import strategies
from tests.helpers.backends import HERE, each_backend, needs_native
from tests.helpers.budget import check
from tests.helpers.cases import Case, Results, evaluate
from tests.helpers.layouts import LAYOUTS, Fenced
from tests.helpers.opcheck import assert_same, check_compiled, gradcheck, opcheck
from tests.helpers.process_wide import on_threads
from tests.helpers.routing_cases import Size, some_mask, vector_case, vector_op, vector_truth
from tests.helpers.subprocesses import check_python

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SMALL = Size(2, 33, 5, 12)

KINDS: dict[str, dict[str, Any]] = {
    "next": {},
    "next-without-ign": {"ign": False},
    "next-shared-scores": {"shared_scores": True},
    "next-shared-weight": {"shared_scores": "weight"},
    "next-shared-bias": {"shared_scores": "bias"},
    "next-linear": {"linear": True, "shared_scores": True},
    "next-linear-without-ign": {"linear": True, "shared_scores": True, "ign": False},
    "next-linear-row-scores": {"linear": True},
    "next-linear-shared-weight": {"linear": True, "shared_scores": "weight"},
    "next-linear-shared-bias": {"linear": True, "shared_scores": "bias"},
    "first": {"first": True},
    "first-without-ign": {"first": True, "ign": False},
    "first-linear": {"first": True, "linear": True},
    "first-linear-without-ign": {"first": True, "linear": True, "ign": False},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def on(backend: str) -> Callable[..., dict[str, Tensor]]:
    def call(**inputs: Tensor | None) -> dict[str, Tensor]:
        with use_backend(backend):
            return vector_op(**inputs)

    return call


def checked(backend: str, case: Case, dtype: torch.dtype = F32) -> Results:
    return check(on(backend), vector_truth, case, dtype=dtype)


# ------------------------------------------------------------------------------------------------------- numbers


@each_backend
@each_kind
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
def test_kinds(backend: str, kind: str, dtype: torch.dtype) -> None:
    found = checked(backend, vector_case(Size(3, 70, 9, 24), dtype=dtype, **KINDS[kind]), dtype)
    acc = F64 if dtype == F64 else F32
    M, p = found["M"], found["p"]
    assert M is not None and p is not None and M.dtype == p.dtype == acc and M.is_contiguous() and p.is_contiguous()


SIZES = [
    Size(16, 1, 2, 1),  # one row, one column
    Size(3, 1, 17, 8),
    Size(1, 7, 3, 5),
    Size(9, 64, 16, 16),  # more samples than pieces
    Size(2, 65, 33, 31),
    Size(1, 1000, 100, 32),  # several pieces
    Size(2, 300, 300, 40),  # more outputs than columns
    Size(1, 3000, 65, 48),
]


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "first", "first-linear"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend: str, kind: str, size: Size) -> None:
    checked(backend, vector_case(size, **KINDS[kind]))


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.long), *HERE[1:]])
def test_several_tiles_in_each_piece(backend: str) -> None:
    checked(backend, vector_case(Size(1, 7001, 200, 130), **KINDS["next"]))


def test_several_tiles_in_each_piece_in_float64() -> None:
    """Tiles of the fewest rows, 384: eight pieces have two each. A wrong boundary cannot hide behind rounding."""
    case = vector_case(Size(1, 3501, 250, 270), **KINDS["next-linear"], dtype=F64)
    exact = evaluate(vector_truth, case)
    for backend in HERE:
        for name, found in evaluate(on(backend), case).items():
            expected = exact[name]
            assert found is not None and expected is not None
            assert_same(found, expected, f"{name} on {backend}")


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "next-linear-row-scores", "next-shared-scores", "first"])
@pytest.mark.parametrize(
    ("x", "parameters"),
    [(BF16, F32), (F32, BF16), (F64, F32), (F32, F64)],
    ids=["bf16-fp32", "fp32-bf16", "fp64-fp32", "fp32-fp64"],
)
def test_inputs_and_parameters_of_different_dtypes(
    backend: str, kind: str, x: torch.dtype, parameters: torch.dtype
) -> None:
    case = vector_case(Size(2, 40, 9, 24), dtype=x, parameter_dtype=parameters, **KINDS[kind])
    plain = F32 if F64 not in (x, parameters) or x == F32 else F64
    found = checked(backend, case, plain)
    for name in case.wrt:
        t, g = case.inputs[name], found.get(f"d{name}")
        assert t is None or (g is not None and g.dtype == t.dtype), name


@each_backend
def test_parameters_of_different_dtypes(backend: str) -> None:
    case = vector_case(Size(2, 40, 9, 24), dtype=BF16)
    use, ign = case.inputs["use"], case.inputs["ign"]
    assert use is not None and ign is not None
    checked(backend, case.with_inputs(use=use.float(), ign=ign.float()))


@pytest.mark.parametrize("kind", ["next", "first-linear"])
def test_half_precision_runs_on_the_reference(kind: str) -> None:
    case = vector_case(Size(2, 40, 9, 24), dtype=torch.float16, **KINDS[kind])
    checked("auto", case, torch.float16)


MASKS: dict[str, Callable[[Size], Tensor]] = {
    "n,m": lambda s: some_mask(s.n, s.m),
    "B,n,m": lambda s: some_mask(s.b, s.n, s.m),
    "B,n,1": lambda s: some_mask(s.b, s.n, 1),
    "1,n,m": lambda s: some_mask(1, s.n, s.m),
    "m": lambda s: torch.arange(s.m) % 3 == 1,
    "causal": lambda s: torch.ones(s.n, s.m, dtype=torch.bool).triu(1),
    "all open": lambda s: torch.zeros(s.n, s.m, dtype=torch.bool),
    "all closed": lambda s: torch.ones(s.n, s.m, dtype=torch.bool),
    "a closed column": lambda s: (torch.arange(s.m) == 1).expand(s.n, s.m),
    "strided": lambda s: some_mask(s.b, s.m, 2 * s.n).mT[:, ::2],
}


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "first", "first-linear"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(backend: str, kind: str, mask: str) -> None:
    size = Size(3, 70, 9, 16)
    found = checked(backend, vector_case(size, mask=MASKS[mask](size), **KINDS[kind]))
    if mask == "all closed":
        assert not any(t.any() for t in found.values() if t is not None)


@each_backend
@each_kind
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_lengths(backend: str, kind: str, masked: bool) -> None:
    size = Size(4, 70, 9, 16)
    mask = some_mask(size.b, size.n, size.m) if masked else None
    found = checked(backend, vector_case(size, lengths=[70, 0, 1, 33], mask=mask, **KINDS[kind]))
    for name, stops in (("dx", (70, 0, 1, 33)), ("dgate", (70, 0, 1, 33))):
        g = found[name]
        assert g is not None and not any(g[b, stop:].any() for b, stop in enumerate(stops)), name


@each_backend
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("low", [-100.0, -300.0, 100.0, -46.0], ids=lambda v: f"{v:g}")
def test_extreme_scores(backend: str, dtype: torch.dtype, low: float) -> None:
    """Where sigmoids underflow or saturate, the softmax of their logarithms still has an answer."""
    size = Size(2, 60, 9, 16)
    case = vector_case(size, dtype=dtype)
    bias, weight = case.inputs["score_bias"], case.inputs["score_weight"]
    assert bias is not None and weight is not None
    rows = torch.arange(size.n)[:, None]
    # a third of the rows all at one end, a third spread from there to 0, a third as they were
    shift = torch.where(rows % 3 == 0, low, torch.where(rows % 3 == 1, torch.linspace(low, 0, size.m), 0.0))
    checked(backend, case.with_inputs(score_bias=bias + shift.to(bias.dtype)), dtype)


@each_backend
@pytest.mark.parametrize("m", [33, 700])
def test_a_prior_of_equal_shares_is_shared_out_anew_to_the_last_digit(backend: str, m: int) -> None:
    """Behind a mask the shares of a first iteration are divided by the sum of many equal numbers."""
    mask = torch.zeros(31, m, dtype=torch.bool)
    case = vector_case(Size(1, 31, m, 1), dtype=F32, first=True, ign=False, mask=mask)
    masked, open_ = checked(backend, case), checked(backend, case.with_inputs(mask=None))
    for name, value in open_.items():
        found = masked[name]
        assert found is not None and value is not None
        if value.any():  # an error of the sum is the same factor everywhere; other rounding is not
            factor = (found.double() * value.double()).sum() / value.double().square().sum()
            assert abs(factor - 1) < 3e-7, name


@each_backend
@hypothesis.given(data=st.data())
def test_any_call(backend: str, data: st.DataObject) -> None:
    """In float64 to the formula; in others within budget."""
    size = data.draw(strategies.sizes(), "size")
    dtype = data.draw(strategies.dtypes(F32, F64, BF16), "dtype")
    layout = LAYOUTS[data.draw(strategies.layouts, "layout of x")]
    options = {
        "mask": data.draw(strategies.masks(size.b, size.n, size.m), "mask"),
        "lengths": data.draw(strategies.lengths(size.b, size.n), "lengths"),
        **data.draw(strategies.kinds(), "kind"),
    }
    seed = data.draw(strategies.seeds, "seed")

    def call(x: Tensor, **inputs: Tensor | None) -> dict[str, Tensor]:
        with use_backend(backend):
            return vector_op(x=layout(x), **inputs)

    if dtype != F64:
        check(call, vector_truth, vector_case(size, dtype=dtype, seed=seed, **options), dtype=dtype)
        return
    case = vector_case(size, dtype=dtype, seed=seed, **options)
    found = evaluate(call, case)
    for name, expected in evaluate(vector_truth, case).items():
        got = found[name]
        assert (got is None) == (expected is None), name
        if got is not None and expected is not None:
            assert_same(got, expected, name)


# ------------------------------------------------------------------------------------------------------ gradients


@each_backend
@each_kind
def test_gradcheck(backend: str, kind: str) -> None:
    gradcheck(on(backend), vector_case(Size(2, 4, 3, 3), dtype=F64, **KINDS[kind]))


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "first"])
def test_gradcheck_with_mask_and_lengths(backend: str, kind: str) -> None:
    gradcheck(
        on(backend), vector_case(Size(2, 4, 3, 3), dtype=F64, mask=some_mask(2, 4, 3), lengths=[3, 4], **KINDS[kind])
    )


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "first", "first-linear"])
def test_any_subset_of_gradients(backend: str, kind: str) -> None:
    """What is not asked for changes nothing in what is."""
    case = vector_case(SMALL, **KINDS[kind])
    everything = evaluate(on(backend), case)
    for wanted in (("x",), ("gate",), ("use",), ("x", "pred"), ("score_weight", "use"), ("gate", "score_bias")):
        wrt = tuple(k for k in wanted if case.inputs[k] is not None)
        if wrt:
            for name, got in evaluate(on(backend), replace(case, wrt=wrt)).items():
                expected = everything[name]
                assert got is not None and expected is not None and torch.equal(got, expected), (wanted, name)


@each_backend
@pytest.mark.parametrize("output", ["M", "p"])
def test_gradient_of_one_output_alone(backend: str, output: str) -> None:
    case = vector_case(SMALL)
    checked(backend, replace(case, cotangents={output: case.cotangents[output]}))


@each_backend
def test_two_backward_passes(backend: str) -> None:
    case = vector_case(SMALL)
    leaves = {k: t.clone().requires_grad_() for k in case.wrt if (t := case.inputs[k]) is not None}
    with use_backend(backend):
        loss = sum(t.square().sum() for t in vector_op(**{**case.inputs, **leaves}).values())
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --------------------------------------------------------------------------------------------- memory and layout


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["next", "next-linear"])
def test_layouts(backend: str, layout: str, kind: str) -> None:
    """Every input in a layout, and the same numbers."""

    def call(**inputs: Tensor | None) -> dict[str, Tensor]:
        with use_backend(backend):
            return vector_op(**{k: None if t is None else LAYOUTS[layout](t) for k, t in inputs.items()})

    size = Size(3, 40, 9, 16)
    case = vector_case(size, mask=some_mask(3, 40, 9), **KINDS[kind])
    check(call, vector_truth, case, dtype=F32)


@each_backend
def test_inputs_that_repeat_in_memory(backend: str) -> None:
    """One sample for the whole batch, one row for all inputs: strides of 0."""
    for axis in (0, 1):

        def call(x: Tensor, axis: int = axis, **inputs: Tensor | None) -> dict[str, Tensor]:
            with use_backend(backend):
                return vector_op(x=x.narrow(axis, 0, 1).expand_as(x), **inputs)

        def truth(x: Tensor, axis: int = axis, **inputs: Tensor | None) -> dict[str, Tensor]:
            return vector_truth(x=x.narrow(axis, 0, 1).expand_as(x), **inputs)

        check(call, truth, vector_case(Size(3, 40, 9, 16)), dtype=F32)


def as_step(case: Case, fences: list[Fenced]) -> Step:
    """The case as a backend sees it, every tensor fenced."""

    def fenced(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        fences.append(Fenced(t))
        return fences[-1].tensor

    given = {k: fenced(t) for k, t in case.inputs.items()}
    return Step(gate_weight=None, gate_bias=None, scale=None, **given)  # type: ignore[arg-type]


@each_backend
@pytest.mark.parametrize("kind", [k for k, of in KINDS.items() if of.get("shared_scores") not in ("weight", "bias")])
@pytest.mark.parametrize("fresh", [True, False], ids=["first-writer", "adds"])
def test_nothing_is_read_or_written_outside(backend: str, kind: str, fresh: bool) -> None:
    """Inputs and gradient buffers lie between fences of NaN; a first writer finds NaN in the buffers too."""
    case = vector_case(Size(3, 37, 7, 13), mask=some_mask(3, 37, 7), lengths=[37, 5, 36], **KINDS[kind])
    fences: list[Fenced] = []
    step = as_step(case, fences)
    kernel = choose(Shape("vector_routing", "cpu", F32, (("B", 3), ("n", 37), ("m", 7), ("d", 13))), backend)
    M, p, _ = kernel.forward(step)
    buffers = {
        k: Fenced(torch.full_like(t, math.nan if fresh else 0.0))
        for k in case.wrt
        if k != "pred" and (t := getattr(step, k)) is not None
    }
    incoming = [Fenced(case.cotangents["M"]), Fenced(case.cotangents["p"])]
    dpred = kernel.backward(
        step, incoming[0].tensor, incoming[1].tensor, Grads(fresh, **{k: b.tensor for k, b in buffers.items()})
    )
    assert all(fence.intact() for fence in (*fences, *incoming, *buffers.values()))
    found = {"M": M, "p": p, **{f"d{k}": b.tensor for k, b in buffers.items()}} | (
        {} if dpred is None else {"dpred": dpred}
    )
    for name, expected in evaluate(on(backend), case).items():
        assert expected is not None and torch.equal(found[name], expected), name


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "first"])
@pytest.mark.parametrize(("b", "n"), [(0, 7), (2, 0), (0, 0)])
def test_empty(backend: str, kind: str, b: int, n: int) -> None:
    found = evaluate(on(backend), vector_case(Size(b, n, 3, 4), **KINDS[kind]))
    for name, expected in evaluate(vector_truth, vector_case(Size(b, n, 3, 4), **KINDS[kind])).items():
        got = found[name]
        assert got is not None and expected is not None and got.shape == expected.shape and not got.any(), name


# ---------------------------------------------------------------------------------------------------------- laws


def rows_of(index: list[int]) -> Tensor:
    return torch.tensor(index)


PER_SAMPLE = ("M", "p", "dx", "dgate", "dpred")


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "first"])
def test_permuting_samples_permutes_results(backend: str, kind: str) -> None:
    case = vector_case(Size(4, 300, 9, 16), dtype=F64, **KINDS[kind])
    index = rows_of([2, 0, 3, 1])
    found, turned = evaluate(on(backend), case), evaluate(on(backend), case.select("b", index))
    for name in PER_SAMPLE:
        a, b = found.get(name), turned.get(name)
        if a is not None and b is not None:
            assert_same(a[index], b, name)


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "first"])
def test_concatenated_batches_give_concatenated_results(backend: str, kind: str) -> None:
    """And parameter gradients add up."""
    case = vector_case(Size(5, 300, 9, 16), dtype=F64, **KINDS[kind])
    whole = evaluate(on(backend), case)
    parts = [evaluate(on(backend), case.select("b", rows_of(index))) for index in ([0, 1, 2], [3, 4])]
    for name, expected in whole.items():
        a, b = (part[name] for part in parts)
        if expected is not None:
            assert a is not None and b is not None
            assert_same(torch.cat([a, b]) if name in PER_SAMPLE else a + b, expected, name)


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "first", "first-linear"])
@pytest.mark.parametrize("how", ["mask", "lengths"])
def test_masking_an_input_is_deleting_it(backend: str, kind: str, how: str) -> None:
    n, gone = 40, [38, 39] if how == "lengths" else [0, 17, 39]
    kept = rows_of([i for i in range(n) if i not in gone])
    mask = torch.isin(torch.arange(n), torch.tensor(gone))[:, None].expand(n, 9) if how == "mask" else None
    case = vector_case(Size(2, n, 9, 16), dtype=F64, **KINDS[kind])
    lengths = torch.tensor([38, 38]) if how == "lengths" else None
    masked = evaluate(on(backend), case.with_inputs(mask=mask, lengths=lengths))
    deleted = evaluate(on(backend), case.select("n", kept))
    for name, expected in deleted.items():
        got = masked[name]
        if expected is None or got is None:
            assert got is expected
            continue
        axes = case.axes[name.removeprefix("d")]
        if "n" in axes and got.shape[axes.index("n")] == n:
            assert not got.index_select(axes.index("n"), torch.tensor(gone)).any(), name
            got = got.index_select(axes.index("n"), kept)
        assert_same(got, expected, name)


@each_backend
@pytest.mark.parametrize("kind", ["next", "first-linear"])
def test_a_closed_output_gets_nothing_and_the_others_all(backend: str, kind: str) -> None:
    """Masking a column is deleting it: the softmax, or the prior, is over the open outputs."""
    case = vector_case(Size(2, 40, 9, 16), dtype=F64, **KINDS[kind])
    kept = rows_of([j for j in range(9) if j != 4])
    masked = evaluate(on(backend), case.with_inputs(mask=(torch.arange(9) == 4).expand(40, 9)))
    rest = case.select("m", kept)
    prior = rest.inputs["prior"]
    deleted = evaluate(on(backend), rest.with_inputs(prior=None if prior is None else prior / prior.sum()))
    for name in ("M", "p"):
        got, expected = masked[name], deleted[name]
        assert got is not None and expected is not None
        assert not got[:, 4].any()
        assert_same(got[:, kept], expected, name)


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "first"])
@pytest.mark.parametrize("letter", ["n", "m"])
def test_relabelling(backend: str, kind: str, letter: str) -> None:
    """Inputs in another order give the same moments, outputs in another order give them in that order."""
    case = vector_case(Size(2, 40, 9, 16), dtype=F64, **KINDS[kind])
    turned = case.select(letter, torch.arange(case.size(letter) - 1, -1, -1))
    found, relabelled = evaluate(on(backend), case), evaluate(on(backend), turned)
    for name, a in found.items():
        b = relabelled[name]
        if a is not None and b is not None:
            axes = case.axes[name.removeprefix("d")]
            assert_same(b.flip([k for k, called in enumerate(axes) if called == letter]), a, name)


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "first"])
@pytest.mark.parametrize("where", ["x", "gate", "pred"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_stay_in_their_sample(backend: str, kind: str, where: str, bad: float) -> None:
    case = vector_case(Size(3, 300, 9, 16), **KINDS[kind])
    if case.inputs[where] is None:
        return
    dirty = case.inputs[where].clone()  # type: ignore[union-attr]
    dirty[1, 3] = bad
    clean, found = evaluate(on(backend), case), evaluate(on(backend), case.with_inputs(**{where: dirty}))
    for name in PER_SAMPLE:
        a, b = clean.get(name), found.get(name)
        if a is not None and b is not None:
            assert torch.equal(a[[0, 2]], b[[0, 2]]), name
    M = found["M"]
    assert M is not None and not M[1].isfinite().all()


@each_backend
@pytest.mark.parametrize("kind", ["next", "next-linear", "first"])
def test_padding_is_never_read(backend: str, kind: str) -> None:
    lengths = [40, 0, 13]
    case = vector_case(Size(3, 40, 9, 16), lengths=lengths, **KINDS[kind])
    x, gate = (case.inputs[k].clone() for k in ("x", "gate"))  # type: ignore[union-attr]
    for b, stop in enumerate(lengths):
        x[b, stop:], gate[b, stop:] = math.nan, math.nan
    clean, found = evaluate(on(backend), case), evaluate(on(backend), case.with_inputs(x=x, gate=gate))
    for name, a in clean.items():
        b = found[name]
        assert a is not None and b is not None and torch.equal(a, b), name


# --------------------------------------------------------------------------------------------------- determinism


@each_backend
@each_kind
def test_same_input_same_bits(backend: str, kind: str) -> None:
    case = vector_case(Size(3, 1000, 33, 20), **KINDS[kind])
    first, second = evaluate(on(backend), case), evaluate(on(backend), case)
    assert all(a is b or torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))  # type: ignore[arg-type]


@needs_native
@pytest.mark.parametrize("size", [Size(1, 200, 64, 64), Size(2, 3000, 40, 48), Size(1, 2500, 300, 130)], ids=str)
@pytest.mark.parametrize("kind", ["next", "next-linear", "first"])
def test_same_bits_on_any_number_of_threads(size: Size, kind: str) -> None:
    case = vector_case(size, **KINDS[kind])
    found = on_threads((1, 2), lambda: evaluate(on("native"), case))
    for name, a in found[0].items():
        b = found[1][name]
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)), name


# ------------------------------------------------------------------------------------------------------- the op


def op_args(case: Case) -> tuple[Any, ...]:
    mask = case.inputs["mask"]
    full = None if mask is None else mask.expand(*case.cotangents["M"].shape[:1], *mask.shape[-2:])
    return (*{**case.inputs, "mask": full}.values(), "auto", "")


CHECKED = {
    "next": vector_case(SMALL),
    "next-linear": vector_case(SMALL, **KINDS["next-linear"]),
    "first": vector_case(SMALL, first=True),
    "masked": vector_case(SMALL, mask=some_mask(2, 33, 5), lengths=[3, 33]),
    "bf16": vector_case(SMALL, dtype=BF16),
    "no samples": vector_case(Size(0, 7, 3, 4)),
    "no rows": vector_case(Size(2, 0, 3, 4)),
}


@pytest.mark.parametrize(
    ("name", "layout", "grad"),
    [(name, "contiguous", True) for name in CHECKED]
    + [(name, *how) for name in ("next", "masked") for how in (("contiguous", False), ("transposed_batch", True))],
)
@pytest.mark.long_after(4)
def test_opcheck(name: str, layout: str, grad: bool) -> None:
    opcheck(torch.ops.fastroute.vector_routing.default, op_args(CHECKED[name]), layout=LAYOUTS[layout], grad=grad)


@pytest.mark.parametrize("kind", ["next", "next-linear", "first"])
@pytest.mark.parametrize(("want_x", "want_rows"), list(product([True, False], repeat=2)))
def test_opcheck_of_the_backward_op(kind: str, want_x: bool, want_rows: bool) -> None:
    case = vector_case(SMALL, **KINDS[kind])
    args = (*op_args(case), case.cotangents["M"], case.cotangents["p"], want_x, want_rows)
    torch.library.opcheck(
        torch.ops.fastroute.vector_routing_backward.default, args, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("kind", ["next", "next-linear", "first"])
def test_compiles_once_for_all_batch_sizes(kind: str) -> None:
    cases = [vector_case(Size(b, 20, 5, 8), **KINDS[kind]) for b in (2, 3, 7)]
    names = [k for k, t in cases[0].inputs.items() if t is not None]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return functional.vector_routing(**{**dict.fromkeys(cases[0].inputs), **dict(zip(names, tensors, strict=True))})  # type: ignore[arg-type]

    def leaves(case: Case) -> list[Tensor]:
        return [case.inputs[k].clone().requires_grad_(k in case.wrt) for k in names]  # type: ignore[union-attr]

    check_compiled(call, [leaves(case) for case in cases])


# ----------------------------------------------------------------------------------------------------- bad input


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of integers": (
        {"x": torch.zeros(2, 33, 12, dtype=torch.int64)},
        TypeError,
        r"x: expected a floating-point tensor, got torch\.int64",
    ),
    "x of two axes": ({"x": torch.zeros(33, 12)}, ValueError, r"x: expected \[B, n, d\], got \[33, 12\]"),
    "gate": ({"gate": torch.zeros(2, 32)}, ValueError, r"gate: expected shape \[2, 33\] \(B, n\), got \[2, 32\]"),
    "gate's dtype": (
        {"gate": torch.zeros(2, 33, dtype=F64)},
        TypeError,
        r"gate: expected torch\.float32 with x torch\.float32, got torch\.float64",
    ),
    "pred": (
        {"pred": torch.zeros(2, 4, 12)},
        ValueError,
        r"pred: expected shape \[2, 5, 12\] \(B, m, d\), got \[2, 4, 12\]",
    ),
    "score_weight": (
        {"score_weight": torch.zeros(2, 5)},
        ValueError,
        r"score_weight: expected shape \[33, 5\] \(n or 1, m\), got \[2, 5\]",
    ),
    "no score_bias": ({"score_bias": None}, ValueError, r"score_bias: expected \[n, m\] with pred, got None"),
    "use": ({"use": torch.zeros(32, 5)}, ValueError, r"use: expected shape \[33, 5\] \(n, m\), got \[32, 5\]"),
    "ign": ({"ign": torch.zeros(33, 4)}, ValueError, r"ign: expected shape \[33, 5\] \(n, m\), got \[33, 4\]"),
    "no prior": (
        {"pred": None},
        ValueError,
        r"prior: expected \[m\] when pred is None \(a first iteration\), got None",
    ),
    "prior": ({"pred": None, "prior": torch.zeros(4)}, ValueError, r"prior: expected shape \[5\] \(m\), got \[4\]"),
    "mask of numbers": (
        {"mask": torch.zeros(33, 5)},
        TypeError,
        r"mask: expected a bool tensor \(True = ignore\), got torch\.float32",
    ),
    "mask": (
        {"mask": torch.zeros(5, 33).bool()},
        ValueError,
        r"mask: expected a shape that broadcasts to \[2, 33, 5\] .*got \[5, 33\]",
    ),
    "lengths": (
        {"lengths": torch.tensor([1, 2, 3])},
        ValueError,
        r"lengths: expected one length per sample, shape \[2\], got \[3\]",
    ),
    "lengths too long": (
        {"lengths": torch.tensor([1, 34])},
        ValueError,
        r"lengths: expected values from 0 to 33 .* got 1 outside",
    ),
    "lengths of fractions": (
        {"lengths": torch.tensor([1.0, 2.0])},
        TypeError,
        r"lengths: expected integers, got torch\.float32",
    ),
    "ign_bias without use_bias": (
        {"ign_bias": torch.zeros(5)},
        ValueError,
        r"ign_bias: expected one exactly when use_bias and ign are given",
    ),
    "a parameter elsewhere": (
        {"use": torch.zeros(33, 5, device="meta")},
        ValueError,
        r"use: expected a tensor on cpu like x, got one on meta",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name: str) -> None:
    changed, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        functional.vector_routing(**{**vector_case(SMALL).inputs, **changed})  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- both libraries' products


@pytest.mark.long
@needs_native
@pytest.mark.parametrize("library", ["mm", "onednn"])
def test_both_libraries_of_matrix_products(library: str) -> None:
    """FASTROUTE_GEMM is read once: a process each, at a size where products are large enough to be worth a choice."""
    code = f"""
import torch
from fastroute.ops.backends import extension
from tests.helpers.routing_cases import Size, vector_case
from tests.ops.efficient_routing import test_op as test_efficient_routing
from tests.ops.vector_routing import test_op as test_vector_routing
extension()
if torch.ops.fastroute._prefers_onednn() == ({library!r} == "onednn"):
    for kind in ("next", "next-linear"):
        test_vector_routing.checked("native", vector_case(Size(2, 600, 100, 64), **test_vector_routing.KINDS[kind]))
    for linear in (False, True):
        test_efficient_routing.checked("native", Size(2, 600, 100, 64, 64), linear=linear, draws=2)
    print("checked")
else:
    print("this torch has no oneDNN")
"""
    printed = check_python(
        code.replace("vector_case(", "test_vector_routing.vector_case("), {"FASTROUTE_GEMM": library}
    )
    assert printed == "checked\n" or (library == "onednn" and not torch.backends.mkldnn.is_available())
