"""The Triton kernels against float64 autograd of the reference: compiled on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import EfficientVectorRouting, use_backend
from fastroute.kernels import launch
from fastroute.kernels.vector_routing import launch as vector_routing
from fastroute.kernels.vector_routing.plan import leaves
from fastroute.ops.vector_routing import plain as tiles
from fastroute.ops.vector_routing.contract import Passes
from fastroute.ops.vector_routing.reference import gates, row_is_live
from tests.helpers.budget import Yardstick
from tests.helpers.covering import in_pairs
from tests.helpers.routing_cases import some_mask

from .oracle import (
    PARAMETERS,
    Problem,
    Size,
    answer,
    assert_within_budget,
    empty_grads,
    forward_passes,
    passes_of,
    problem,
    run,
)

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SMALL = Size(2, 33, 5, 24)


PATHS = {"one-pass": True, "two-phase": False}


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    monkeypatch.setattr(vector_routing, "force_one_pass", request.param)
    yield request.param


def make(size: Size = SMALL, **options: Any) -> Problem:
    return problem(size, device=DEVICE, **options)


KINDS = {
    "next": {},
    "next-without-ign": {"ign": False},
    "next-linear": {"linear": True},
    "next-linear-without-ign": {"linear": True, "ign": False},
    "next-linear-own-scores": {"linear": True, "shared_scores": False},
    "next-shared-scores": {"shared_scores": True},
    "first": {"first": True},
    "first-made": {"first": True, "made": True},
    "first-made-without-ign": {"first": True, "made": True, "ign": False},
    "first-linear": {"first": True, "linear": True},
    "first-linear-made": {"first": True, "made": True, "linear": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, path: bool) -> None:
    case = make(**KINDS[kind])
    assert_within_budget(run(vector_routing, case), case)


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@in_pairs(
    indirect=["path"], kind=["next", "next-linear", "first-made", "first-linear-made"], dtype=HALF,
    parameters=["same", "float32"], path=PATHS,
)  # fmt: skip
def test_half_precision(kind: str, dtype: torch.dtype, parameters: str, path: bool) -> None:
    case = make(
        Size(2, 40, 9, 24), dtype=dtype, parameter_dtype=None if parameters == "same" else torch.float32, **KINDS[kind]
    )
    assert_within_budget(run(vector_routing, case), case)


@in_pairs(indirect=["path"], kind=["next", "first-made", "next-linear"], precision=HALF.keys(), path=PATHS)
def test_float32_with_half_products(kind: str, precision: str, path: bool) -> None:
    """As under autocast: operands of the products are rounded, nothing else is."""
    case = make(Size(2, 40, 9, 24), precision=precision, **KINDS[kind])
    found = run(vector_routing, case)
    assert all(t.dtype == torch.float32 for t in found.values())
    assert_within_budget(found, case, dtype=HALF[precision])


@in_pairs(
    indirect=["path"],
    size=[Size(16, 1, 2, 1), Size(16, 1, 17, 8), Size(2, 65, 17, 8), Size(1, 33, 100, 130), Size(1, 20, 300, 24)],
    kind=["next", "first-made", "next-linear"],
    path=PATHS,
)
def test_sizes(size: Size, kind: str, path: bool) -> None:
    case = make(size, **KINDS[kind])
    assert_within_budget(run(vector_routing, case), case)


MASKS = {
    "shared": some_mask(33, 5).expand(2, 33, 5),
    "own": some_mask(2, 33, 5),
    "causal": torch.ones(33, 5, dtype=torch.bool).triu(1).expand(2, 33, 5),
    "columns": (torch.arange(5) == 2).expand(2, 33, 5),
    "transposed": some_mask(2, 5, 33).mT,
    "all": torch.ones(2, 33, 5, dtype=torch.bool),
    "none": torch.zeros((), dtype=torch.bool).expand(2, 33, 5),
}


@in_pairs(indirect=["path"], mask=MASKS.keys(), kind=["next", "first-made", "next-linear"], path=PATHS)
def test_masks(mask: str, kind: str, path: bool) -> None:
    case = make(mask=MASKS[mask], **KINDS[kind])
    found = run(vector_routing, case)
    assert_within_budget(found, case)
    if mask == "all":
        assert not any(found[name].any() for name in ("M", "p", "dx", "dgate"))


@pytest.mark.parametrize("kind", ["next", "first", "first-made", "next-linear", "first-linear-made"])
def test_lengths(kind: str, path: bool) -> None:
    """Rows past a sample's length are never read: they hold NaN here."""
    size = Size(3, 33, 5, 24)
    case = make(size, lengths=[33, 0, 17], **KINDS[kind])
    with_nan = case.step.x.clone()
    with_nan[1], with_nan[2, 17:] = float("nan"), float("nan")
    found = run(vector_routing, case._replace(step=case.step._replace(x=with_nan)))
    assert_within_budget(found, case)
    for name in ("dx", "dgate"):
        assert not found[name][1].any() and not found[name][2, 17:].any()


