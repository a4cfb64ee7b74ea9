"""The Triton kernels of ``dispatch`` and ``grouped_linear``: compiled on a GPU, else in Triton's interpreter.

Axes: B samples, N (n) entries, K modules, F (f) features in, O (o) features out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fastroute
from fastroute import use_backend
from fastroute.functional import grouped_linear
from fastroute.kernels import dispatch as plans
from fastroute.kernels.grouped_linear import launch as products
from fastroute.kernels.grouped_linear import parameters as grouped_linear_parameters
from fastroute.kernels.grouped_linear import plan as grouped_linear_plan
from fastroute.ops import activations, dispatch
from fastroute.ops.dispatch import reference as reference_dispatch
from fastroute.ops.grouped_linear import reference as reference
from tests.helpers import seeds
from tests.helpers.budget import check
from tests.helpers.cases import Case, Results, evaluate
from tests.helpers.dispatch_cases import HISTOGRAMS, actions_of, each_histogram
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import check_compiled, opcheck
from tests.ops.dispatch.test_op import defined
from tests.ops.grouped_linear.test_op import linear_case, op, truth

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SOME = HISTOGRAMS["some empty"]


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as on a machine of many multiprocessors: small ones."""
    monkeypatch.setattr(products, "multiprocessors", lambda device: 132)


def there(fn: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """On the device of these tests, results back here."""

    def call(**given: Tensor) -> dict[str, Tensor]:
        return {k: t.cpu() for k, t in fn(**{k: t.to(DEVICE) for k, t in given.items()}).items()}

    return call


def checked(cases: Case | list[Case], dtype: torch.dtype = F32, **options: Any) -> Results:
    of = truth(options.get("activation", "none"))
    stored = dtype if dtype.itemsize == 2 else None  # what an activation was applied to is kept for its slope
    return check(there(op("triton", **options)), of, cases, dtype=dtype, stored=stored)


# ---------------------------------------------------------------------------------------------------------- plans

PATHS = {"ranked": {}, "counted": {"RANKED": 0, "BLOCK": 128}, "sorted": {"RANKED": 0, "COMPARED": 0}}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PATHS[request.param].items():
        monkeypatch.setattr(plans, name, value)


def assert_is_plan(actions: Tensor, K: int) -> None:
    made = torch.ops.fastroute._dispatch_plan_triton(actions.to(DEVICE), K)
    order, offsets, beyond = defined(actions, K)
    assert [t.tolist() for t in made] == [order, offsets, [beyond]]
    assert all(t.dtype == torch.int64 and t.is_contiguous() for t in made)


@pytest.mark.parametrize("K", [1, 64, 300])
@pytest.mark.parametrize("N", [0, 1, 130, 300])
def test_plans(N: int, K: int, path: None) -> None:
    assert_is_plan(torch.randint(-2, K + 2, (N,), generator=seeds.generator(N)), K)


@hypothesis.settings(max_examples=10, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_any_plan(data: st.DataObject, path: None) -> None:
    K = data.draw(st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 17])))
    span = data.draw(st.sampled_from([(0, K - 1), (-2, K + 2), (K - 1, K - 1), (-1, -1)]))
    assert_is_plan(torch.tensor(data.draw(st.lists(st.integers(*span), max_size=70)), dtype=torch.int64), K)


@pytest.mark.parametrize("extreme", [torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, 1 << 32])
def test_plans_of_extreme_and_strided_actions(extreme: int, path: None) -> None:
    actions = torch.tensor([1, extreme, 0])
    assert_is_plan(actions, 2)
    assert_is_plan(torch.stack([actions, torch.full_like(actions, 1)], 1)[:, 0], 2)
    assert_is_plan(torch.tensor([1]).expand(9), 2)


def test_plan_through_the_op() -> None:
    actions = actions_of(HISTOGRAMS["uneven"])
    with use_backend("triton"):
        made = dispatch.plan(actions.to(DEVICE), 5)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(made[:3], reference_dispatch.plan(actions, 5), strict=False))


# ------------------------------------------------------------------------------------------------------- products


@each_histogram
def test_linear(histogram: list[int]) -> None:
    found = checked(linear_case(histogram))
    y, dropped = found["y"], actions_of(histogram) < 0
    assert y is not None and y.is_contiguous()
    assert not y[dropped].any() and not found["dx"][dropped].any()  # type: ignore[index]


