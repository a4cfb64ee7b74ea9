"""``efficient_routing``, all iterations at once, on every backend against float64 autograd of the literal equations.

Axes: b samples, n input vectors, m output vectors, d width of an input vector, h width of an output vector.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastroute import use_backend
from fastroute.ops.efficient_routing import native
from fastroute.ops.efficient_routing.contract import Parameters
from fastroute.ops.efficient_routing.op import _Call
from fastroute.ops.efficient_routing.passes import first_form
from tests.helpers import strategies
from tests.helpers.backends import each_backend, needs_native
from tests.helpers.budget import check
from tests.helpers.cases import Case, Results, evaluate
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_same, check_compiled, gradcheck, kept_by_autograd, opcheck
from tests.helpers.process_wide import on_threads
from tests.helpers.routing_cases import Size, efficient_case, efficient_op, efficient_truth, some_mask

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SMALL = Size(2, 33, 5, 12, 6)


def op(backend: str, n_iters: int = 2, normalize: bool = True) -> Callable[..., dict[str, Tensor]]:
    def call(**inputs: Tensor | None) -> dict[str, Tensor]:
        with use_backend(backend):
            made: dict[str, Tensor] = efficient_op(n_iters, normalize)(**inputs)
            return made

    return call


def checked(
    backend: str,
    size: Size,
    plain: torch.dtype = F32,
    *,
    n_iters: int = 2,
    normalize: bool = True,
    draws: int = 2,
    **options: Any,
) -> Results:
    """Within budget, over several seeds."""
    cases = [efficient_case(size, **{"dtype": plain, **options}, seed=seed) for seed in range(draws)]
    return check(
        op(backend, n_iters, normalize), efficient_truth(n_iters, normalize), cases,
        dtype=plain, stored=plain,
    )  # fmt: skip


def takes_gram(case: Case, n_iters: int = 2) -> bool:
    return _Call.of((*case.inputs.values(), n_iters, True, "auto", "")).form == "gram"


# ------------------------------------------------------------------------------------------------------- numbers


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize(("n_iters", "normalize"), [(1, True), (2, True), (3, True), (2, False), (4, False)])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
def test_iterations(backend: str, linear: bool, n_iters: int, normalize: bool, dtype: torch.dtype) -> None:
    found = checked(backend, SMALL, dtype, linear=linear, n_iters=n_iters, normalize=normalize)
    x_out = found["x_out"]
    assert x_out is not None and x_out.dtype == dtype and x_out.is_contiguous()
    unused = [k for k in ("W_G1", "W_G2", "B_G2", "W_S", "B_S") if found[f"d{k}"] is None]
    assert bool(unused) == (n_iters == 1)


GRAM = {  # whether sum_i f_i x_i x_i^T replaces the products with the betas: no mask, d <= 4 m, n > 1
    "narrow": (Size(2, 50, 6, 8), None, True),
    "d just fits": (Size(2, 50, 4, 16), None, True),
    "d just does not": (Size(2, 50, 4, 17), None, False),
    "masked": (Size(2, 50, 6, 8), some_mask(2, 50, 6), False),
    "a single input": (Size(16, 1, 17, 8, 4), None, False),
    "in quarters": (Size(2, 60, 40, 130), None, True),  # half of d is odd, and G is symmetric
}


@each_backend
@pytest.mark.parametrize("name", GRAM)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
def test_gram_path(backend: str, name: str, dtype: torch.dtype) -> None:
    size, mask, expected = GRAM[name]
    assert takes_gram(efficient_case(size, linear=True, mask=mask)) == expected
    checked(backend, size, dtype, linear=True, mask=mask)


@pytest.mark.parametrize(
    ("m", "d", "whole", "streamed"),
    [(4, 8, "gram", "gram"), (4, 9, "gram", "one beta"), (4, 16, "gram", "one beta"), (4, 17, "pairs", "one beta")],
)
def test_the_form_of_the_first_iteration(m: int, d: int, whole: str, streamed: str) -> None:
    for linear in (True, False):
        w = Parameters(*list(efficient_case(Size(2, 5, m, d), linear=linear).inputs.values())[1:-2])  # type: ignore[arg-type]
        found = [first_form(w, whole=one, masked=masked) for masked in (False, True) for one in (True, False)]
        assert found == ([whole, streamed, "pairs", "pairs"] if linear else ["pairs"] * 4)


@each_backend
@pytest.mark.parametrize("n_iters", [1, 2, 3])
def test_gram_path_gives_what_the_other_gives(backend: str, n_iters: int) -> None:
    """An all-open mask changes the path, nothing else."""
    case = efficient_case(Size(3, 70, 9, 16), linear=True, lengths=[70, 3, 0], dtype=F64)
    masked = case.with_inputs(mask=torch.zeros(3, 70, 9, dtype=torch.bool))
    assert takes_gram(case, n_iters) and not takes_gram(masked, n_iters)
    one, other = evaluate(op(backend, n_iters), case), evaluate(op(backend, n_iters), masked)
    for name, a in one.items():
        b = other[name]
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_same(a, b, name)


SIZES = [
    Size(3, 1, 2, 1, 1),
    Size(16, 1, 17, 8, 4),
    Size(2, 7, 5, 3, 1),  # d_out = 1: no layer norm anywhere
    Size(9, 64, 16, 16, 16),
    Size(1, 1000, 40, 32, 8),
    Size(2, 300, 150, 24, 12),
]


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend: str, linear: bool, size: Size) -> None:
    checked(backend, size, linear=linear, draws=2 if size.n < 300 else 1)


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
def test_a_large_size_in_float64(backend: str, linear: bool) -> None:
    """Pieces, tiles and the Gram matrix's chunks, where a wrong boundary cannot hide behind float32's rounding."""
    case = efficient_case(Size(2, 3000, 64, 40, 16), linear=linear, lengths=[3000, 1234], dtype=F64)
    found, exact = evaluate(op(backend), case), evaluate(efficient_truth(), case)
    for name, expected in exact.items():
        got = found[name]
        assert got is not None and expected is not None
        assert_same(got, expected, name)


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize(
    ("x", "parameters"),
    [(BF16, F32), (F32, BF16), (F64, F32), (F32, F64)],
    ids=["bf16-fp32", "fp32-bf16", "fp64-fp32", "fp32-fp64"],
)
def test_inputs_and_parameters_of_different_dtypes(
    backend: str, linear: bool, x: torch.dtype, parameters: torch.dtype
) -> None:
    promoted = torch.promote_types(x, parameters)
    found = checked(backend, SMALL, promoted, linear=linear, **{"dtype": x, "parameter_dtype": parameters})
    out = found["x_out"]
    assert out is not None and out.dtype == promoted
    case = efficient_case(SMALL, linear=linear, dtype=x, parameter_dtype=parameters)
    for name in case.wrt:
        t, g = case.inputs[name], found.get(f"d{name}")
        assert t is None or (g is not None and g.dtype == t.dtype), name


@each_backend
@pytest.mark.parametrize("wide", [("W_S", "B_S"), ("W_A", "B_A"), ("beta_use", "beta_ign"), ("W_F1",)], ids="-".join)
def test_parameters_of_different_dtypes(backend: str, wide: tuple[str, ...]) -> None:
    """A bfloat16 model some of whose parameters are kept in float32."""
    cases = [efficient_case(SMALL, dtype=BF16, seed=seed) for seed in range(2)]
    cases = [case.with_inputs(**{k: case.inputs[k].float() for k in wide}) for case in cases]  # type: ignore[union-attr]
    check(op(backend), efficient_truth(), cases, dtype=BF16, stored=BF16)


def test_half_precision_runs_on_the_reference() -> None:
    for linear in (False, True):
        checked("auto", SMALL, torch.float16, linear=linear)


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize("what", ["mask", "lengths", "both"])
def test_masks_and_lengths(backend: str, linear: bool, what: str) -> None:
    size = Size(4, 40, 9, 16, 6)
    options = {"mask": some_mask(4, 40, 9), "lengths": [40, 0, 1, 23]}
    found = checked(backend, size, linear=linear, **{k: v for k, v in options.items() if what in (k, "both")})
    x, dx = found["x_out"], found["dx"]
    assert x is not None and dx is not None
    if what != "mask":
        assert not x[1].any() and not dx[1].any() and not dx[3, 23:].any()


@each_backend
@hypothesis.given(data=st.data())
def test_any_call(backend: str, data: st.DataObject) -> None:
    """In float64, where agreement is to the formula whatever the conditioning of the drawn case."""
    size = data.draw(strategies.sizes(), "size")
    mask = data.draw(strategies.masks(size.b, size.n, size.m), "mask")
    case = efficient_case(
        size,
        dtype=F64,
        linear=data.draw(st.booleans(), "linear"),
        mask=None if mask is None else mask.expand(size.b, size.n, size.m),
        lengths=data.draw(strategies.lengths(size.b, size.n), "lengths"),
        seed=data.draw(strategies.seeds, "seed"),
    )
    layout = LAYOUTS[data.draw(strategies.layouts, "layout of x")]
    iterations, normalize = data.draw(st.integers(1, 3), "n_iters"), False
    found = evaluate(lambda x, **w: op(backend, iterations, normalize)(x=layout(x), **w), case)
    for name, expected in evaluate(efficient_truth(iterations, normalize), case).items():
        got = found[name]
        assert (got is None) == (expected is None), name
        if got is not None and expected is not None:
            assert_same(got, expected, name)


# ------------------------------------------------------------------------------------------------------ gradients


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize("n_iters", [1, 2, 3])
def test_gradcheck(backend: str, linear: bool, n_iters: int) -> None:
    gradcheck(op(backend, n_iters), efficient_case(Size(2, 4, 3, 3, 3), linear=linear, dtype=F64, lengths=[4, 3]))


@each_backend
def test_gradcheck_masked(backend: str) -> None:
    for linear in (False, True):
        gradcheck(op(backend), efficient_case(Size(2, 4, 3, 3, 2), linear=linear, dtype=F64, mask=some_mask(2, 4, 3)))


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize("n_iters", [1, 2])
def test_any_subset_of_gradients(backend: str, linear: bool, n_iters: int) -> None:
    """What is not asked for changes nothing in what is: frozen parameters, x without gradient."""
    case = efficient_case(SMALL, linear=linear)
    everything = evaluate(op(backend, n_iters), case)
    names = [k for k in case.wrt if case.inputs[k] is not None]
    for wanted in [
        ("x",),
        ("W_F2",),
        ("beta_use",),
        ("W_A", "x"),
        ("W_S",),
        ("W_G1", "W_G2"),
        [k for k in names if k != "x"],
    ]:
        for name, got in evaluate(op(backend, n_iters), replace(case, wrt=tuple(wanted))).items():
            expected = everything[name]
            assert (got is None) == (expected is None), (wanted, name)
            assert got is None or (expected is not None and torch.equal(got, expected)), (wanted, name)


def test_nothing_of_size_n_by_m_is_saved() -> None:
    """What autograd holds beyond inputs and parameters grows with n alone."""
    for linear in (False, True):
        size = Size(2, 500, 60, 30, 8)
        case = efficient_case(size, linear=linear)
        kept = kept_by_autograd(efficient_op(2), case)
        b, n, m, d, h = size
        gates, moments, outputs, gram = b * n, 2 * b * m * (d + 1), 2 * b * m * h, b * (d * d + d + 1)
        assert sum(kept) <= gates + moments + outputs + (gram if linear else 0)
        assert max(kept) < b * n * m


# ---------------------------------------------------------------------------------------------------------- laws


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
def test_permuting_samples_and_concatenating_batches(backend: str, linear: bool) -> None:
    case = efficient_case(Size(5, 60, 9, 16), linear=linear, dtype=F64)
    whole = evaluate(op(backend), case)
    index = torch.tensor([3, 0, 4, 1, 2])
    turned = evaluate(op(backend), case.select("b", index))
    parts = [evaluate(op(backend), case.select("b", torch.tensor(some))) for some in ([0, 1], [2, 3, 4])]
    for name, expected in whole.items():
        a, b, other = *(part[name] for part in parts), turned[name]
        if expected is not None:
            assert a is not None and b is not None and other is not None
            sample = name in ("x_out", "dx")
            assert_same(torch.cat([a, b]) if sample else a + b, expected, name)
            assert_same(other, expected[index] if sample else expected, name)


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize("letter", ["n", "m", "d", "h"])
def test_relabelling(backend: str, linear: bool, letter: str) -> None:
    """Inputs, outputs and features may be named in any order."""
    case = efficient_case(Size(2, 40, 9, 16, 6), linear=linear, dtype=F64)
    turned = case.select(letter, torch.arange(case.size(letter) - 1, -1, -1))
    found, relabelled = evaluate(op(backend), case), evaluate(op(backend), turned)
    for name, a in found.items():
        b = relabelled[name]
        if a is not None and b is not None:
            axes = case.axes[name] if name in case.axes else case.axes[name.removeprefix("d")]
            assert_same(b.flip([k for k, called in enumerate(axes) if called == letter]), a, name)


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
def test_padding_is_deleting_at_the_right_scale(backend: str, linear: bool) -> None:
    """``lengths`` gives each sample what it gets alone at its own length; a mask keeps the scale of the padded one."""
    n, stop = 40, 25
    case = efficient_case(Size(1, n, 9, 16), linear=linear, dtype=F64)
    deleted = evaluate(op(backend), case.select("n", torch.arange(stop)))
    padded = evaluate(op(backend), case.with_inputs(lengths=torch.tensor([stop])))
    for name, expected in deleted.items():
        got = padded[name]
        if got is not None and expected is not None:
            axes = case.axes[name] if name in case.axes else case.axes[name.removeprefix("d")]
            if "n" in axes and got.shape[axes.index("n")] == n:
                assert not got.narrow(axes.index("n"), stop, n - stop).any(), name
                got = got.narrow(axes.index("n"), 0, stop)
            assert_same(got, expected, name)


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_stay_in_their_sample(backend: str, linear: bool, bad: float) -> None:
    case = efficient_case(Size(3, 300, 9, 16), linear=linear)
    dirty = case.inputs["x"].clone()  # type: ignore[union-attr]
    dirty[1, 7, 2] = bad
    clean, found = evaluate(op(backend), case), evaluate(op(backend), case.with_inputs(x=dirty))
    for name in ("x_out", "dx"):
        a, b = clean[name], found[name]
        assert a is not None and b is not None and torch.equal(a[[0, 2]], b[[0, 2]]), name
        assert not b[1].isfinite().all()


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_padding_is_never_read(backend: str, linear: bool, masked: bool) -> None:
    lengths = [40, 0, 13]
    case = efficient_case(
        Size(3, 40, 9, 16), linear=linear, lengths=lengths, mask=some_mask(3, 40, 9) if masked else None
    )
    dirty = case.inputs["x"].clone()  # type: ignore[union-attr]
    for b, stop in enumerate(lengths):
        dirty[b, stop:] = math.nan
    clean, found = evaluate(op(backend), case), evaluate(op(backend), case.with_inputs(x=dirty))
    for name, a in clean.items():
        b = found[name]
        assert a is not None and b is not None and torch.equal(a, b), name


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_what_reaches_no_output_is_never_read(backend: str, linear: bool, dtype: torch.dtype) -> None:
    mask = some_mask(3, 40, 9)
    mask[1, 7:20] = True
    case = efficient_case(Size(3, 40, 9, 16), linear=linear, mask=mask, dtype=dtype)
    clean = evaluate(op(backend), case)
    assert not clean["dx"][mask.all(-1)].any()  # type: ignore[index]
    for bad in (math.nan, math.inf, 1e30):
        dirty = case.inputs["x"].clone()  # type: ignore[union-attr]
        dirty[mask.all(-1)] = bad
        for name, got in evaluate(op(backend), case.with_inputs(x=dirty)).items():
            expected = clean[name]
            assert got is not None and expected is not None and torch.equal(got, expected), (name, bad)


@needs_native
@pytest.mark.parametrize("n_iters", [1, 2])
def test_parameters_of_masked_pairs_are_never_used(n_iters: int) -> None:
    """Each pair has its own, which no other sample uses: their gradients are zero."""
    mask = some_mask(1, 40, 9)
    case = efficient_case(Size(1, 40, 9, 16), mask=mask)
    clean = evaluate(op("native", n_iters), case)
    for bad in (math.nan, math.inf, 1e30):
        dirty = {k: case.inputs[k].masked_fill(mask[0], bad) for k in ("beta_use", "beta_ign", "W_S", "B_S")}  # type: ignore[union-attr]
        found = evaluate(op("native", n_iters), case.with_inputs(**dirty))
        for name, got in found.items():
            expected = clean[name]
            assert (got is None) == (expected is None), name
            assert got is None or (expected is not None and torch.equal(got, expected)), (name, bad)
        assert not found["dbeta_use"][mask[0]].any()  # type: ignore[index]


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
def test_same_input_same_bits(backend: str, linear: bool) -> None:
    case = efficient_case(Size(3, 1000, 33, 20), linear=linear)
    first, second = evaluate(op(backend), case), evaluate(op(backend), case)
    assert all(a is b or torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))  # type: ignore[arg-type]


@needs_native
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize(
    "size", [Size(1, 200, 64, 64, 32), Size(2, 2000, 40, 48, 64), Size(2, 600, 200, 130, 96)], ids=str
)
@pytest.mark.parametrize("form", ["plain", "masked", "bf16"])
def test_same_bits_on_any_number_of_threads(linear: bool, size: Size, form: str) -> None:
    masked = {"mask": some_mask(size.b, size.n, size.m), "lengths": [size.n - 7] * size.b}
    options: dict[str, Any] = {"plain": {}, "masked": masked, "bf16": {"dtype": BF16}}[form]
    case = efficient_case(size, linear=linear, **options)
    found = on_threads((1, 2, 3), lambda: evaluate(op("native"), case))
    for other, (name, a) in itertools.product(found[1:], found[0].items()):
        b = other[name]
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)), name


@each_backend
@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
def test_no_samples(backend: str, linear: bool) -> None:
    found = evaluate(op(backend), efficient_case(Size(0, 7, 3, 4), linear=linear))
    assert found["x_out"] is not None and found["x_out"].shape == (0, 3, 5)
    assert all(t is not None and not t.any() for t in found.values())


# ------------------------------------------------------------------------------------------------------- the op


def op_args(case: Case, n_iters: int = 2) -> tuple[Any, ...]:
    return (*case.inputs.values(), n_iters, True, "auto", "")


CHECKED = {
    "fixed": efficient_case(SMALL),
    "gram": efficient_case(SMALL, linear=True),
    "any-length-masked": efficient_case(SMALL, linear=True, mask=some_mask(2, 33, 5)),
    "lengths": efficient_case(SMALL, lengths=[3, 33]),
    "bf16 and fp32": efficient_case(SMALL, dtype=BF16, parameter_dtype=F32),
    "no samples": efficient_case(Size(0, 7, 3, 4)),
}


@pytest.mark.parametrize(
    ("name", "layout", "grad"),
    [(name, "contiguous", True) for name in CHECKED]
    + [(name, *how) for name in ("fixed", "gram") for how in (("contiguous", False), ("transposed_batch", True))],
)
@pytest.mark.long_after(4)
def test_opcheck(name: str, layout: str, grad: bool) -> None:
    opcheck(torch.ops.fastroute.efficient_routing.default, op_args(CHECKED[name]), layout=LAYOUTS[layout], grad=grad)


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize(("want_x", "want_rows"), list(itertools.product([True, False], repeat=2)))
def test_opcheck_of_the_backward_op(name: str, want_x: bool, want_rows: bool) -> None:
    case = CHECKED[name]
    out, *saved = torch.ops.fastroute.efficient_routing(*op_args(case))
    args = (*op_args(case), torch.ones_like(out), *saved, want_x, want_rows)
    torch.library.opcheck(
        torch.ops.fastroute.efficient_routing_backward.default, args, test_utils=("test_schema", "test_faketensor")
    )


#: Forms of the calls that are one.
ONE_CALL: dict[str, dict[str, Any]] = {
    "fixed": {},
    "masked": {"mask": some_mask(2, 33, 5), "lengths": [3, 33]},
    "gram": {"linear": True, "lengths": [30, 2]},
    "any-length-masked": {"linear": True, "mask": some_mask(2, 33, 5)},
    "bf16": {"dtype": BF16, "parameter_dtype": F32},
}


@needs_native
@pytest.mark.parametrize("form", ONE_CALL)
@pytest.mark.parametrize("n_iters", [1, 2])
@pytest.mark.parametrize(("want_x", "want_rows"), list(itertools.product([True, False], repeat=2)))
def test_opcheck_of_one_call(form: str, n_iters: int, want_x: bool, want_rows: bool) -> None:
    case = efficient_case(SMALL, **ONE_CALL[form])
    given = [case.inputs[name] for name in native.NAMES]
    out, kept = torch.ops.fastroute._efficient_routing_native(*given, n_iters, True)
    backward = *given, n_iters, True, torch.ones_like(out), kept, want_x, want_rows
    for op, args in (
        (torch.ops.fastroute._efficient_routing_native, (*given, n_iters, True)),
        (torch.ops.fastroute._efficient_routing_native_backward, backward),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@needs_native
@pytest.mark.parametrize("form", ["fixed", "masked", "gram", "any-length-masked", "one beta"])
@pytest.mark.parametrize("n_iters", [1, 3])
def test_one_call_gives_what_passes_give(n_iters: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide calls go through the library's products instead."""
    size, options = Size(5, 150, 21, 85 if form == "one beta" else 40, 24), {"linear": form not in ("fixed", "masked")}
    if "masked" in form:
        options |= {"mask": some_mask(5, 150, 21), "lengths": [150, 0, 1, 77, 149]}  # type: ignore[dict-item]
    case = efficient_case(size, dtype=F64, **options)  # type: ignore[arg-type]
    one = evaluate(op("native", n_iters), case)
    monkeypatch.setattr(native, "WIDEST", 0)
    monkeypatch.setattr(native, "WIDEST_LINEAR", 0)
    for name, expected in evaluate(op("native", n_iters), case).items():
        got = one[name]
        assert (got is None) == (expected is None), name
        if got is not None and expected is not None:
            assert_same(got, expected, name)