@pytest.mark.parametrize("kind", ["next", "next-linear", "first-made", "first-linear-made"])
def test_adds_to_what_is_there(kind: str, path: bool) -> None:
    case = make(**KINDS[kind])
    assert_within_budget(run(vector_routing, case, start=2.0), case, start=2.0)


@in_pairs(
    indirect=["path"],
    kind=["next", "next-linear", "first-made", "first-linear-made"],
    wanted={"no-x": (False, True), "no-rows": (True, False), "neither": (False, False)},
    path=PATHS,
)
def test_gradients_not_wanted(kind: str, wanted: tuple[bool, bool], path: bool) -> None:
    want_x, want_rows = wanted
    case = make(**KINDS[kind])
    absent = (() if want_x else ("dx",)) + (() if want_rows else tuple(f"d{name}" for name in PARAMETERS))
    found = run(vector_routing, case, want_x=want_x, want_rows=want_rows)
    assert not set(absent) & set(found)
    assert_within_budget(found, case, but=absent)


def test_first_iteration_alone_zeroes_the_scores(path: bool) -> None:
    """With one iteration the score parameters have buffers but no gradient."""
    case = make(first=True)
    grads = empty_grads(case.step)
    grads.score_weight, grads.score_bias = (torch.full((33, 5), float("nan"), device=DEVICE) for _ in range(2))
    vector_routing.backward(case.step, case.dM, case.dp, grads)
    assert not grads.score_weight.any() and not grads.score_bias.any()


def test_underflowing_logits(path: bool) -> None:
    """Every sigmoid of a row underflows in float32; R is that of the logarithms."""
    case = make()
    case = case._replace(step=case.step._replace(score_bias=case.step.score_bias - 200.0))
    assert_within_budget(run(vector_routing, case), case)


@pytest.mark.parametrize("kind", ["next", "first-made"])
def test_strided_x(kind: str, path: bool) -> None:
    case = make(**KINDS[kind])
    x = case.step.x
    views = {
        "every second row": torch.stack([x, x + 1], 2).flatten(1, 2)[:, ::2],
        "wider rows": torch.cat([x, x], -1)[..., 24:],
        "batch second": x.transpose(0, 1).contiguous().transpose(0, 1),
    }
    expected = run(vector_routing, case)
    for name, view in views.items():
        found = run(vector_routing, case._replace(step=case.step._replace(x=view)))
        assert all(torch.equal(found[k], expected[k]) for k in expected), name


@pytest.mark.parametrize("kind", ["next", "first-made", "next-linear"])
def test_nan_stays_in_its_sample(kind: str, path: bool) -> None:
    case = make(**KINDS[kind])
    expected = run(vector_routing, case)
    x = case.step.x.clone()
    x[0, 7] = float("nan")
    found = run(vector_routing, case._replace(step=case.step._replace(x=x)))
    assert found["M"][0].isnan().any()
    for name in {"M", "p", "gate", "dx", "dgate", "dpred"} & set(expected):
        assert torch.equal(found[name][1], expected[name][1]), name


@pytest.mark.parametrize("kind", ["next", "first-linear-made"])
def test_same_input_same_bits(kind: str, path: bool) -> None:
    case = make(**KINDS[kind])
    once, again = run(vector_routing, case), run(vector_routing, case)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("kind", ["next", "first-made", "next-linear", "first-linear-made"])
