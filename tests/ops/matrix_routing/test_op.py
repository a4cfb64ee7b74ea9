"""``matrix_routing`` on every backend against float64 autograd of the literal equations.

Axes: b samples, n input capsules, m output capsules, c rows of a capsule's matrix, d its columns before, h after.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fastroute import explain, functional, use_backend
from fastroute.ops.matrix_routing.contract import Capsules
from fastroute.ops.matrix_routing.op import _backward, _forward
from tests.helpers import strategies
from tests.helpers.backends import each_backend, needs_native
from tests.helpers.budget import check
from tests.helpers.cases import Case, Results, evaluate
from tests.helpers.layouts import LAYOUTS
from tests.helpers.matrix_cases import Size, matrix_case, matrix_op, matrix_truth
from tests.helpers.opcheck import assert_all_same, assert_same, check_compiled, gradcheck, kept_by_autograd, opcheck
from tests.helpers.process_wide import on_threads
from tests.helpers.routing_cases import some_mask

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
SMALL = Size(2, 23, 5, 3, 4, 2)
each_kind = pytest.mark.parametrize("shared", [False, True], ids=["fixed", "any-number"])
each_model = pytest.mark.parametrize("p_model", ["gaussian", "skm"])


def op(backend: str, n_iters: int = 3, **options: Any) -> Callable[..., dict[str, Tensor | None]]:
    def call(**inputs: Tensor | None) -> dict[str, Tensor | None]:
        with use_backend(backend):
            return dict(matrix_op(n_iters, **options)(**inputs))

    return call


def checked(
    backend: str, size: Size, plain: torch.dtype = F32, *, n_iters: int = 3, p_model: str = "gaussian", draws: int = 2,
    **options: Any,
) -> Results:  # fmt: skip
    """Within budget, over several seeds."""
    cases = [matrix_case(size, **{"dtype": plain, **options}, seed=seed) for seed in range(draws)]
    call, truth = op(backend, n_iters, p_model=p_model), matrix_truth(n_iters, p_model=p_model)
    return check(call, truth, cases, dtype=plain)


# ------------------------------------------------------------------------------------------------------- numbers


@each_backend
@each_kind
@each_model
@pytest.mark.parametrize("n_iters", [1, 2, 4])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
def test_iterations(backend: str, shared: bool, p_model: str, n_iters: int, dtype: torch.dtype) -> None:
    if dtype == F64:
        case = matrix_case(SMALL, dtype=dtype, shared=shared)
        found = evaluate(op(backend, n_iters, p_model=p_model), case)
        assert_all_same(found, evaluate(matrix_truth(n_iters, p_model=p_model), case))
    else:
        found = checked(backend, SMALL, dtype, shared=shared, n_iters=n_iters, p_model=p_model)
    wide = torch.promote_types(dtype, F32)
    for name, made in (("a", dtype), ("mu", dtype), ("sig2", wide)):
        t = found[name]
        assert t is not None and t.dtype == made and t.is_contiguous()


SIZES = [
    Size(3, 1, 2, 1, 1, 1),
    Size(2, 7, 5, 3, 2, 1),
    Size(1, 40, 17, 1, 5, 3),
    Size(5, 33, 10, 4, 4, 4),
    Size(1, 300, 33, 2, 2, 2),
    Size(2, 10, 9, 1, 40, 9),
    Size(1, 9, 3, 2, 3, 70),  # more votes than are added up in one run
]


@each_backend
@each_kind
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend: str, shared: bool, size: Size) -> None:
    checked(backend, size, shared=shared, draws=2 if size.n < 300 else 1)


@each_backend
@each_kind
def test_a_large_size_in_float64(backend: str, shared: bool) -> None:
    """Pieces and tiles, where a wrong boundary cannot hide behind float32's rounding."""
    size = Size(9, 700, 18, 2, 3, 4)
    case = matrix_case(size, shared=shared, dtype=F64, mask=some_mask(size.b, size.n, size.m))
    assert_all_same(evaluate(op(backend), case), evaluate(matrix_truth(), case))


@each_backend
@each_kind
@pytest.mark.parametrize("far", [10.0, 1000.0])
def test_votes_far_from_zero(backend: str, shared: bool, far: float) -> None:
    """Variances do not come from the difference of two large numbers."""
    checked(backend, Size(2, 200, 5, 2, 3, 4), shared=shared, far=far, n_iters=2)


