"""``grouped_linear`` on every backend, in float64 and on budget.

Axes: B samples, k modules that each takes, N = B k (n) entries, K modules, F (f) features in, O (o) features out.
"""

from __future__ import annotations

import math
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
from fastroute.functional import grouped_linear
from fastroute.ops import activations, dispatch
from fastroute.ops.dispatch import reference as reference_dispatch
from fastroute.ops.grouped_linear import op as linear_op
from fastroute.ops.grouped_linear import reference as reference
from tests.helpers import seeds, strategies
from tests.helpers.backends import HERE, each_backend, needs_native
from tests.helpers.budget import check
from tests.helpers.cases import Case, Results, evaluate
from tests.helpers.dispatch_cases import HISTOGRAMS, actions_of, each_histogram
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_same, check_compiled, check_exported, gradcheck, opcheck

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
each_dtype = pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])


def linear_case(
    histogram: list[int], F: int = 12, O: int = 9, *, weights: bool = True, biases: bool = True,
    dtype: torch.dtype = F32, seed: int = 0,
) -> Case:  # fmt: skip
    generator = seeds.generator(seed)

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


def op(backend: str, *, stacked: bool = False, **options: Any) -> Callable[..., dict[str, Tensor]]:
    """With ``stacked`` the parameters are one tensor each, put together inside."""

    def call(actions: Tensor, x: Tensor, **given: Tensor) -> dict[str, Tensor]:
        weights, biases = parameters(given)
        K = len(weights or biases)
        with use_backend(backend):
            plan = dispatch.plan(actions, K)
            if options.get("is_sorted"):
                x = x[plan.order if plan.samples is None else plan.samples]
            W: Any = torch.stack(weights) if stacked and weights else weights
            b: Any = torch.stack([t.reshape(-1) for t in biases]) if stacked and biases else biases
            y = grouped_linear(x, plan, W, b, **{"keep_empty": True, **options})
        if options.get("keep_sorted"):
            y = y[plan.order.argsort()]
        return {"y": y}

    return call


def truth(activation: str = "none") -> Callable[..., dict[str, Tensor]]:
    """The definition, for each of a sample's modules."""

    def call(actions: Tensor, x: Tensor, **given: Tensor) -> dict[str, Tensor]:
        weights, biases = parameters(given)
        if actions.dim() == 2:
            x, actions = x.repeat_interleave(actions.shape[1], 0), actions.reshape(-1)
        return {"y": reference.grouped_linear(x, actions, weights, biases, activation)}

    return call


def checked(cases: Case | list[Case], backend: str, dtype: torch.dtype = F32, **options: Any) -> Results:
    return check(op(backend, **options), truth(options.get("activation", "none")), cases, dtype=dtype)


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
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_activations(backend: str, activation: str, dtype: torch.dtype) -> None:
    cases = [linear_case(HISTOGRAMS["some empty"], 5, 35, dtype=dtype, seed=seed) for seed in range(3)]
    y = checked(cases, backend, dtype, activation=activation)["y"]
    assert y is not None and not y[actions_of(HISTOGRAMS["some empty"]) < 0].any()  # nor a sigmoid's half
    gradcheck(op(backend, activation=activation), linear_case([2, 0, 3, 1], 3, 2))


#: 1 + erf and 1 + tanh lose in float64, too, what is left of them far below 0.
WITHOUT_CANCELLATION = {
    "gelu": lambda x: x * torch.special.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
}


