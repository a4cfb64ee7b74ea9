"""``dispatch`` on every backend: the plan against its definition, and linear modules over it in float64 and on budget.

Axes: B samples, N (n) rows, K modules, F (f) features in, O (o) features out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fastroute
from fastroute import use_backend
from fastroute.ops import dispatch
from fastroute.reference import dispatch as reference
from tests.helpers import strategies
from tests.helpers.backends import HERE, each_backend
from tests.helpers.budget import check
from tests.helpers.cases import Case, Results, evaluate
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_same, check_compiled, check_exported, gradcheck, opcheck

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
each_dtype = pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
needs_native = pytest.mark.skipif("native" not in HERE, reason="the C++ extension is not built")

#: Histograms of actions: samples per module, K = 5, then dropped ones.
HISTOGRAMS: dict[str, list[int]] = {
    "even": [8, 8, 8, 8, 8, 0],
    "one takes all": [0, 0, 40, 0, 0, 0],
    "some empty": [0, 17, 0, 1, 30, 4],
    "one each": [1, 1, 1, 1, 1, 1],
    "all dropped": [0, 0, 0, 0, 0, 9],
    "one row": [0, 0, 0, 1, 0, 0],
    "no rows": [0, 0, 0, 0, 0, 0],
    "uneven": [3, 65, 7, 129, 2, 13],
}
each_histogram = pytest.mark.parametrize(
    "histogram", HISTOGRAMS.values(), ids=[k.replace(" ", "-") for k in HISTOGRAMS]
)


def actions_of(histogram: list[int], seed: int = 0) -> Tensor:
    """In some order; the last count is of -1 and other negative ones."""
    K = len(histogram) - 1
    made = [k if k < K else -1 - i % 3 for k, count in enumerate(histogram) for i in range(count)]
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(made, dtype=torch.int64)[order]


def defined(actions: Tensor, K: int) -> tuple[list[int], list[int], int]:
    """The plan, from its definition."""
    found = [k if 0 <= k < K else K for k in actions.tolist()]
    order = sorted(range(len(found)), key=lambda b: (found[b], b))
    offsets = [sum(a < k for a in found) for k in range(K + 1)]
    return order, offsets, sum(a >= K for a in actions.tolist())


def raw_plan(backend: str, actions: Tensor, K: int) -> dispatch.Plan:
    """Without the check that raises for actions out of range."""
    if backend == "native":
        return dispatch.Plan(*torch.ops.fastroute._dispatch_plan_native(actions, K))
    return reference.plan(actions, K)


# ---------------------------------------------------------------------------------------------------------- plans


@each_backend
@hypothesis.given(data=st.data())
def test_plans(backend: str, data: st.DataObject) -> None:
    K = data.draw(st.one_of(st.integers(1, 6), st.sampled_from([63, 64, 65, 1000])))
    span = data.draw(st.sampled_from([(0, K - 1), (-2, K - 1), (-2, K + 2), (K - 1, K - 1), (-1, -1)]))
    actions = torch.tensor(data.draw(st.lists(st.integers(*span), max_size=70)), dtype=torch.int64)
    made = raw_plan(backend, actions, K)
    order, offsets, beyond = defined(actions, K)
    assert made.order.tolist() == order and made.offsets.tolist() == offsets and made.beyond.tolist() == [beyond]
    assert all(t.dtype == torch.int64 and t.is_contiguous() for t in made[:3])
    with use_backend(backend):
        if beyond:
            with pytest.raises(IndexError, match=rf"^agents: .*below {K}, got {beyond} of {len(actions)} out of range"):
                dispatch.plan(actions, K, "agents")
        else:
            planned = dispatch.plan(actions, K)
            assert all(map(torch.equal, planned[:3], made[:3])) and planned.bounds == offsets


@each_backend
@pytest.mark.parametrize("extreme", [torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max])
def test_plans_of_extreme_actions(backend: str, extreme: int) -> None:
    actions = torch.tensor([1, extreme, 0])
    made = raw_plan(backend, actions, 2)
    assert made.order.tolist() == [2, 0, 1] and made.offsets.tolist() == [0, 1, 2] and int(made.beyond) == (extreme > 0)


@each_backend
def test_plans_of_strided_actions(backend: str) -> None:
    actions = actions_of(HISTOGRAMS["uneven"])
    apart = torch.stack([actions, torch.full_like(actions, 3)], 1)[:, 0]
    with use_backend(backend):
        assert all(map(torch.equal, dispatch.plan(apart, 5)[:3], dispatch.plan(actions, 5)[:3]))


def test_actions_as_users_give_them() -> None:
    for given in (torch.tensor([[1], [0]]), torch.tensor([1, 0], dtype=torch.int32), torch.tensor([1, 0]).byte()):
        made = dispatch.as_actions(given, 2, torch.device("cpu"))
        assert made.dtype == torch.int64 and made.tolist() == [1, 0]
    for given, error in (
        (torch.tensor([1.0, 0.0]), TypeError),
        (torch.tensor([True, False]), TypeError),
        ([1, 0], TypeError),
        (torch.tensor([1, 0, 1]), ValueError),
        (torch.tensor([[1, 0], [0, 1]]), ValueError),
    ):
        with pytest.raises(error, match=r"^agents: "):
            dispatch.as_actions(given, 2, torch.device("cpu"), "agents")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- linear modules


def linear_case(
    histogram: list[int], F: int = 12, O: int = 9, *, weights: bool = True, biases: bool = True,
    dtype: torch.dtype = F32, seed: int = 0,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

    K, actions = len(histogram) - 1, actions_of(histogram, seed)
    inputs: dict[str, Tensor | None] = {"actions": actions, "x": normal(len(actions), F)}
    if weights:
        inputs |= {f"W{k}": normal(O, F) for k in range(K)}
    if biases:
        inputs |= {f"b{k}": normal(O) if weights else normal(1, O) for k in range(K)}
    letters = {"W": "of", "b": "o" if weights else "1o"}
    axes = {"actions": "n", "x": "nf", "y": "no"} | {k: letters[k[0]] for k in inputs if k[0] in letters}
    wrt = tuple(k for k in inputs if k != "actions" and (k != "x" or weights))
    return Case(inputs, {"y": normal(len(actions), O)}, axes, wrt)


def parameters(given: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    return [given[k] for k in given if k[0] == "W"], [given[k] for k in given if k[0] == "b"]


def op(backend: str, **options: bool) -> Callable[..., dict[str, Tensor]]:
    def call(actions: Tensor, x: Tensor, **given: Tensor) -> dict[str, Tensor]:
        weights, biases = parameters(given)
        with use_backend(backend):
            plan = dispatch.plan(actions, len(weights or biases))
            if options.get("is_sorted"):
                x = x[plan.order]
            y = dispatch.grouped_linear(x, plan, weights, biases, **{"keep_empty": True, **options})
        if options.get("keep_sorted"):
            y = y[plan.order.argsort()]
        return {"y": y}

    return call


def truth(actions: Tensor, x: Tensor, **given: Tensor) -> dict[str, Tensor]:
    weights, biases = parameters(given)
    return {"y": reference.grouped_linear(x, actions, weights, biases)}


def checked(cases: Case | list[Case], backend: str, dtype: torch.dtype = F32, **options: bool) -> Results:
    return check(op(backend, **options), truth, cases, dtype=dtype, permute="nfo")


@each_backend
@each_histogram
@each_dtype
def test_linear(backend: str, histogram: list[int], dtype: torch.dtype) -> None:
    found = checked(linear_case(histogram, dtype=dtype), backend, dtype)
    y, actions = found["y"], actions_of(histogram)
    assert y is not None and y.dtype == dtype and y.is_contiguous()
    assert not y[actions < 0].any() and not found["dx"][actions < 0].any()  # type: ignore[index]


@each_backend
@pytest.mark.parametrize("weights, biases", [(True, False), (False, True)], ids=["no-biases", "a-table"])
@each_dtype
def test_linear_without(backend: str, weights: bool, biases: bool, dtype: torch.dtype) -> None:
    checked(linear_case(HISTOGRAMS["some empty"], weights=weights, biases=biases, dtype=dtype), backend, dtype)


@each_backend
@pytest.mark.parametrize("F, O", [(1, 1), (1, 17), (33, 1), (64, 48), (7, 130)])
def test_widths(backend: str, F: int, O: int) -> None:
    checked([linear_case(HISTOGRAMS["uneven"], F, O, seed=seed) for seed in range(4)], backend)


@each_backend
@pytest.mark.parametrize("is_sorted, keep_sorted", list(product([False, True], repeat=2)))
def test_orders(backend: str, is_sorted: bool, keep_sorted: bool) -> None:
    checked(linear_case(HISTOGRAMS["some empty"]), backend, is_sorted=is_sorted, keep_sorted=keep_sorted)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("of", ["x", "weights", "biases", "cotangent"])
def test_layouts(backend: str, layout: Callable[[Tensor], Tensor], of: str) -> None:
    """Wherever the numbers lie, they are the same bits: sums do not depend on strides."""
    case = linear_case(HISTOGRAMS["some empty"])
    expected = evaluate(op(backend), case)
    moved = {k: layout(t) for k, t in case.inputs.items() if t is not None and of[0] == k[0].lower() and k != "actions"}
    if of == "cotangent":
        case = Case(case.inputs, {"y": layout(case.cotangents["y"])}, case.axes, case.wrt)
    found = evaluate(op(backend), case.with_inputs(**moved))
    for name, t in expected.items():
        got = found[name]
        assert t is not None and got is not None
        # the library's matrix product may choose another order of summation for another stride
        assert float((got - t).abs().max()) <= 12 * torch.finfo(F32).eps * float(t.abs().max()), name


@each_backend
@each_histogram
def test_gradcheck(backend: str, histogram: list[int]) -> None:
    if sum(histogram):
        gradcheck(op(backend), linear_case([min(n, 3) for n in histogram], 3, 2))


@each_backend
@hypothesis.given(data=st.data())
def test_any_histogram(backend: str, data: st.DataObject) -> None:
    """In float64, against the definition."""
    counts = st.one_of(st.just(0), st.integers(0, 5), st.sampled_from([16, 33, 64]))
    histogram = data.draw(st.lists(counts, min_size=2, max_size=8))
    case = linear_case(
        histogram, data.draw(strategies.widths), data.draw(strategies.widths), weights=data.draw(st.booleans()),
        biases=True, dtype=F64, seed=data.draw(strategies.seeds),
    )  # fmt: skip
    options = {"is_sorted": data.draw(st.booleans()), "keep_sorted": data.draw(st.booleans())}
    found, exact = evaluate(op(backend, **options), case), evaluate(truth, case)
    for name, t in exact.items():
        got = found[name]
        if t is None or got is None:  # an empty sum has no graph in the definition
            assert got is None or not got.any(), name
        else:
            assert_same(got, t, name)


@each_backend
def test_modules_without_rows(backend: str) -> None:
    """Their gradients are None, or zeros on request."""
    case = linear_case(HISTOGRAMS["some empty"])
    for keep_empty in (False, True):
        found = evaluate(op(backend, keep_empty=keep_empty), case)
        for k, count in enumerate(HISTOGRAMS["some empty"][:-1]):
            for grad in (found[f"dW{k}"], found[f"db{k}"]):
                assert (grad is None) == (count == 0 and not keep_empty)
                assert grad is None or count or not grad.any()


@each_backend
def test_several_rows_a_sample(backend: str) -> None:
    """The plan of B samples, stretched to r rows of each."""
    actions, r = actions_of(HISTOGRAMS["some empty"]), 3
    case = linear_case(HISTOGRAMS["some empty"], dtype=F64)
    weights, biases = parameters(case.inputs)
    x = torch.randn(len(actions), r, 12, dtype=F64, generator=torch.Generator().manual_seed(1))
    with use_backend(backend):
        plan = dispatch.plan(actions, 5)
        rows = plan._replace(offsets=plan.offsets * r, bounds=[r * n for n in plan.bounds or ()])
        flat = x[plan.order].reshape(-1, 12)
        y = dispatch.grouped_linear(flat, rows, weights, biases, is_sorted=True, keep_sorted=True)
    expected = torch.stack([reference.grouped_linear(x[:, i], actions, weights, biases) for i in range(r)], 1)
    assert_same(y.reshape(len(actions), r, -1), expected[plan.order])


@each_backend
def test_only_what_is_wanted(backend: str) -> None:
    """Each gradient alone is that of all together."""
    case = linear_case(HISTOGRAMS["some empty"], dtype=F64)
    whole = evaluate(op(backend), case)
    for wrt in (("x",), ("W1",), ("b4",), ("x", "b1"), ("W0", "W4")):
        for name, t in evaluate(op(backend), Case(case.inputs, case.cotangents, case.axes, wrt)).items():
            expected = whole[name]
            assert t is not None and expected is not None and torch.equal(t, expected)


# ------------------------------------------------------------------------------------------- what PyTorch expects


def arguments(weights: bool = True, biases: bool = True, dtype: torch.dtype = F32) -> tuple[Any, ...]:
    case = linear_case([2, 0, 3, 1], 4, 3, weights=weights, biases=biases, dtype=dtype)
    plan = reference.plan(case.inputs["actions"], 3)  # type: ignore[arg-type]
    return case.inputs["x"], plan.order, plan.offsets, *parameters(case.inputs)


@needs_native
@pytest.mark.parametrize(
    "dtype, takes, puts", [(F32, True, True), (F32, False, False), (F64, True, False), (BF16, False, True)]
)
def test_opcheck(dtype: torch.dtype, takes: bool, puts: bool) -> None:
    for weights, biases in ((True, True), (True, False), (False, True)):
        x, order, offsets, W, b = arguments(weights, biases, dtype)
        take, put = order if takes else None, order if puts else None
        ops = torch.ops.fastroute
        opcheck(ops._grouped_linear_native.default, (x, take, put, offsets, W, b), grad=False)
        wanted = (weights, weights, biases)
        grad = torch.randn(len(x), 3).to(dtype)
        opcheck(ops._grouped_linear_native_backward.default, (grad, x, take, put, offsets, W, 3, *wanted), grad=False)


@needs_native
def test_opcheck_of_plans() -> None:
    for actions in (torch.tensor([2, -1, 0, 7]), torch.empty(0, dtype=torch.int64)):
        opcheck(torch.ops.fastroute._dispatch_plan_native.default, (actions, 3))


def _calls(sizes: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(-1, 3, (B,), generator=generator),
         torch.randn(B, 4, generator=generator, dtype=dtype).requires_grad_())
        for B in sizes
    ]  # fmt: skip


class Layer(nn.Module):
    """Three linear modules, chosen by the first feature."""

    def __init__(self, dtype: torch.dtype = F32) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 5, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.call((x[:, 0].abs() * 4).long() - 1, x)

    def call(self, actions: Tensor, x: Tensor) -> Tensor:
        plan = dispatch.plan(actions.clamp(max=2), 3)
        return dispatch.grouped_linear(
            x, plan, [m.weight for m in self.linears], [m.bias for m in self.linears], keep_empty=True
        )


@each_backend
def test_compile(backend: str) -> None:
    """Without looking at counts, in another order of sums: in float64."""
    layer = Layer(F64)
    with use_backend(backend):
        check_compiled(layer.call, _calls((16, 7, 33), F64), parameters=list(layer.parameters()), backend="eager")


@each_backend
def test_export(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    example, *others = [torch.randn(B, 4, generator=generator, dtype=F64) for B in (6, 2, 33)]

    class Rounded(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float()  # sums in another order agree once rounded

    with use_backend(backend):
        check_exported(Rounded(F64), example, others, {0: torch.export.Dim("batch", min=2, max=4096)})


@each_backend
def test_no_second_derivative(backend: str) -> None:
    x, order, offsets, W, b = arguments()
    x.requires_grad_()
    with use_backend(backend):
        y = dispatch.grouped_linear(x, dispatch.Plan(order, offsets, torch.zeros(1)), W, b)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@each_backend
def test_autocast(backend: str) -> None:
    case = linear_case(HISTOGRAMS["some empty"])
    with torch.autocast("cpu", dtype=BF16):
        found = evaluate(op(backend), case)
    half = evaluate(op(backend), case.to(BF16))
    assert found["y"] is not None and half["y"] is not None and found["y"].dtype == BF16
    assert torch.equal(found["y"], half["y"])
    assert found["dx"] is not None and found["dx"].dtype == F32
    with torch.autocast("cpu", dtype=BF16):  # float64 is left alone, as by PyTorch
        assert evaluate(op(backend), case.to(F64))["y"].dtype == F64  # type: ignore[union-attr]


def test_unlike_dtypes() -> None:
    x, order, offsets, W, b = arguments()
    with pytest.raises(TypeError, match=r"^x: expected the modules' dtype torch.float32, got torch.float64"):
        dispatch.grouped_linear(x.double(), dispatch.Plan(order, offsets, torch.zeros(1)), W, b)


@each_backend
def test_shapes_that_do_not_fit(backend: str) -> None:
    """Nothing is read past a row, a weight or a plan."""
    x, order, offsets, W, b = arguments()
    plan = dispatch.Plan(order, offsets, torch.zeros(1))
    with use_backend(backend):
        for wrong in (x[:, :3], torch.cat([x, x], 1), x[:, 0], x[:, :, None]):
            with pytest.raises(ValueError, match=r"^x: expected \[N, 4\], as the modules take, got \["):
                dispatch.grouped_linear(wrong, plan, W, b)
        for wrong in (x[:2], torch.cat([x, x])):
            with pytest.raises(ValueError, match=r"^x: expected the plan's 6 rows, got \["):
                dispatch.grouped_linear(wrong, plan, W, b)
        with pytest.raises(ValueError, match=r"^x: expected a tensor"):
            dispatch.grouped_linear(None, plan, W, b)
        for weights, biases in (([*W[:2], W[2][:, :3]], b), ([*W[:2], W[2][:2]], b), (W, [*b[:2], b[2][:2]])):
            with pytest.raises((ValueError, RuntimeError)):
                dispatch.grouped_linear(x, plan, weights, biases)


def test_explain() -> None:
    layer = Layer()
    for backend in HERE:
        with use_backend(backend):
            made = fastroute.explain(layer, torch.randn(6, 4))
        assert {d.backend for d in made} == {backend} and {d.case.op for d in made} == {"dispatch"}
        assert "K=3" in str(made) and "N=6" in str(made)