@each_backend
@each_kind
def test_inputs_of_very_different_weight(backend: str, shared: bool) -> None:
    """Tiles whose inputs hardly count, tight clusters beside them, an output that nothing reaches."""
    cases = []
    for seed in range(3):
        case = matrix_case(Size(2, 150, 6, 2, 3, 4), shared=shared, seed=seed)
        a, mu = case.inputs["a_inp"], case.inputs["mu_inp"]
        assert a is not None and mu is not None
        a[:, :64] -= 12
        mu[:, 100:] = mu[:, 100:] * 1e-2 + 5
        mask = torch.zeros(2, 150, 6, dtype=torch.bool)
        mask[..., 4] = True
        cases.append(case.with_inputs(mask=mask))
    found = check(op(backend, 2), matrix_truth(2), cases, dtype=F32)
    a_out, mu_out = found["a"], found["mu"]
    assert a_out is not None and mu_out is not None and not a_out[:, 4].any() and not mu_out[:, 4].any()


@each_backend
@each_kind
@pytest.mark.parametrize(
    ("x", "parameters"),
    [(BF16, F32), (F32, BF16), (F64, F32), (F32, F64)],
    ids=["bf16-fp32", "fp32-bf16", "fp64-fp32", "fp32-fp64"],
)
def test_inputs_and_parameters_of_different_dtypes(
    backend: str, shared: bool, x: torch.dtype, parameters: torch.dtype
) -> None:
    wide = torch.promote_types(x, parameters)
    case = matrix_case(SMALL, shared=shared, dtype=x, parameter_dtype=parameters)
    found, exact = evaluate(op(backend), case), evaluate(matrix_truth(), case.to(F64))
    for name, expected in exact.items():
        got, given = found[name], case.inputs.get(name[1:])
        assert got is not None and expected is not None
        assert got.dtype == (wide if given is None else given.dtype), name
        spacing = torch.finfo(got.dtype if wide != F64 or got.dtype != F64 else F32).eps
        assert (got.double() - expected).abs().max() <= 64 * spacing * expected.abs().max(), name


def test_half_precision_runs_on_the_reference() -> None:
    checked("auto", SMALL, F16, n_iters=2)


@each_backend
@each_kind
@each_model
def test_masks(backend: str, shared: bool, p_model: str) -> None:
    found = checked(backend, SMALL, shared=shared, p_model=p_model, mask=some_mask(SMALL.b, SMALL.n, SMALL.m))
    da, dmu = found["da_inp"], found["dmu_inp"]
    assert da is not None and dmu is not None
    assert not da[0, SMALL.n // 2].any() and not dmu[0, SMALL.n // 2].any()  # an input that reaches nothing


@each_backend
@hypothesis.given(data=st.data())
def test_any_call(backend: str, data: st.DataObject) -> None:
    """In float64, where agreement is to the formula whatever the conditioning of the drawn case."""
    small = st.integers(1, 5)
    rows = st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 130]))
    b, n, m = data.draw(strategies.batches), data.draw(rows), data.draw(strategies.outputs)
    size = Size(b, n, m, *(data.draw(small) for _ in range(3)))
    mask = data.draw(strategies.masks(b, n, m), "mask")
    case = matrix_case(
        size,
        dtype=F64,
        shared=data.draw(st.booleans(), "shared"),
        mask=None if mask is None else mask.expand(b, n, m),
        seed=data.draw(strategies.seeds, "seed"),
    )
    layout = LAYOUTS[data.draw(strategies.layouts, "layout")]
    laid = case.with_inputs(**{k: None if t is None else layout(t) for k, t in case.inputs.items()})
    options: dict[str, Any] = {
        "n_iters": data.draw(st.integers(1, 3)),
        "p_model": data.draw(st.sampled_from(["gaussian", "skm"])),
        "eps": data.draw(st.sampled_from([1e-5, 1e-2])),
    }
    assert_all_same(evaluate(op(backend, **options), laid), evaluate(matrix_truth(**options), case))


# ------------------------------------------------------------------------------------------------------ gradients


@each_backend
@each_kind
@pytest.mark.parametrize(("p_model", "masked"), [("gaussian", False), ("gaussian", True), ("skm", True)], ids=str)
def test_gradcheck(backend: str, shared: bool, p_model: str, masked: bool) -> None:
    size = Size(2, 3, 2, 2, 2, 1)
    case = matrix_case(size, shared=shared, mask=some_mask(2, 3, 2) if masked else None)
    for n_iters in (1, 3):
        gradcheck(op(backend, n_iters, p_model=p_model, eps=1e-2), case)