@needs_native
@pytest.mark.parametrize("form", ONE_CALL)
def test_the_op_of_exported_graphs_has_the_bits_of_one_call(form: str) -> None:
    case = efficient_case(SMALL, **ONE_CALL[form])

    def exported(**inputs: Tensor | None) -> dict[str, Tensor]:
        return {"x_out": torch.ops.fastroute.efficient_routing(*inputs.values(), 2, True, "auto", "")[0]}

    found = evaluate(exported, case)
    for name, expected in evaluate(efficient_op(2), case).items():
        got = found[name]
        assert (got is None) == (expected is None), name
        assert got is None or (expected is not None and torch.equal(got, expected)), name


@needs_native
def test_which_calls_are_one() -> None:
    """A compiled graph shows it: what is wide, in float16 or under autocast takes the passes."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes if "routing" in str(node.target))
        return graph.forward  # type: ignore[no-any-return]

    def ops_of(fn: Callable[..., Any], case: Case) -> str:
        seen.clear()
        torch._dynamo.reset()
        inputs = {k: t for k, t in case.inputs.items() if t is not None}
        nothing = dict.fromkeys(k for k in case.inputs if k not in inputs)
        torch.compile(lambda given: fn(**given, **nothing)["x_out"], backend=backend, fullgraph=True)(inputs)
        return " ".join(seen)

    masked = {"mask": some_mask(2, 33, 5), "lengths": [3, 33]}
    for options in ({}, {"linear": True}, masked, {"linear": True, **masked}, {"dtype": BF16}):
        assert "_efficient_routing_native" in ops_of(efficient_op(), efficient_case(SMALL, **options)), options  # type: ignore[arg-type]
    for case in (efficient_case(SMALL, dtype=torch.float16), efficient_case(Size(1, 2, 200, 200), linear=True)):
        found = ops_of(efficient_op(), case)
        assert "native" not in found and "efficient_routing" in found
    with use_backend("reference"):
        assert "native" not in ops_of(efficient_op(), efficient_case(SMALL))


@pytest.mark.parametrize("linear", [False, True], ids=["fixed", "any-length"])
def test_compiles_once_for_all_sizes(linear: bool) -> None:
    sizes = [Size(b, n if linear else 20, 5, 8) for b, n in ((2, 20), (7, 20), (3, 400))]  # parameters may fix n
    cases = [efficient_case(size, linear=linear) for size in sizes]
    names = [k for k, t in cases[0].inputs.items() if t is not None]
    parameters = {k: t.clone().requires_grad_() for k in names[1:] if (t := cases[0].inputs[k]) is not None}

    def call(x: Tensor) -> Tensor:
        made: Tensor = efficient_op(2)(**{**dict.fromkeys(cases[0].inputs), **parameters, "x": x})["x_out"]
        return made

    calls = [[case.inputs["x"].clone().requires_grad_()] for case in cases]  # type: ignore[union-attr]
    check_compiled(call, calls, parameters=[t for k, t in parameters.items() if k != "prior"])


@pytest.mark.long
def test_compiles_with_inductor() -> None:
    case = efficient_case(SMALL, dtype=F64)
    call = partial(efficient_op(2), **{k: t for k, t in case.inputs.items() if k != "x"})
    x = case.inputs["x"]
    assert x is not None
    check_compiled(lambda x: call(x=x)["x_out"] * 2, [[x.clone().requires_grad_()]], backend="inductor")