@each_backend
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_activations_of_any_number(backend: str, activation: str) -> None:
    """From the smallest to the largest, infinite ones and NaN: as PyTorch has it."""
    sizes = [0.0, 1e-42, 1e-30, 1e-7, 1e-3, 0.3, 0.62, 0.63, 1.0, 5.0, 10.0, 20.0, 87.0, 88.0, 100.0, 1e6, 3e38]
    x = torch.tensor([*sizes, *(-v for v in sizes), torch.inf, -torch.inf, torch.nan])[:, None].requires_grad_()
    with use_backend(backend):
        plan = dispatch.plan(torch.zeros(len(x), dtype=torch.int64), 1)
        y = grouped_linear(x, plan, [torch.ones(1, 1)], activation=activation)
        (dx,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = WITHOUT_CANCELLATION.get(activation, activations.ACTIVATIONS[activation])(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    plain = x.detach().requires_grad_()
    (plain_slope,) = torch.autograd.grad((plain_y := activations.ACTIVATIONS[activation](plain)).sum(), plain)
    for got, wanted, usual in ((y, expected, plain_y), (dx, slope, plain_slope)):
        wanted, usual = wanted.detach(), usual.detach().double()
        assert got[-1].isnan() == usual[-1].isnan()
        whole = wanted.float().isfinite() & usual.isfinite()  # where PyTorch itself gives up, anything is as good
        error, budget = (got.detach().double() - wanted).abs()[whole], 2 * (usual - wanted).abs()[whole]
        budget += torch.finfo(F32).eps * wanted.abs()[whole]
        if got is dx:  # told from a rounded value, which another rounding may serve better at one number
            assert error.max() <= budget.max()
        else:  # what is beyond the smallest number may be zero
            assert (error <= budget + torch.finfo(F32).tiny * exact.detach().abs().clamp(min=1)[whole]).all()


@each_backend
@pytest.mark.parametrize("weights, biases", [(True, True), (True, False), (False, True)], ids=str)
@each_dtype
def test_stacked(backend: str, weights: bool, biases: bool, dtype: torch.dtype) -> None:
    """All modules' parameters in one tensor give the bits that separate ones do."""
    case = linear_case(HISTOGRAMS["some empty"], weights=weights, biases=biases, dtype=dtype)
    apart, together = (evaluate(op(backend, stacked=stacked), case) for stacked in (False, True))
    for name, t in apart.items():
        got = together[name]
        assert (t is None) == (got is None), name
        assert t is None or got is None or torch.equal(t, got), name


@each_backend
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("is_sorted, keep_sorted", list(product([False, True], repeat=2)))
def test_several_modules_a_sample(backend: str, k: int, is_sorted: bool, keep_sorted: bool) -> None:
    """Every entry reads its sample; what comes back to a sample is the sum over its entries, doubles among them."""
    generator = seeds.generator(k)
    case = linear_case(HISTOGRAMS["some empty"], dtype=F64)
    actions = torch.randint(-1, 5, (13, k), generator=generator)
    actions[0] = actions[0, 0]
    actions[1] = -1
    x = torch.randn(13, 12, dtype=F64, generator=generator)
    several = Case(
        {**case.inputs, "actions": actions, "x": x},
        {"y": torch.randn(13 * k, 9, dtype=F64, generator=generator)}, case.axes, case.wrt,
    )  # fmt: skip
    found = evaluate(op(backend, is_sorted=is_sorted, keep_sorted=keep_sorted, activation="tanh"), several)
    for name, t in evaluate(truth("tanh"), several).items():
        got = found[name]
        assert t is not None and got is not None
        assert_same(got, t, name)


@each_backend
@pytest.mark.parametrize("F, O", [(1, 1), (1, 17), (33, 1), (64, 48), (7, 130)])
def test_widths(backend: str, F: int, O: int) -> None:
    checked([linear_case(HISTOGRAMS["uneven"], F, O, seed=seed) for seed in range(4)], backend)


@needs_native
@each_dtype
@pytest.mark.parametrize("F", [48, 55])
def test_long_sums_are_the_same_for_few_rows_and_many(F: int, dtype: torch.dtype) -> None:
    """Weights are packed for many rows: the bits of a row's gradient do not depend on how many there are.

    From 64 columns on many rows of bfloat16 may be the library's, which adds in an order of its own.
    """
    O, many = 1100, 40
    generator = seeds.generator(F)
    x, weight = (torch.randn(n, m, generator=generator).to(dtype) for n, m in ((many, F), (O, F)))
    grad = torch.randn(many, O, generator=generator).to(dtype)

    def of(rows: slice) -> Tensor:
        leaf = x[rows].requires_grad_()
        plan = dispatch.plan(torch.zeros(len(leaf), dtype=torch.int64), 1)
        with use_backend("native"):
            grouped_linear(leaf, plan, [weight]).backward(grad[rows])
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(of(slice(0, many)), torch.cat([of(slice(i, i + 5)) for i in range(0, many, 5)]))


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
    found, exact = evaluate(op(backend, **options), case), evaluate(truth(), case)
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
@pytest.mark.parametrize("weights, biases", [(True, True), (True, False), (False, True)])
def test_few_modules_of_many(backend: str, weights: bool, biases: bool) -> None:
    """Modules without an entry are left out of the graph: the numbers of a call that has all; entries dropped."""
    histogram = [3 * (k in (0, 7, 8, 39)) for k in range(40)] + [2]
    case = linear_case(histogram, weights=weights, biases=biases, dtype=F64)
    found, whole = (evaluate(op(backend, keep_empty=keep), case) for keep in (False, True))
    for name, grad in found.items():
        expected = whole[name]
        assert expected is not None
        if name[:2] in ("dW", "db") and histogram[int(name[2:])] == 0:
            assert grad is None and not expected.any()
        else:
            assert grad is not None
            assert_same(grad, expected, name)


@each_backend
def test_few_modules_that_do_not_learn(backend: str) -> None:
    """The result has a gradient where any module learns, with an entry or without one."""
    x, actions = torch.randn(4, 3), torch.tensor([5, 5, 9, -1])
    with use_backend(backend):
        for learns in (5, 20):
            W = [torch.randn(2, 3, requires_grad=k == learns) for k in range(40)]
            y = grouped_linear(x, dispatch.plan(actions, 40), W)
            y.sum().backward()
            assert (W[5].grad is not None) == (learns == 5) and W[20].grad is None


def test_few_modules_in_distributed_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel waits for the node of each parameter, that of an idle one too."""
    W = [torch.randn(2, 3, requires_grad=True) for _ in range(40)]
    plan = dispatch.plan(torch.tensor([5, 5, 9, -1]), 40)

    given: list[Any] = []
    apply = linear_op.apply
    monkeypatch.setattr(linear_op, "apply", lambda *args: (given.append(args), apply(*args))[1])

    def leaves() -> int:
        grouped_linear(torch.randn(4, 3), plan, W)
        return sum(isinstance(t, torch.Tensor) and t.requires_grad for t in given[-1])

    assert leaves() == 2
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert leaves() == 40


@each_backend
def test_several_rows_a_sample(backend: str) -> None:
    """The plan of B samples, stretched to r rows of each."""
    actions, r = actions_of(HISTOGRAMS["some empty"]), 3
    case = linear_case(HISTOGRAMS["some empty"], dtype=F64)
    weights, biases = parameters(case.inputs)
    x = torch.randn(len(actions), r, 12, dtype=F64, generator=seeds.generator(1))
    with use_backend(backend):
        plan = dispatch.plan(actions, 5)
        rows = plan._replace(offsets=plan.offsets * r, bounds=[r * n for n in plan.bounds or ()])
        flat = x[plan.order].reshape(-1, 12)
        y = grouped_linear(flat, rows, weights, biases, is_sorted=True, keep_sorted=True)
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
    plan = reference_dispatch.plan(case.inputs["actions"], 3)  # type: ignore[arg-type]
    return case.inputs["x"], plan.order, plan.offsets, *parameters(case.inputs)


@needs_native
@pytest.mark.parametrize(
    "dtype, takes, puts",
    [
        (F32, True, True), pytest.param(F32, False, False, marks=pytest.mark.long),
        pytest.param(F64, True, False, marks=pytest.mark.long), pytest.param(BF16, False, True, marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_opcheck(dtype: torch.dtype, takes: bool, puts: bool) -> None:
    for weights, biases in ((True, True), (True, False), (False, True)):
        x, order, offsets, W, b = arguments(weights, biases, dtype)
        take, put = order if takes else None, order if puts else None
        ops = torch.ops.fastroute
        wanted = (weights, weights, biases)
        grad = torch.randn(len(x), 3).to(dtype)
        for stacked, kind in ((False, 4 * weights), (True, 0)):
            W_, b_ = W, b
            if stacked:
                W_ = [torch.stack(W)] if weights else []
                b_ = [torch.stack(b).reshape(3, 3)] if biases else []
            opcheck(ops._grouped_linear_native.default, (x, take, put, offsets, W_, b_, kind, kind > 0), grad=False)
            if weights and takes and puts:
                actions = torch.tensor([0, 2, -1, 2, 0, 1, 2, 2])[: len(x)]
                given = x[: len(actions)], actions, W_, b_, kind, kind > 0
                opcheck(ops._grouped_linear_native_planned.default, given, grad=False)
            kept = grad if kind else None
            given = grad, x, take, take, put, offsets, W_, 3, *wanted, kind, kept, stacked, True
            opcheck(ops._grouped_linear_native_backward.default, given, grad=False)


def _calls(sizes: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = seeds.generator(0)
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
        return grouped_linear(
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
    generator = seeds.generator(0)
    example, *others = [torch.randn(B, 4, generator=generator, dtype=F64) for B in (6, 2, 33)]

    class Rounded(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float()  # sums in another order agree once rounded

    with use_backend(backend):
        check_exported(Rounded(F64), example, others, {0: torch.export.Dim("batch", min=2, max=4096)})


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
        grouped_linear(x.double(), dispatch.Plan(order, offsets, torch.zeros(1)), W, b)


@each_backend
def test_shapes_that_do_not_fit(backend: str) -> None:
    """Nothing is read past a row, a weight or a plan."""
    x, order, offsets, W, b = arguments()
    plan = dispatch.Plan(order, offsets, torch.zeros(1))
    with use_backend(backend):
        for wrong in (x[:, :3], torch.cat([x, x], 1), x[:, 0], x[:, :, None]):
            with pytest.raises(ValueError, match=r"^x: expected \[N, 4\], as the modules take, got \["):
                grouped_linear(wrong, plan, W, b)
        for wrong in (x[:2], torch.cat([x, x])):
            with pytest.raises(ValueError, match=r"^x: expected the plan's 6 rows, got \["):
                grouped_linear(wrong, plan, W, b)
        with pytest.raises(ValueError, match=r"^x: expected a tensor"):
            grouped_linear(None, plan, W, b)
        for weights, biases in (([*W[:2], W[2][:, :3]], b), ([*W[:2], W[2][:2]], b), (W, [*b[:2], b[2][:2]])):
            with pytest.raises((ValueError, RuntimeError)):
                grouped_linear(x, plan, weights, biases)


def test_explain() -> None:
    layer = Layer()
    for backend in HERE:
        with use_backend(backend):
            made = fastroute.explain(layer, torch.randn(6, 4))
        assert {d.backend for d in made} == {backend} and {d.case.op for d in made} == {"dispatch", "grouped_linear"}
        assert "K=3" in str(made) and "N=6" in str(made)


@each_backend
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_not_a_number_stays_with_its_module(backend: str, compiled: bool) -> None:
    """Nor does a row that the plan drops reach any gradient. Compiled, no count is read."""
    W, b = torch.randn(3, 4, 5, dtype=F64), torch.randn(3, 4, dtype=F64)
    x, actions = torch.randn(6, 5, dtype=F64), torch.tensor([0, 1, 2, 1, -1, 0])
    x[3], x[4] = torch.nan, torch.inf

    def call(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return grouped_linear(x, dispatch.plan(actions, 3), W, b)

    leaves = [t.requires_grad_() for t in (x, W, b)]
    with use_backend(backend):
        y = (torch.compile(call, backend="aot_eager") if compiled else call)(*leaves)
        dx, dW, _ = torch.autograd.grad(torch.where(y.isnan(), 0, y).square().sum(), leaves)
    assert y.isnan().any(1).tolist() == [False, False, False, True, False, False]
    assert dW.isnan().flatten(1).any(1).tolist() == [False, True, False]
    assert not dx[4].any() and dx.isfinite().all()


@each_backend
@pytest.mark.parametrize("stacked", [False, True])
def test_parameters_whose_memory_is_negated(backend: str, stacked: bool) -> None:
    """Of a complex number's conjugate the imaginary part is a view that PyTorch marks as negated."""
    W, b = (torch.randn(3, *shape, dtype=torch.complex128).conj().imag for shape in ((4, 5), (4,)))
    assert W.is_neg()
    x, actions, uniform = torch.randn(6, 5, dtype=F64), torch.tensor([0, 1, 2, 1, 0, 0]), torch.rand(6, 4, dtype=F64)
    plan = dispatch.plan(actions, 3)
    given = [[W, b], [W.resolve_neg(), b.resolve_neg()]]
    if not stacked:
        given = [[list(t) for t in both] for both in given]
    with use_backend(backend):
        y, plain = (grouped_linear(x, plan, *both) for both in given)
        chosen, expected = (fastroute.functional.agent_policy(x, plan, *both, uniform=uniform) for both in given)
    assert_same(y, torch.einsum("nof,nf->no", W[actions], x) + b[actions])
    assert torch.equal(y, plain) and torch.equal(chosen.value, expected.value)