@each_backend
@each_kind
def test_any_subset_of_gradients(backend: str, shared: bool) -> None:
    """What is not asked for changes nothing in what is; nor does an output that nobody differentiates."""
    case = matrix_case(SMALL, shared=shared)
    everything = evaluate(op(backend), case)
    for wanted in [("a_inp",), ("mu_inp",), ("W",), ("beta_use", "a_inp"), ("W", "B", "beta_use", "beta_ign")]:
        for name, got in evaluate(op(backend), replace(case, wrt=wanted)).items():
            expected = everything[name]
            assert got is not None and expected is not None and torch.equal(got, expected), (wanted, name)
    silent = {k: torch.zeros_like(t) if k != "mu" else t for k, t in case.cotangents.items()}
    one = evaluate(op(backend), replace(case, cotangents=silent))
    other = evaluate(op(backend), replace(case, cotangents={"mu": case.cotangents["mu"]}))
    assert all(torch.equal(one[k], t) for k, t in other.items())  # type: ignore[arg-type]


def test_no_votes_are_saved() -> None:
    """What autograd holds beyond inputs and parameters does not grow with n."""
    for shared, n in itertools.product((False, True), (50, 400)):
        size = Size(2, n, 20, 3, 4, 2)
        case = matrix_case(size, shared=shared)
        kept = kept_by_autograd(matrix_op(3), case)
        assert 0 < sum(kept) <= 3 * size.b * size.m * (3 * size.c * size.h + 2)


# ---------------------------------------------------------------------------------------------------------- laws


def axes_of(case: Case, name: str) -> str:
    return case.axes[name] if name in case.axes else case.axes[name.removeprefix("d")]


@each_backend
@each_kind
def test_permuting_samples_and_concatenating_batches(backend: str, shared: bool) -> None:
    case = matrix_case(Size(5, 40, 9, 2, 3, 4), shared=shared, dtype=F64)
    whole = evaluate(op(backend), case)
    index = torch.tensor([3, 0, 4, 1, 2])
    turned = evaluate(op(backend), case.select("b", index))
    parts = [evaluate(op(backend), case.select("b", torch.tensor(some))) for some in ([0, 1], [2, 3, 4])]
    for name, expected in whole.items():
        a, b, other = *(part[name] for part in parts), turned[name]
        assert expected is not None and a is not None and b is not None and other is not None
        sample = "b" in axes_of(case, name)
        assert_same(torch.cat([a, b]) if sample else a + b, expected, name)
        assert_same(other, expected[index] if sample else expected, name)


@each_backend
@each_kind
@pytest.mark.parametrize("letter", ["n", "m", "c", "d", "h"])
def test_relabelling(backend: str, shared: bool, letter: str) -> None:
    case = matrix_case(Size(2, 40, 9, 2, 3, 4), shared=shared, dtype=F64)
    turned = case.select(letter, torch.arange(case.size(letter) - 1, -1, -1))
    found, relabelled = evaluate(op(backend), case), evaluate(op(backend), turned)
    for name, a in found.items():
        b = relabelled[name]
        assert a is not None and b is not None
        assert_same(b.flip([k for k, called in enumerate(axes_of(case, name)) if called == letter]), a, name)


@each_backend
@each_kind
@pytest.mark.parametrize("how", ["mask", "activation"])
@pytest.mark.parametrize("junk", [0.0, math.nan])
def test_dropping_an_input_is_deleting_it(backend: str, shared: bool, how: str, junk: float) -> None:
    """And its matrix is not read."""
    case = matrix_case(Size(2, 40, 9, 2, 3, 4), shared=shared, dtype=F64)
    kept = torch.tensor([i for i in range(40) if i % 3])
    a, mu = case.inputs["a_inp"], case.inputs["mu_inp"]
    assert a is not None and mu is not None
    gone = torch.arange(40) % 3 == 0
    changed: dict[str, Tensor] = {"mu_inp": mu.masked_fill(gone[:, None, None], junk)}
    if how == "mask":
        changed["mask"] = gone[:, None].expand(2, 40, 9)
    else:
        changed["a_inp"] = a.masked_fill(gone, -math.inf)
    found = evaluate(op(backend), case.with_inputs(**changed))
    for name, expected in evaluate(op(backend), case.select("n", kept)).items():
        got, axes = found[name], axes_of(case, name)
        assert got is not None and expected is not None
        if "n" in axes and got.shape[axes.index("n")] > 1:
            assert not got.index_select(axes.index("n"), gone.nonzero().flatten()).any(), name
            got = got.index_select(axes.index("n"), kept)
        assert_same(got, expected, name)


