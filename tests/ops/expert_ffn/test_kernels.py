"""The Triton kernels of ``expert_ffn``'s hidden layer: compiled on a GPU, else in Triton's interpreter.

Axes: B samples, k experts that each takes, N entries, K experts, D features in, H hidden ones, P features out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import use_backend
from fastroute.kernels import expert_ffn as kernels
from fastroute.kernels import launch
from fastroute.kernels.grouped_linear import launch as grouped_linear
from fastroute.ops import dispatch
from fastroute.ops.activations import ACTIVATIONS
from tests.helpers import seeds
from tests.helpers.budget import check
from tests.helpers.cases import Case, Results, evaluate
from tests.helpers.covering import in_pairs
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import check_compiled, opcheck
from tests.ops.expert_ffn.test_op import ACTIONS, Layer, each_histogram, ffn_case, op, truth

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MIXED = ACTIONS["mixed"]
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])


def many(K: int, B: int = 90, k: int = 2) -> Tensor:
    """Tiles of several rows, and several tiles to an expert; a sixth of the entries is dropped."""
    generator = seeds.generator(K)
    actions = torch.randint(K, (B, k), generator=generator)
    return actions.masked_fill(torch.rand(B, k, generator=generator) < 1 / 6, -1)


def there(**options: Any) -> Callable[..., dict[str, Tensor]]:
    """The op on the device of these tests, results back here."""
    call = op("triton", **options)
    return lambda **given: {k: t.cpu() for k, t in call(*(_sent(t) for t in given.values())).items()}


def _sent(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(DEVICE)


def designs(case: Case, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Results, Results]:
    """Fused, and with PyTorch between the products."""
    found = []
    for fused in (True, False):
        monkeypatch.setattr(kernels, "force_fused", fused)
        found.append(evaluate(there(**options), case))
    return found[0], found[1]


def same(found: Results, expected: Results) -> None:
    assert found.keys() == expected.keys()
    for name, t in found.items():
        assert t is not None and torch.equal(t, expected[name]), name  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- numbers


@each_histogram
@each_dtype
def test_budget(actions: list[list[int]], dtype: torch.dtype) -> None:
    case = ffn_case(actions, dtype=dtype)
    found = check(there(), truth(), case, dtype=dtype, stored=dtype)
    dropped = case.inputs["actions"] < 0  # type: ignore[operator]
    assert all(t is not None and t.dtype == dtype for t in found.values())
    for name in ("y", "dx"):
        assert not found[name][dropped.all(1)].any()  # type: ignore[index]
    assert not found["dweights"][dropped].any()  # type: ignore[index]


@in_pairs(dtype={"bf16": BF16, "fp32": F32}, gated={"gated": True, "plain": False}, activation=reversed(ACTIVATIONS))
def test_both_designs(activation: str, gated: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"activation": activation, "gated": gated}
    case = ffn_case(MIXED, 20, 17, 8, gated=gated, dtype=dtype)
    fused, apart = designs(case, monkeypatch, **options)
    monkeypatch.setattr(kernels, "force_fused", None)
    found = check(there(**options), truth(activation, gated), case, dtype=dtype, stored=dtype, also=[fused, apart])
    same(found, fused)  # which is what is chosen


@in_pairs(size=[(1, 1, 1), (5, 1, 3), (37, 33, 20), (64, 16, 48)], k=[1, 3], gated={"gated": True, "plain": False})
def test_sizes(size: tuple[int, int, int], k: int, gated: bool) -> None:
    case = ffn_case(many(5, k=k), *size, gated=gated)
    check(there(gated=gated), truth(gated=gated), case, dtype=F32, stored=F32)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_small_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of many multiprocessors: several tiles of rows and of columns, several steps in depth."""
    monkeypatch.setattr(grouped_linear, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(kernels, "BLOCK", 256)
    check(there(), truth(), ffn_case(many(3), 70, 40, 24, K=3, dtype=dtype), dtype=dtype, stored=dtype)


def test_wide_hidden_layer() -> None:
    """More of it than a program of the backward pass looks at together."""
    check(there(), truth(), ffn_case(MIXED, 6, 300, 4), dtype=F32, stored=F32)


def test_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ffn_case(ACTIONS["four"], weights=False)
    check(there(), truth(), case, dtype=F32, stored=F32, also=designs(case, monkeypatch))


@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=["fp32", "fp64", "fp16"])
def test_weights_of_another_dtype(dtype: torch.dtype) -> None:
    """The same numbers, and their gradient in their dtype."""
    case = ffn_case(MIXED, dtype=BF16)
    weights = case.inputs["weights"].to(F16)  # type: ignore[union-attr]
    expected = evaluate(there(), case.with_inputs(weights=weights.float()))
    found = evaluate(there(), case.with_inputs(weights=weights.to(dtype)))
    assert found["dweights"].dtype == dtype  # type: ignore[union-attr]
    same(found, expected | {"dweights": expected["dweights"].to(dtype)})  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("of", ["x", "weights", "w_in", "w_out", "cotangent"])