@pytest.mark.parametrize("histogram", ["some empty", "one each"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_half_precision(histogram: str, dtype: torch.dtype) -> None:
    found = checked([linear_case(HISTOGRAMS[histogram], dtype=dtype, seed=seed) for seed in range(2)], dtype)
    assert all(t is not None and t.dtype == dtype for t in found.values())


def test_small_tiles(many: None) -> None:
    checked(linear_case(HISTOGRAMS["uneven"], 33, 40), activation="relu")


@pytest.mark.parametrize("weights, biases", [(True, False), (False, True)], ids=["no-biases", "a-table"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_linear_without(weights: bool, biases: bool, dtype: torch.dtype) -> None:
    checked(linear_case(SOME, weights=weights, biases=biases, dtype=dtype), dtype)


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
@pytest.mark.parametrize("dtype, apart", [(F32, False), (BF16, True)], ids=["on-load", "bf16-apart"])
def test_activations(activation: str, dtype: torch.dtype, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if apart:
        monkeypatch.setattr(grouped_linear_plan, "SLOPES", 0)
    cases = [linear_case(SOME, 5, 20, dtype=dtype, seed=seed) for seed in range(3)]
    y = checked(cases, dtype, activation=activation)["y"]
    assert y is not None and not y[actions_of(SOME) < 0].any()  # nor a sigmoid's half


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_activations_of_any_number(activation: str) -> None:
    """From the smallest to the largest, infinite ones and NaN: nothing is worse than PyTorch's by more than roundings.

    Four of them for the value (exponential, sum, quotient, product), twice as many for the slope; below the smallest
    normal number none counts.
    """
    sizes = [0.0, 1e-42, 1e-30, 1e-7, 1e-3, 0.3, 0.62, 0.63, 1.0, 5.0, 10.0, 20.0, 87.0, 88.0, 100.0, 1e6, 3e38]
    x = torch.tensor([*sizes, *(-v for v in sizes), torch.inf, -torch.inf, torch.nan])[:, None]
    leaf = x.to(DEVICE).requires_grad_()
    with use_backend("triton"):
        plan = dispatch.plan(torch.zeros(len(x), dtype=torch.int64, device=DEVICE), 1)
        y = grouped_linear(leaf, plan, [torch.ones(1, 1, device=DEVICE)], activation=activation)
        (dx,) = torch.autograd.grad(y.sum(), leaf)
    exact = x.double().requires_grad_()
    expected = activations.ACTIVATIONS[activation](exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    plain = x.clone().requires_grad_()
    (plain_slope,) = torch.autograd.grad((plain_y := activations.ACTIVATIONS[activation](plain)).sum(), plain)
    eps, tiny = torch.finfo(F32).eps, torch.finfo(F32).tiny
    for got, wanted, usual, roundings in ((y, expected, plain_y, 4), (dx, slope, plain_slope, 8)):
        got, wanted, usual = got.detach().cpu().double(), wanted.detach(), usual.detach().double()
        assert got[-1].isnan() == usual[-1].isnan()
        whole = wanted.float().isfinite() & usual.isfinite()  # where PyTorch itself gives up, anything is as good
        error = (got - wanted).abs()[whole]
        budget = 2 * (usual - wanted).abs()[whole] + roundings / 2 * eps * wanted.abs()[whole]
        if got is not dx and roundings == 4:
            assert (error <= budget + tiny * x.double().abs().clamp(min=1)[whole]).all()
        else:  # told from a rounded value, which another rounding may serve better at one number
            assert error.max() <= budget.max()


@pytest.mark.parametrize("weights, biases", [(True, True), (True, False), (False, True)], ids=str)
def test_stacked(weights: bool, biases: bool) -> None:
    """All modules' parameters in one tensor give the bits that separate ones do, read through a table of addresses."""
    case = linear_case(SOME, weights=weights, biases=biases)
    apart, together = (evaluate(there(op("triton", stacked=stacked)), case) for stacked in (False, True))
    for name, t in apart.items():
        got = together[name]
        assert t is not None and got is not None and torch.equal(t, got), name


@pytest.mark.parametrize("layout", [LAYOUTS[k] for k in ("sliced_rows", "columns_first", "strided")])
@pytest.mark.parametrize("of", ["x", "weights", "biases", "cotangent", "one weight"])
def test_layouts(layout: Callable[[Tensor], Tensor], of: str) -> None:
    """Wherever the numbers lie, they are the same bits."""
    case = linear_case(SOME)
    given = {k: t.to(DEVICE) for k, t in case.inputs.items() if t is not None}
    case = Case(dict(given), {"y": case.cotangents["y"].to(DEVICE)}, case.axes, case.wrt)
    expected = evaluate(op("triton"), case)
    moved = {
        k: layout(t.cpu()).to(DEVICE) if DEVICE == "cpu" else t
        for k, t in given.items()
        if (k == "W1" if of == "one weight" else of[0] == k[0].lower()) and k != "actions"
    }
    if of == "cotangent":
        case = Case(case.inputs, {"y": layout(case.cotangents["y"].cpu()).to(DEVICE)}, case.axes, case.wrt)
    found = evaluate(op("triton"), case.with_inputs(**moved))
    for name, t in expected.items():
        got = found[name]
        assert t is not None and got is not None and torch.equal(got, t), name


@pytest.mark.parametrize("k", [3])
@pytest.mark.parametrize("is_sorted, keep_sorted", [(False, False), (False, True), (True, False), (True, True)])
def test_several_modules_a_sample(k: int, is_sorted: bool, keep_sorted: bool) -> None:
    """Every entry reads its sample; what comes back to a sample is the sum over its entries."""
    generator = seeds.generator(k)
    case = linear_case(SOME)
    actions = torch.randint(-1, 5, (13, k), generator=generator)
    actions[0] = actions[0, 0]
    actions[1] = -1
    several = Case(
        {**case.inputs, "actions": actions, "x": torch.randn(13, 12, generator=generator)},
        {"y": torch.randn(13 * k, 9, generator=generator)}, {**case.axes, "actions": "bk", "x": "bf"}, case.wrt,
    )  # fmt: skip
    options = {"is_sorted": is_sorted, "keep_sorted": keep_sorted, "activation": "tanh"}
    check(there(op("triton", **options)), truth("tanh"), several, dtype=F32)


@pytest.mark.parametrize("F, O", [(0, 3), (1, 1), (1, 17), (33, 1), (64, 48), (7, 130)])
def test_widths(F: int, O: int) -> None:
    checked([linear_case(SOME, F, O, seed=seed) for seed in range(2)])


@pytest.mark.parametrize("K", [1, 50])
def test_numbers_of_modules(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, and many more than rows; offsets are looked at in several goes."""
    monkeypatch.setattr(grouped_linear_plan, "SEARCH", 16)
    histogram = [0] * K + [2]
    for k in (0, K // 2, K - 1):
        histogram[k] += 3
    checked(linear_case(histogram, 4, 3))


@pytest.mark.parametrize("histogram, biases", [("uneven", True), ("uneven", False), ("no rows", True)])
def test_sums_in_pieces(histogram: str, biases: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of many rows are summed in pieces, which are added up in their order."""
    real = grouped_linear_plan.sums_tile

    def in_pieces(N: int, K: int, *sizes: Any) -> Any:
        return real(N, K, *sizes)._replace(piece=16, pieces=N // 16 + K)

    monkeypatch.setattr(products, "sums_tile", in_pieces)
    checked(linear_case(HISTOGRAMS[histogram], biases=biases))


@pytest.mark.parametrize("biases", [True, False])
def test_gradients_in_one_launch(biases: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of two launches."""
    case, made = linear_case(HISTOGRAMS["uneven"], 20, 33, biases=biases), []
    for answer in (True, False):
        monkeypatch.setattr(products, "together", lambda *of, answer=answer: answer)
        made.append(evaluate(there(op("triton", activation="relu")), case))
    assert all(t is not None and torch.equal(t, made[1][name]) for name, t in made[0].items())  # type: ignore[arg-type]


def test_wanted_alone() -> None:
    """Each gradient alone is that of all together."""
    case = linear_case(SOME)
    whole = evaluate(there(op("triton")), case)
    for wrt in (("x",), ("W1",), ("b4",), ("x", "b1"), ("x", "W2")):
        for name, t in evaluate(there(op("triton")), Case(case.inputs, case.cotangents, case.axes, wrt)).items():
            expected = whole[name]
            assert t is not None and expected is not None and torch.equal(t, expected)


@hypothesis.settings(max_examples=8)
@hypothesis.given(data=st.data())
def test_any_histogram(data: st.DataObject) -> None:
    counts = st.one_of(st.just(0), st.integers(0, 5), st.sampled_from([16, 33, 64]))
    histogram = data.draw(st.lists(counts, min_size=2, max_size=8))
    widths = st.sampled_from([1, 2, 15, 16, 17, 33])
    case = linear_case(histogram, data.draw(widths), data.draw(widths), weights=data.draw(st.booleans()), dtype=F32)
    found, exact = evaluate(there(op("triton")), case), evaluate(truth(), case.to(torch.float64))
    sizes = {k: t if k == "actions" else t.abs() for k, t in case.inputs.items() if t is not None}
    whole = Case(sizes, {"y": case.cotangents["y"].abs()}, case.axes, case.wrt)
    bound = evaluate(truth(), whole.to(torch.float64))
    for name, t in exact.items():
        got = found[name]
        if t is None or got is None:  # an empty sum has no graph in the definition
            assert got is None or not got.any(), name
        else:  # any order of n terms is within n eps of the sum of their sizes
            terms = max(len(case.inputs["actions"]), 34)  # type: ignore[arg-type]
            assert ((got.double() - t).abs() <= terms * torch.finfo(F32).eps * bound[name].abs()).all(), name  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------ promises


def test_nan_stays_in_its_sample() -> None:
    case = linear_case(SOME)
    expected = evaluate(there(op("triton")), case)
    x = case.inputs["x"].clone()  # type: ignore[union-attr]
    actions = actions_of(SOME)
    row = int((actions == 4).nonzero()[0])
    x[row] = torch.nan
    found = evaluate(there(op("triton")), case.with_inputs(x=x))
    others = torch.arange(len(x)) != row
    for name in ("y", "dx"):
        assert torch.equal(found[name][others], expected[name][others])  # type: ignore[index]
    assert found["y"][row].isnan().all() and found["dW4"].isnan().all()  # type: ignore[index,union-attr]
    assert all(torch.equal(found[f"dW{k}"], expected[f"dW{k}"]) for k in range(4))  # type: ignore[arg-type]
    dropped = case.inputs["x"].clone()  # type: ignore[union-attr]
    dropped[actions < 0] = torch.nan  # a dropped sample's numbers matter to nobody
    found = evaluate(there(op("triton")), case.with_inputs(x=dropped))
    assert all(torch.equal(found[name], t) for name, t in expected.items() if t is not None)  # type: ignore[arg-type]


def test_same_input_same_bits() -> None:
    case = linear_case(SOME, 33, 40)
    once, again = (evaluate(there(op("triton", activation="silu")), case) for _ in range(2))
    assert all(t is not None and torch.equal(t, again[name]) for name, t in once.items())  # type: ignore[arg-type]


def test_separate_gradients_are_views_of_one_tensor() -> None:
    case = linear_case(SOME)
    found = evaluate(op("triton"), Case(
        {k: t.to(DEVICE) for k, t in case.inputs.items() if t is not None},
        {"y": case.cotangents["y"].to(DEVICE)}, case.axes, case.wrt,
    ))  # fmt: skip
    assert len({t.untyped_storage().data_ptr() for k, t in found.items() if t is not None and k[:2] == "dW"}) == 1


def test_a_table_is_allocated_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """cudagraph trees put what the calling thread allocates into the graph's pool, where a table may not stay."""
    allocated: list[int] = []

    def copied(device: torch.device, addresses: tuple[int, ...]) -> torch.Tensor:
        allocated.append(threading.get_ident())
        return torch.tensor(addresses)

    monkeypatch.setattr(grouped_linear_parameters, "_copied", copied)
    assert grouped_linear_parameters._made(torch.device("cuda", 0), (16, 32)).addresses.tolist() == [16, 32]
    assert allocated and allocated[0] != threading.get_ident()


def test_tables_are_kept_by_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same parameters, the same table; not too many are kept; who changes in place is read anew."""
    monkeypatch.setattr(grouped_linear_parameters, "KEPT", 3)
    grouped_linear_parameters.forget()
    weights = [torch.randn(4, 3, device=DEVICE) for _ in range(5)]
    first = grouped_linear_parameters.gathered(weights[:2], 2, (4, 3), False)
    assert first.pointers and first.tensor.tolist() == [w.data_ptr() for w in weights[:2]]
    assert grouped_linear_parameters.gathered(weights[:2], 2, (4, 3), False).tensor is first.tensor
    for k in range(2, 5):
        grouped_linear_parameters.gathered(weights[:k], k, (4, 3), False)
        grouped_linear_parameters.gathered(weights[k - 2 : k], 2, (4, 3), False)
    assert len(grouped_linear_parameters._tables) == 3
    x, actions = torch.randn(6, 3, device=DEVICE), torch.arange(6, device=DEVICE) % 5
    with use_backend("triton"):
        plan = dispatch.plan(actions, 5)
        before = grouped_linear(x, plan, weights)
        weights[2].zero_()
        after = grouped_linear(x, plan, weights)
    assert before[2].any() and not after[2].any() and torch.equal(before[:2], after[:2])


def test_parameters_that_are_not_alike() -> None:
    weights = [torch.randn(4, 3, device=DEVICE) for _ in range(3)]
    mixed = [weights[0], weights[1].mT.contiguous().mT, weights[2]]
    made = grouped_linear_parameters.gathered(mixed, 3, (4, 3), False)
    assert not made.pointers and torch.equal(made.tensor, torch.stack(weights))
    with pytest.raises(ValueError, match=r"^parameters: expected \[4, 3\] of every module, got \[4, 2\]"):
        grouped_linear_parameters.gathered([*weights, weights[0][:, :2]], 4, (4, 3), False)
    with pytest.raises(ValueError, match=r"^parameters: expected those of 4 modules, got 3"):
        grouped_linear_parameters.gathered(weights, 4, (4, 3), False)
    with pytest.raises(ValueError, match=r"^parameters: expected \[4, 4, 3\], got \[3, 4, 3\]"):
        grouped_linear_parameters.gathered([torch.stack(weights)], 4, (4, 3), True)
    with pytest.raises(ValueError, match=r"^parameters: expected every module's on .* in torch.float32"):
        grouped_linear_parameters.gathered([*weights, weights[0].double()], 4, (4, 3), False)


# ------------------------------------------------------------------------------------------- what PyTorch expects


def test_opcheck() -> None:
    case = linear_case([2, 0, 3, 1], 4, 3)
    x = case.inputs["x"].to(DEVICE)  # type: ignore[union-attr]
    actions = case.inputs["actions"].to(DEVICE)  # type: ignore[union-attr]
    ops = torch.ops.fastroute
    opcheck(ops._dispatch_plan_triton.default, (actions, 3), grad=False)
    order, offsets, _ = ops._dispatch_plan_triton(actions, 3)
    for weights, biases, stacked in (
        (True, True, True),
        (True, True, False),
        (True, False, False),
        (False, True, False),
    ):
        W, b = torch.randn(3, 3, 4, device=DEVICE), torch.randn(3, 3, device=DEVICE)
        W_ = ([W] if stacked else [w.clone() for w in W]) if weights else []
        b_ = ([b] if stacked else [t.clone() if weights else t.clone()[None] for t in b]) if biases else []
        kind = 4 if weights else 0
        opcheck(ops._grouped_linear_triton.default, (x, order, order, offsets, W_, b_, kind, kind > 0), grad=False)
        grad = torch.randn(len(x), 3, device=DEVICE)
        kept = grad if kind else None
        given = grad, x, order, order, order, offsets, W_, 3, weights, weights, biases, kind, kept, stacked, True
        opcheck(ops._grouped_linear_triton_backward.default, given, grad=False)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 5) for _ in range(3))

    def forward(self, actions: Tensor, x: Tensor) -> Tensor:
        plan = dispatch.plan(actions, 3)
        weights, biases = [m.weight for m in self.linears], [m.bias for m in self.linears]
        return grouped_linear(x, plan, weights, biases, keep_empty=True, activation="silu")


def test_compile() -> None:
    layer = Layer().to(DEVICE)
    generator = seeds.generator(0)
    calls = [
        (torch.randint(-1, 3, (B,), generator=generator).to(DEVICE),
         torch.randn(B, 4, generator=generator).to(DEVICE).requires_grad_())
        for B in (16, 7, 33)
    ]  # fmt: skip
    with use_backend("triton"):
        check_compiled(layer, calls, parameters=list(layer.parameters()))


def test_explain() -> None:
    layer = Layer().to(DEVICE)
    with use_backend("triton"):
        made = fastroute.explain(
            layer, torch.zeros(6, dtype=torch.int64, device=DEVICE), torch.randn(6, 4, device=DEVICE)
        )
    assert [(d.case.op, d.backend) for d in made] == [("dispatch", "triton"), ("grouped_linear", "triton")]


def test_unsupported() -> None:
    assert products.unsupported(DEVICE, F32) is None and plans.unsupported(DEVICE, K=3, N=5) is None
    assert "float64" in str(products.unsupported(DEVICE, torch.float64))
    assert "32 bits" in str(products.unsupported(DEVICE, F32, N=2**31, K=2))
    assert "CUDA" in str(products.unsupported("xpu", F32)) and "CUDA" in str(plans.unsupported("xpu"))