@each_backend
@each_kind
def test_closing_an_output_is_deleting_it(backend: str, shared: bool) -> None:
    case = matrix_case(Size(2, 40, 9, 2, 3, 4), shared=shared, dtype=F64)
    kept = torch.tensor([j for j in range(9) if j != 4])
    mask = torch.zeros(2, 40, 9, dtype=torch.bool)
    mask[..., 4] = True
    found = evaluate(op(backend), case.with_inputs(mask=mask))
    for name, expected in evaluate(op(backend), case.select("m", kept)).items():
        got, axes = found[name], axes_of(case, name)
        assert got is not None
        assert_same(got.index_select(axes.index("m"), kept) if "m" in axes else got, expected, name)  # type: ignore[arg-type]


@each_backend
def test_shared_parameters_are_the_same_for_every_input(backend: str) -> None:
    shared = matrix_case(Size(2, 40, 9, 2, 3, 4), shared=True, dtype=F64)
    each = {k: shared.inputs[k].expand(40, *[-1] * (len(shared.axes[k]) - 1)) for k in shared.wrt[2:]}  # type: ignore[union-attr]
    one, other = evaluate(op(backend), shared), evaluate(op(backend), shared.with_inputs(**each))
    for name, a in one.items():
        b = other[name]
        assert a is not None and b is not None
        assert_same(b if a.shape == b.shape else b.sum(0, keepdim=True), a, name)


@each_backend
@each_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_stay_in_their_sample(backend: str, shared: bool, bad: float) -> None:
    case = matrix_case(Size(3, 100, 9, 2, 3, 4), shared=shared)
    for name in ("mu_inp", "a_inp"):
        dirty = case.inputs[name].clone()  # type: ignore[union-attr]
        dirty[1, 7] = math.nan if name == "a_inp" else bad
        clean, found = evaluate(op(backend), case), evaluate(op(backend), case.with_inputs(**{name: dirty}))
        for made in ("a", "mu", "sig2", "da_inp", "dmu_inp"):
            a, b = clean[made], found[made]
            assert a is not None and b is not None and torch.equal(a[[0, 2]], b[[0, 2]]), made
            assert not b[1].isfinite().all()


@needs_native
@each_kind
@pytest.mark.parametrize("size", [Size(1, 600, 20, 2, 3, 4), Size(20, 70, 20, 2, 3, 4)], ids=str)
def test_same_bits_on_any_number_of_threads(shared: bool, size: Size) -> None:
    case = matrix_case(size, shared=shared)
    found = on_threads((1, 2, 2), lambda: evaluate(op("native"), case))
    for name, a in found[0].items():
        assert all(torch.equal(a, other[name]) for other in found[1:]), name  # type: ignore[arg-type]


@each_backend
@each_kind
@pytest.mark.parametrize("size", [Size(0, 7, 3, 2, 3, 4), Size(2, 0, 3, 2, 3, 4)], ids=str)
def test_nothing_to_route(backend: str, shared: bool, size: Size) -> None:
    found = evaluate(op(backend, eps=0.5), matrix_case(size, shared=shared))
    sig2 = found.pop("sig2")
    assert sig2 is not None and sig2.shape == (size.b, 3, 2, 4) and (sig2 == 0.5).all()
    assert all(t is not None and not t.any() for t in found.values())


# ------------------------------------------------------------------------------------------------------- the op


def op_args(case: Case, n_iters: int = 3, p_model: str = "gaussian") -> tuple[Any, ...]:
    order = ("a_inp", "mu_inp", "W", "B", "beta_use", "beta_ign", "mask")
    return (*(case.inputs[k] for k in order), n_iters, p_model, 1e-5, "auto")


@pytest.mark.parametrize(("layout", "shared"), [("contiguous", True), ("strided", False), ("columns_first", True)])
def test_opcheck(layout: str, shared: bool) -> None:
    case = matrix_case(Size(2, 9, 3, 2, 3, 2), shared=shared, mask=some_mask(2, 9, 3))
    opcheck(torch.ops.fastroute.matrix_routing.default, op_args(case), layout=LAYOUTS[layout])


def test_opcheck_of_the_gradient() -> None:
    case = matrix_case(Size(2, 9, 3, 2, 3, 2))
    args = op_args(case, p_model="skm")
    made = torch.ops.fastroute.matrix_routing(*args)
    backward = torch.ops.fastroute.matrix_routing_backward.default
    for wanted in ((False, True), (True, False)):
        opcheck(backward, (*args, *case.cotangents.values(), *made[3:], *wanted), grad=False)