def test_chunks(kind: str, path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and samples taken in several chunks, split sums and a small machine, give the same."""
    real = vector_routing.plan
    monkeypatch.setattr(
        vector_routing,
        "plan",
        lambda *a, **k: real(*a, **{**k, "sms": 2})._replace(batch=2, rows=16, splits=2, shared_splits=2),
    )
    case = make(Size(3, 40, 5, 24), lengths=[40, 11, 0], **KINDS[kind])
    assert_within_budget(run(vector_routing, case), case)
    assert_within_budget(run(vector_routing, case, start=2.0), case, start=2.0)


@in_pairs(indirect=["path"], kind=KINDS.keys(), precision=["ieee", "tf32"], path=PATHS)
def test_turned(kind: str, precision: str, path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands of products as TF32's tensor cores take them, over chunks that do not fill their blocks."""
    real = vector_routing.plan
    monkeypatch.setattr(vector_routing, "force_turned", True)
    monkeypatch.setattr(
        vector_routing, "plan", lambda *a, **k: real(*a, **{**k, "sms": 2})._replace(rows=24, splits=2, batch=2)
    )
    case = make(Size(3, 57, 5, 24), precision=precision, lengths=[57, 0, 31], **KINDS[kind])
    assert_within_budget(run(vector_routing, case), case)


def test_operands_of_tf32_products_are_rounded() -> None:
    """Tensor cores cut digits off, which is twice as far off, and always towards zero."""
    values = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 3 * 2**-11, 3e38, -0.0, 1e-40])
    expected = [1.0, 1 + 2**-10, 1.0, -1 - 2**-9, 3e38, -0.0, 1e-40]
    found = vector_routing.nearest_tf32(torch.cat([values, torch.tensor([float("inf"), float("nan")])]))
    assert found[-2] == float("inf") and found[-1].isnan()
    torch.testing.assert_close(found[:-2], torch.tensor(expected), rtol=2**-11, atol=1e-41)
    assert not (found[:-2].view(torch.int32) & 0x1FFF).any()
    assert found[1] == 1 + 2**-10 and found[2] == 1.0


def narrowed(cases: list[Problem], monkeypatch: pytest.MonkeyPatch, force: bool = True) -> list[dict[str, Tensor]]:
    monkeypatch.setattr(vector_routing, "force_narrow", force)
    found, kept = forward_passes(vector_routing, cases, lost=force)
    assert (kept is not None) == force
    return found