def test_layouts(layout: Callable[[Tensor], Tensor], of: str) -> None:
    case = ffn_case(MIXED)
    if of == "cotangent":
        moved = Case(case.inputs, {"y": layout(case.cotangents["y"])}, case.axes, case.wrt)
    else:
        moved = case.with_inputs(**{of: layout(case.inputs[of])})  # type: ignore[arg-type]
    same(evaluate(there(), moved), evaluate(there(), case))


@pytest.mark.parametrize("wrt", [("x",), ("weights",), ("w_in",), ("w_out",), ("weights", "w_out")], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_only_what_is_wanted(wrt: tuple[str, ...], gated: bool) -> None:
    case = ffn_case(MIXED, gated=gated)
    whole = evaluate(there(gated=gated), case)
    found = evaluate(there(gated=gated), Case(case.inputs, case.cotangents, case.axes, wrt))
    same(found, {name: whole[name] for name in found})


# -------------------------------------------------------------------------------------------------------- promises


def test_the_same_bits_again() -> None:
    case = ffn_case(many(5))
    same(evaluate(there(), case), evaluate(there(), case))


@pytest.mark.parametrize("what", ["weights", "x"])
def test_what_is_dropped_may_be_anything(what: str) -> None:
    case = ffn_case(MIXED)
    dropped = case.inputs["actions"] < 0  # type: ignore[operator]
    gone = dropped if what == "weights" else dropped.all(1)[:, None]
    moved = case.with_inputs(**{what: case.inputs[what].masked_fill(gone, torch.nan)})  # type: ignore[union-attr]
    same(evaluate(there(), moved), evaluate(there(), case))


@pytest.mark.parametrize("what", ["x", "weights", "cotangent"])
def test_not_a_number_stays_in_its_sample(what: str) -> None:
    case = ffn_case(MIXED)
    bad = torch.arange(7) == 1  # takes experts 3 and 1
    if what == "cotangent":
        moved = Case(case.inputs, {"y": case.cotangents["y"].masked_fill(bad[:, None], torch.nan)}, case.axes, case.wrt)
    else:
        moved = case.with_inputs(**{what: case.inputs[what].masked_fill(bad[:, None], torch.nan)})  # type: ignore[union-attr]
    expected, found = evaluate(there(), case), evaluate(there(), moved)
    assert found["dx"][bad].isnan().all()  # type: ignore[index, union-attr]
    for name, rows in (("y", ~bad), ("dx", ~bad), ("dweights", ~bad), ("dw_in", [0, 2, 4]), ("dw_out", [0, 2, 4])):
        assert torch.equal(found[name][rows], expected[name][rows]), name  # type: ignore[index]


def test_which_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward: the hidden layer, the second product. Backward: the hidden layer, then four products."""
    started: list[str] = []
    start = launch.launch

    def note(kernel: Any, *args: Any, **options: Any) -> None:
        started.append(kernel.fn.__name__)
        start(kernel, *args, **options)

    monkeypatch.setattr(launch, "launch", note)
    monkeypatch.setattr(grouped_linear, "together", lambda *of: False)
    designs(ffn_case(MIXED), monkeypatch)
    _, fused, apart = (part.strip() for part in " ".join(started).split("rank_kernel"))
    backward = "hidden_kernel rows_kernel sums_kernel backward_kernel rows_kernel sums_kernel"
    assert fused == f"hidden_kernel rows_kernel {backward}"
    assert apart == "rows_kernel rows_kernel rows_kernel" + " rows_kernel sums_kernel" * 2


# ----------------------------------------------------------------------------------------------- what PyTorch expects


def test_opcheck() -> None:
    for weighted in (True, False):
        case = ffn_case(MIXED, 4, 3, 2, weights=weighted)
        a, x, w, w_in, w_out = map(_sent, case.inputs.values())
        with use_backend("triton"):
            plan = dispatch.plan(a, 5)  # type: ignore[arg-type]
        given = x, plan.order, plan.offsets, w, w_in, w_out, 2, "silu", True, "triton"
        opcheck(torch.ops.fastroute.expert_ffn.default, given)
        for wants in ((True, weighted, True, True), (False, weighted, False, False), (False, False, False, True)):
            dy = case.cotangents["y"].to(DEVICE)
            opcheck(torch.ops.fastroute.expert_ffn_backward.default, (*given, dy, *wants), grad=False)


def test_compile() -> None:
    layer, generator = Layer().to(DEVICE), seeds.generator(0)
    calls = [(torch.randn(B, 4, generator=generator).to(DEVICE).requires_grad_(),) for B in (16, 7, 33)]
    with use_backend("triton"):
        check_compiled(layer, calls, parameters=list(layer.parameters()))


def test_autocast() -> None:
    """In bfloat16, the weights as they are; gradients in the parameters' dtype."""
    case = ffn_case(MIXED)
    half = {k: v if v is None or k in ("actions", "weights") else v.to(BF16) for k, v in case.inputs.items()}
    expected = evaluate(there(), Case(half, case.cotangents, case.axes, case.wrt))
    with torch.autocast(DEVICE, dtype=BF16):
        found = evaluate(there(), case)
    for name, t in found.items():
        assert t is not None and t.dtype == (BF16 if name == "y" else F32)
        assert torch.equal(t.to(BF16), expected[name].to(BF16)), name  # type: ignore[union-attr]