@pytest.mark.parametrize(
    ("shared", "compiler"),
    [(False, "aot_eager"), (True, "aot_eager"), pytest.param(True, "inductor", marks=pytest.mark.long)],
    ids=str,
)
def test_one_graph_for_every_batch(shared: bool, compiler: str) -> None:
    dtype = F32 if compiler == "aot_eager" else F64
    cases = [matrix_case(Size(b, 30, 5, 2, 3, 4), shared=shared, dtype=dtype) for b in (6, 7, 8)]
    w = {k: cases[0].inputs[k].requires_grad_() for k in ("W", "B", "beta_use", "beta_ign")}  # type: ignore[union-attr]
    calls = [(case.inputs["a_inp"].requires_grad_(), case.inputs["mu_inp"].requires_grad_()) for case in cases]  # type: ignore[union-attr]

    def fn(a: Tensor, mu: Tensor) -> tuple[Tensor, ...]:
        return tuple(functional.matrix_routing(a * 2, mu, Capsules(**w), n_iters=2, eps=1e-5))

    check_compiled(fn, calls, parameters=list(w.values()), backend=compiler)


@each_kind
def test_autocast_computes_in_float32(shared: bool) -> None:
    case = matrix_case(SMALL, shared=shared)
    plain = evaluate(op("auto"), case)
    with torch.autocast("cpu", dtype=BF16):
        found = evaluate(op("auto"), case)
    assert all(torch.equal(t, plain[k]) for k, t in found.items())  # type: ignore[arg-type]


def test_the_reference_depends_on_no_value() -> None:
    """On fake tensors whatever would need a value raises: the same passes are then free of host syncs on a GPU."""
    mode = FakeTensorMode()
    for shared, mask in itertools.product((False, True), (None, some_mask(2, 300, 5))):
        case = matrix_case(Size(2, 300, 5, 3, 4, 2), shared=shared, mask=mask)
        args = (*op_args(case)[:-1], "reference")
        given = tree_map_only(Tensor, mode.from_tensor, (args, tuple(case.cotangents.values())))
        with mode:
            made = _forward(*given[0])
            _backward(*given[0], *given[1], *made[3:], True, True)


@each_backend
def test_explain(backend: str) -> None:
    case = matrix_case(SMALL)
    with use_backend(backend):
        (decision,) = explain(lambda: matrix_op()(**case.inputs))
    assert decision.backend == backend and str(decision.case) == (
        "matrix_routing on cpu, float32, B=2, n=23, m=5, c=3, d=4, h=2"
    )


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mu_inp": torch.zeros(2, 23, 4)}, ValueError, r"mu_inp: expected \[B, n, c, d\], got \[2, 23, 4\]"),
    ({"a_inp": torch.zeros(2, 22)}, ValueError, r"a_inp: expected shape \[2, 23\] \(B, n\), got \[2, 22\]"),
    ({"a_inp": torch.zeros(2, 23, dtype=torch.int64)}, TypeError, r"a_inp: expected a floating-point tensor"),
    ({"W": torch.zeros(23, 5, 4)}, ValueError, r"W: expected \[n or 1, m, d, h\], got \[23, 5, 4\]"),
    ({"W": torch.zeros(22, 5, 4, 2)}, ValueError, r"W: expected shape \[23, 5, 4, 2\]"),
    ({"B": torch.zeros(1, 5, 3, 2)}, ValueError, r"B: expected shape \[23, 5, 3, 2\]"),
    ({"beta_use": torch.zeros(23, 6)}, ValueError, r"beta_use: expected shape \[23, 5\]"),
    ({"beta_ign": torch.zeros(23, 5, device="meta")}, ValueError, r"beta_ign: expected a tensor on cpu like mu_inp"),
    ({"mask": torch.zeros(23, 5)}, TypeError, r"mask: expected a bool tensor"),
    ({"mask": torch.zeros(22, 5).bool()}, ValueError, r"mask: expected a shape that broadcasts to \[2, 23, 5\]"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        matrix_op()(**matrix_case(SMALL).with_inputs(**wrong).inputs)


def test_bad_options() -> None:
    case = matrix_case(SMALL)
    with pytest.raises(ValueError, match="n_iters: expected at least 1, got 0"):
        matrix_op(0)(**case.inputs)
    with pytest.raises(ValueError, match="p_model: expected one of gaussian, skm, got 'normal'"):
        matrix_op(1, p_model="normal")(**case.inputs)