NARROW = {
    "plain": {},
    "lengths": {"lengths": [33, 0, 17]},
    "mask": {"mask": some_mask(3, 33, 5)},
    "without-ign": {"ign": False},
    "bf16-parameters": {"parameter_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", NARROW.values(), ids=NARROW)
def test_narrow(options: dict[str, Any], path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """x is read once: the second pass never sees it, over chunks that do not fill their blocks."""
    real = vector_routing.plan
    monkeypatch.setattr(
        vector_routing, "plan", lambda *a, **k: real(*a, **{**k, "sms": 2})._replace(rows=24, splits=2, batch=2)
    )
    cases = passes_of(vector_routing, Size(3, 33, 5, 150), device=DEVICE, **options)
    for found, case in zip(narrowed(cases, monkeypatch), cases, strict=True):
        assert_within_budget(found, case, forward=True)


@pytest.mark.parametrize(
    "rows",
    [
        10.0 ** torch.linspace(-20, 18, 33)[:, None],  # rows far apart
        10.0 ** torch.linspace(0, -7, 24)[None, :],  # columns far apart: small ones keep their digits
        torch.where(torch.arange(33)[:, None] % 3 == 0, 0.0, 1.0),
        torch.full((1, 1), 2.0**100),
    ],
    ids=["rows", "columns", "zeros", "large"],
)
def test_narrow_numbers_of_any_size(rows: Tensor, path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to what the same passes make of x itself, error for error."""
    cases = passes_of(vector_routing, SMALL, device=DEVICE, rows=rows)
    found, plain = narrowed(cases, monkeypatch), narrowed(cases, monkeypatch, False)
    for made, other, case in zip(found, plain, cases, strict=True):
        exact = answer(case, torch.float64)
        for name in made:
            size = (case.step.x.abs().amax(1)[:, None] if name == "M" else 1.0) + torch.zeros_like(made[name])
            assert ((made[name] - exact[name]).abs() <= (other[name] - exact[name]).abs() + 0.02 * size).all(), name
            assert torch.isfinite(made[name]).all()


def test_narrow_keeps_what_is_no_number_in_its_sample(path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an infinite number leaves the others of its row as they are."""
    cases = passes_of(vector_routing, SMALL, device=DEVICE)
    bad = cases[0].step.x.clone()
    bad[0, 3, 7], bad[0, 3, 8] = float("nan"), float("inf")
    made = [case._replace(step=case.step._replace(x=bad)) for case in cases]
    for found, other in zip(narrowed(made, monkeypatch), narrowed(cases, monkeypatch), strict=True):
        for name in found:
            assert torch.equal(found[name][1], other[name][1])
    x = (kept := narrow_of(made[0])).x.float() * kept.power[..., None]
    torch.testing.assert_close(x, bad, rtol=2**-11, atol=1e-9, equal_nan=True)


def narrow_of(case: Problem) -> Any:
    passes = Passes(1)
    vector_routing.forward(case.step._replace(passes=passes))
    return passes.kept


def test_narrow_is_for_tf32_and_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else makes a copy."""
    monkeypatch.setattr(vector_routing, "force_narrow", True)
    for kind, precision, dtype, to_come in (
        ("first-made", "ieee", torch.float32, 1),
        ("first-made", "tf32", torch.float32, 0),
        ("first-made", "bf16", torch.float32, 1),
        ("first-made", "tf32", torch.bfloat16, 1),
        ("first-linear-made", "tf32", torch.float32, 1),
        ("first", "tf32", torch.float32, 1),
        ("next", "tf32", torch.float32, 1),
    ):
        passes = Passes(to_come)
        vector_routing.forward(make(precision=precision, dtype=dtype, **KINDS[kind]).step._replace(passes=passes))
        assert passes.kept is None, (kind, precision, dtype, to_come)


def test_a_layer_reads_x_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All iterations of one call share the copy; the next call makes its own. Its gradient stays as it is."""
    layer = EfficientVectorRouting(40, 6, 24, 8, n_iters=3, device=DEVICE)
    x = torch.randn(2, 40, 24, device=DEVICE)
    monkeypatch.setattr(import_module("fastroute.ops.efficient_routing.passes"), "precision_of", lambda *_: "tf32")
    readers: list[str] = []
    real = launch.launch

    def spy(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        whole = any(isinstance(a, Tensor) and a.dtype == torch.float32 and a.shape == x.shape for a in args)
        readers.extend([kernel.fn.__name__] * whole)
        real(kernel, grid, *args, **constants)

    monkeypatch.setattr(launch, "launch", spy)
    found = []
    for force in (None, True):
        monkeypatch.setattr(vector_routing, "force_narrow", force)
        for scale in (1.0, 3.0):
            readers.clear()
            with use_backend("triton"), torch.no_grad():
                found.append(layer(x * scale))
        assert readers.count("forward_kernel") >= 1 and (len(readers) == 1) == (force is True), readers
    exact = copy.deepcopy(layer).double()
    for i, scale in enumerate((1.0, 3.0)):

        def truth(scale: float = scale) -> dict[str, Tensor]:
            return {"y": exact(x.double() * scale).detach()}

        yardstick = Yardstick(truth, torch.float32, operands="tf32")
        for y in found[i::2]:
            yardstick.check({"y": y})


PASSES = {
    "two": (["next", "first-made"], {}),
    "three": (["next", "next", "first"], {"lengths": [33, 17]}),
    "linear": (["next-linear", "first-linear-made"], {}),
    "half": (["next", "first-made"], {"dtype": torch.bfloat16}),
    "masked": (["next", "first-made"], {"mask": MASKS["own"]}),
}


@in_pairs(passes=PASSES.keys(), fresh=[True, False], chunked=[False, True])
def test_dx_is_left_to_the_last_pass(passes: str, fresh: bool, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations of one backward, last first, in the same buffers: dx is the sum of their parts, written once."""
    kinds, options = PASSES[passes]
    if chunked:
        real = vector_routing.plan
        monkeypatch.setattr(
            vector_routing, "plan", lambda *a, **k: real(*a, **{**k, "sms": 2})._replace(batch=1, rows=16)
        )
    cases = [make(**KINDS[kind], **options, seed=t) for t, kind in enumerate(kinds)]
    x = cases[0].step.x
    cases = [case._replace(step=case.step._replace(x=x)) for case in cases]
    start = None if fresh else 2.0
    found: dict[bool, dict[str, Tensor]] = {}
    for left in (True, False):
        monkeypatch.setattr(vector_routing, "force_left", left)
        grads = empty_grads(cases[0].step, start=start)
        found[left] = {}
        for t, case in enumerate(cases):
            gate = vector_routing.forward(case.step)[2]
            for name in PARAMETERS:
                if (own := getattr(empty_grads(case.step), name)) is not None and getattr(grads, name) is None:
                    setattr(grads, name, own)
            grads.fresh, grads.to_come = fresh and t == 0, len(cases) - 1 - t
            before = grads.x.clone()
            dpred = vector_routing.backward(case.step._replace(gate=gate), case.dM, case.dp, grads)
            untouched = torch.equal(grads.x.nan_to_num(), before.nan_to_num())
            assert untouched == (left and grads.to_come > 0)
            found[left] |= {} if dpred is None else {f"dpred{t}": dpred.clone()}
        found[left] |= {"dx": grads.x, "dgate": grads.gate}
    for name in found[False]:
        if name != "dx":
            assert torch.equal(found[True][name], found[False][name]), name

    def exact() -> dict[str, Tensor]:
        parts = [answer(case, torch.float64) for case in cases]
        dx = sum(part["dx"] for part in parts) + (start or 0.0)
        if (last := cases[-1].step).gate_weight is not None:  # gates get a gradient from every iteration
            dgate = sum(part["dgate"] for part in parts[:-1]) + (start or 0.0)
            x64 = x.double().requires_grad_()
            live = 1.0 if last.lengths is None else row_is_live(x, last.lengths)
            gate = gates(x64, last.gate_weight.double(), last.gate_bias.double(), last.scale.double()).sigmoid()
            dx = dx + torch.autograd.grad(((gate * live) * dgate).sum(), x64)[0]
        return {"dx": dx}  # type: ignore[dict-item]

    yardstick = Yardstick(exact, x.dtype, stored=x.dtype if x.dtype.itemsize == 2 else None)
    yardstick.check({"dx": found[True]["dx"]})


def test_dx_is_left_where_little_is_kept() -> None:
    """The headline keeps 0.9 GB of coefficients instead of reading and writing 4.1 GB of dx."""
    assert leaves(1_000_000, 100, 1024, 2, 1, torch.float32, "tf32")
    assert leaves(1_000_000, 100, 1024, 2, 1, torch.bfloat16)
    assert not leaves(1_000_000, 100, 1024, 4, 1, torch.float32, "tf32")
    assert not leaves(2000, 1000, 2048, 2, 1, torch.bfloat16)
    assert not leaves(20, 10, 1024, 2, 1, torch.float32)  # the operands, kept for a few rows


def test_agrees_with_the_tiled_twin(path: bool) -> None:
    """The plain twin has the same formulas, so it is within the same budget of the same numbers."""
    for first, linear in itertools.product((True, False), (True, False)):
        case = make(first=first, made=first, linear=linear)
        found, expected = run(vector_routing, case), run(tiles, case)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
            torch.testing.assert_close(found[name], value)


def test_unsupported() -> None:
    size = {"B": 1, "n": 4, "m": 3, "d": 2}
    assert vector_routing.unsupported(DEVICE, torch.float32, **size) is None
    assert "float64" in str(vector_routing.unsupported(DEVICE, torch.float64, **size))
    assert "16384" in str(vector_routing.unsupported(DEVICE, torch.float32, **{**size, "m": 20000}))
    assert "CUDA" in str(vector_routing.unsupported("xpu", torch.float32, **size))
