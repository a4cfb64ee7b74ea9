"""``dispatch`` and ``grouped_linear``: the native backend against plain PyTorch, on every layout and odd size."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from fastroute import use_backend
from fastroute.functional import grouped_linear
from fastroute.ops.dispatch.op import plan
from tests.helpers import seeds
from tests.helpers.backends import needs_native
from tests.helpers.budget import assert_within_budget
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_same
from tests.helpers.process_wide import on_threads

pytestmark = needs_native

#: Rows, modules, features in and out: below, at and beyond the widths of vectors and tiles.
SIZES = (
    (0, 3, 4, 5),
    (1, 1, 1, 1),
    (40, 2, 1, 40),
    (64, 20, 17, 5),
    (300, 4, 33, 48),
    (700, 3, 130, 27),
    (9, 1, 300, 9),
    (90, 2, 200, 136),
    (26, 2, 8, 16),
    (100, 1, 31, 15),
    (200, 1, 96, 33),
)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    seeds.manual_seed(0)


def some_actions(rows: int, modules: int) -> Tensor:
    return torch.randint(-1, modules, (rows,), generator=seeds.generator(0))


def run(
    backend: str, actions: Tensor, x: Tensor, weights: list[Tensor], biases: list[Tensor], grad: Tensor, **options: bool
) -> list[Tensor]:
    """y, then the gradients of x, of every weight and of every bias."""
    leaves = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
    x, weights, biases = leaves[0], leaves[1 : 1 + len(weights)], leaves[1 + len(weights) :]
    with use_backend(backend):
        y = grouped_linear(x, plan(actions, len(weights or biases)), weights, biases, keep_empty=True, **options)
        wanted = leaves if weights else biases
        return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize(("rows", "modules"), [(0, 4), (1, 1), (1000, 7), (50, 100)])
def test_plan(rows: int, modules: int, stride: int) -> None:
    actions = some_actions(rows * stride, modules + 2).clamp(max=modules - 1)[::stride]
    with use_backend("native"):
        found = plan(actions, modules)
    with use_backend("reference"):
        expected = plan(actions, modules)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))


def test_plan_counts_what_is_beyond() -> None:
    actions = torch.tensor([2, -1, 3, 0, 7, 2, -5])
    order, offsets, beyond = torch.ops.fastroute._dispatch_plan_native(actions, 3)
    assert order.tolist() == [3, 0, 5, 1, 2, 4, 6]
    assert offsets.tolist() == [0, 1, 1, 3] and beyond.tolist() == [2]


@pytest.mark.parametrize("layout", ["contiguous", "columns_first", "strided", "sliced_rows"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_as_plain_pytorch(size: tuple[int, int, int, int], layout: str) -> None:
    N, K, F, O = size
    actions, arrange = some_actions(N, K), LAYOUTS[layout]
    x = LAYOUTS["sliced_rows"](torch.randn(N, F, dtype=torch.float64))
    weights = [arrange(torch.randn(O, F, dtype=torch.float64)) for _ in range(K)]
    biases = [arrange(torch.randn(O, dtype=torch.float64)) for _ in range(K)]
    grad = torch.randn(N, O, dtype=torch.float64)
    for has_biases, is_sorted, keep_sorted in product((True, False), repeat=3):
        results = [
            run(name, actions, x, weights, biases * has_biases, grad, is_sorted=is_sorted, keep_sorted=keep_sorted)
            for name in ("native", "reference")
        ]
        for found, expected in zip(*results, strict=True):
            assert_same(found, expected, f"biases {has_biases}, is_sorted {is_sorted}, keep_sorted {keep_sorted}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES[2:], ids=str)
def test_within_budget(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    N, K, F, O = size
    actions = some_actions(N, K)
    tensors = [torch.randn(N, F), *(torch.randn(O, F) for _ in range(K)), *(torch.randn(O) for _ in range(K))]
    x, *parameters = (t.to(dtype) for t in tensors)
    grad = torch.randn(N, O).to(dtype)

    def results(backend: str, to: torch.dtype) -> dict[str, Tensor]:
        p = [t.to(to) for t in parameters]
        made = run(backend, actions, x.to(to), p[:K], p[K:], grad.to(to))
        return {f"result {k}": t for k, t in enumerate(made)}

    found = results("native", dtype)
    assert all(t.dtype == dtype for t in found.values())
    assert_within_budget(found, lambda: results("reference", torch.float64), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tables(dtype: torch.dtype) -> None:
    actions = some_actions(50, 6)
    tables = [LAYOUTS["strided"](torch.randn(7).to(dtype)) for _ in range(6)]
    grad = torch.randint(-4, 5, (50, 7)).to(dtype)
    for x in (torch.empty(50, 0, dtype=dtype), torch.full((50, 3), torch.nan, dtype=dtype)):
        both = [run(name, actions, x, [], tables, grad) for name in ("native", "reference")]
        assert all(torch.equal(found, expected) for found, expected in zip(*both, strict=True))


@pytest.mark.parametrize("size", [(2000, 3, 64, 48), (500, 40, 128, 48)], ids=str)
def test_same_bits_on_any_number_of_threads(size: tuple[int, int, int, int]) -> None:
    N, K, F, O = size
    actions = some_actions(N, K)
    given = torch.randn(N, F), [torch.randn(O, F) for _ in range(K)], [torch.randn(O) for _ in range(K)]
    grad = torch.randn(N, O)
    made = on_threads((1, 2, 3, 7), lambda: run("native", actions, *given, grad))
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


def test_modules_without_rows_cost_nothing() -> None:
    """Their gradients are None, or zeros on request: the op then makes nothing for them, or writes all of it."""
    actions, grad, x = torch.tensor([1, 1, 3]), torch.randn(3, 5), torch.randn(3, 4)
    weights = [torch.randn(5, 4) for _ in range(4)]
    with use_backend("native"):
        order, offsets, *_ = plan(actions, 4)
        given = grad, x, order, order, order, offsets, weights, 4, True, True, True, 0, None, False
        dx, dw, db = torch.ops.fastroute._grouped_linear_native_backward(*given, False)
        all_dx, all_dw, all_db = torch.ops.fastroute._grouped_linear_native_backward(*given, True)
    assert torch.equal(dx, all_dx)
    for k in range(4):
        if k in (1, 3):
            assert torch.equal(dw[k], all_dw[k]) and torch.equal(db[k], all_db[k])
        else:
            assert dw[k].numel() == db[k].numel() == 0
            assert torch.equal(all_dw[k], torch.zeros(5, 4)) and torch.equal(all_db[k], torch.zeros(5))


def test_what_is_not_finite_stays_in_its_row() -> None:
    """Tails are computed by overlapping tiles, zeros masking what is not theirs: 0 * inf must not appear."""
    x, weights = torch.randn(40, 13), [torch.randn(11, 13) for _ in range(2)]
    x[5, 12], x[7, 3] = torch.nan, torch.inf
    weights[1][4, 6] = torch.inf
    actions = torch.arange(40) % 2
    actions[9] = -1
    grad = torch.randn(40, 11)
    with use_backend("native"):
        y = grouped_linear(x, plan(actions, 2), weights)
    exact = torch.stack([weights[int(a)] @ row for a, row in zip(actions, x, strict=True)])
    exact[9] = 0
    assert torch.equal(y.isfinite(), exact.isfinite())
    assert not y[9].any() and grad.isfinite().all()


def test_no_operator_runs_inside() -> None:
    """A small step is made of dispatches; the native ops add their own only."""
    K = 20
    x = torch.randn(64, 32, requires_grad=True)
    parameters = [torch.randn(24, 32, requires_grad=True) for _ in range(K)]
    parameters += [torch.randn(24, requires_grad=True) for _ in range(K)]
    actions, grad = some_actions(64, K), torch.randn(64, 24)
    with use_backend("native"):
        made = plan(actions, K)
    with use_backend("native"), torch.profiler.profile() as profile:
        torch.ops.fastroute._dispatch_plan_native(actions, K)
        y = grouped_linear(x, made, parameters[:K], parameters[K:], keep_empty=True)
        y.backward(grad)
    counts = {e.key: e.count for e in profile.key_averages() if e.key.startswith("aten::")}
    assert counts.pop("aten::detach") == 1 + 2 * K  # what AccumulateGrad does to a gradient that it keeps as it is
    assert counts == {}, counts


def test_wide_products_of_bfloat16_have_the_same_bits_on_any_threads() -> None:
    """A library makes them, where rows are many."""
    N, K, F, O = 90, 2, 200, 136
    x, grad, W, b = (torch.randn(shape).to(torch.bfloat16) for shape in ((N, F), (N, O), (K, O, F), (K, O)))
    of, found, before = plan(some_actions(N, K), K), [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            leaves = [t.clone().requires_grad_() for t in (x, W, b)]
            y = grouped_linear(leaves[0], of, leaves[1], leaves[2])
            found.append([y, *torch.autograd.grad(y, leaves, grad)])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
