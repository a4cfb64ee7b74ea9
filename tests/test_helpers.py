"""The helpers do what the tests that use them rely on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.helpers.backends import each_backend
from tests.helpers.budget import Yardstick, yardstick_of
from tests.helpers.cases import Case
from tests.helpers.covering import pairs
from tests.helpers.layouts import LAYOUTS, Fenced
from tests.helpers.rounding import Rounded

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(9),
        lambda: torch.empty_like(torch.zeros(9)),
        lambda: torch.zeros(9, dtype=torch.float64).new_empty(4, 9),
        lambda: torch.empty_strided((3, 3), (4, 1)),
        lambda: torch.zeros(2, dtype=torch.bfloat16).new_empty_strided((3, 3), (4, 1)),
        lambda: torch.ops.aten.new_empty.default(torch.zeros(1), [9]),
    ],
    ids=["empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "what the extension calls"],
)
def test_unwritten_memory_is_nan(make: object) -> None:
    assert make().isnan().all()  # type: ignore[operator]


def test_unwritten_integers_are_the_largest() -> None:
    assert (torch.empty(9, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values(layout: str) -> None:
    t = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(LAYOUTS[layout](t), t)
    assert (layout == "contiguous") == LAYOUTS[layout](t).is_contiguous()


def test_a_fence_sees_writes_on_either_side() -> None:
    for offset in (-1, 12):
        fenced = Fenced(torch.zeros(3, 4))
        assert fenced.intact()
        torch.as_strided(fenced.tensor, (1,), (1,), fenced.margin + offset).fill_(1.0)
        assert not fenced.intact()


def test_budget() -> None:
    x = torch.linspace(1, 3, 100, dtype=torch.float64).float()
    yardstick = Yardstick(lambda: {"y": x.double() / 7, "sum": x.double().sum(), "n": torch.tensor(3)}, torch.float32)
    good = {"y": x / 7, "sum": x.sum(), "n": torch.tensor(3)}
    yardstick.check(good)
    with pytest.raises(AssertionError, match=r"y: error 9.\d+e-07 in the largest entry, allowed [\d.]+e-08 .*float32"):
        yardstick.check(good | {"y": good["y"] + 1e-6 * (torch.arange(100) == 7)})
    with pytest.raises(AssertionError, match="Frobenius"):  # no entry is off by more than one may be, but most are
        yardstick.check(good | {"y": (x.double() / 7 + 3.55e-8).float()})
    with pytest.raises(AssertionError, match="y: 1 of 100 not finite"):
        yardstick.check(good | {"y": torch.where(torch.arange(100) == 7, math.nan, good["y"])})
    with pytest.raises(AssertionError, match="y: nothing, where the reference has something"):
        yardstick.check(good | {"y": None})
    with pytest.raises(AssertionError, match=r"y: shape \[99\], expected \[100\]"):
        yardstick.check(good | {"y": good["y"][1:]})
    with pytest.raises(AssertionError, match="n: "):
        yardstick.check(good | {"n": torch.tensor(2)})


def test_infinities_and_nothing() -> None:
    """What is infinite in the exact answer has to be so, and what is empty is right."""
    x = torch.tensor([1.0, 0.0, 3.0])
    yardstick = Yardstick(lambda: {"y": x.double().log(), "none": x.double()[:0]}, torch.float32)
    yardstick.check({"y": x.log(), "none": x[:0]})
    with pytest.raises(AssertionError, match="y: "):
        yardstick.check({"y": torch.tensor([0.0, -1e30, 1.0986123])})


def rounded(fn: Callable[[], Tensor], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    with Rounded(dtype, seed):
        return fn()


def test_rounding_is_to_a_neighbour_and_repeats() -> None:
    x, factor = torch.randn(1000, dtype=torch.float64), torch.tensor(1.1, dtype=torch.float64)
    draws = [rounded(lambda: x * factor, seed) for seed in range(20)]
    for y in draws:
        assert torch.equal(y.float().double(), y)
        exact = x * factor
        spacing = exact.abs() * torch.finfo(torch.float32).eps
        assert ((y - exact).abs() <= spacing).all()
    assert torch.equal(draws[3], rounded(lambda: x * factor, 3))
    assert not torch.equal(draws[0], draws[1])
    # to either side alike, in the long run, and independent: both within five standard deviations
    errors = (torch.stack(draws) - exact) / spacing
    assert errors.mean().abs() < 5 * errors.std() / errors.numel() ** 0.5
    assert errors.mean(0).std() < 1.1 * errors.std() / len(draws) ** 0.5


def test_in_float64_one_number_of_twelve_is_moved_by_a_unit() -> None:
    """Which is the variance of a rounding; exact numbers stay."""
    x, factor = torch.randn(12_000, dtype=torch.float64), torch.tensor(1.1, dtype=torch.float64)
    exact = x * factor
    y = rounded(lambda: x * factor, 1, torch.float64)
    moved = y != exact
    assert ((y == exact) | (y == torch.nextafter(exact, y))).all()
    assert abs(int(moved.sum()) - 1000) < 5 * 1000**0.5
    assert abs(int((y > exact).sum()) - 500) < 5 * 500**0.5
    halves = torch.arange(1.0, 1000.0, dtype=torch.float64)
    assert torch.equal(rounded(lambda: halves / 2, 1, torch.float64), halves / 2)


def test_numbers_from_python_are_rounded_to_the_nearest() -> None:
    """As PyTorch's kernels take them: the same in every draw."""
    ones = torch.ones(5, dtype=torch.float64)
    assert (rounded(lambda: ones * 0.1, 0) == rounded(lambda: ones * 0.1, 1)).all()
    assert (rounded(lambda: ones * 0.1) == torch.tensor(0.1).double()).all()


def test_rounding_leaves_what_is_exact() -> None:
    x = torch.randn(1000).double()
    for fn in (lambda: x * 2, lambda: x * (x > 0), lambda: x.clone(), lambda: torch.cat([x, -x]), lambda: x - x):
        assert torch.equal(rounded(fn), fn())
    same = rounded(
        lambda: torch.full((500,), 1 / 3, dtype=torch.float64) * torch.full((500,), 0.1, dtype=torch.float64)
    )
    assert (same == same[0]).all()  # equal values are rounded alike


@pytest.mark.parametrize("n", [10, 1000, 100_000])
def test_rounding_of_sums(n: int) -> None:
    """As far as adding in runs may go, and that is further than PyTorch goes."""
    x = torch.randn(40, n, generator=torch.Generator().manual_seed(0))
    exact = x.double().sum(-1)
    drawn = torch.stack([rounded(lambda: x.double().sum(-1), seed) - exact for seed in range(20)])
    plain = (x.sum(-1).double() - exact).square().mean().sqrt()
    assert 0.7 * plain < drawn.square().mean().sqrt()


def test_rounding_in_place_and_backward() -> None:
    x = torch.randn(50).double().requires_grad_()

    def step() -> Tensor:
        y = torch.sigmoid(x * 1.1)
        (g,) = torch.autograd.grad(y.sum(), x)
        total = torch.zeros(50, dtype=torch.float64)
        return total.add_(g, alpha=0.1)

    made = rounded(step)
    assert torch.equal(made.float().double(), made) and not torch.equal(made, step())
    torch.testing.assert_close(made, step(), rtol=1e-5, atol=1e-6)


_yardsticks: dict[str, Yardstick] = {}  #: of a test that runs on one backend after the other


@pytest.mark.parametrize("name", ["a", "b"])
@each_backend
def test_a_case_has_one_yardstick_for_all_backends(name: str, backend: str, request: pytest.FixtureRequest) -> None:
    """Other numbers or other options have another one; the backends of a case follow one another."""

    def power(times: int, x: Tensor) -> dict[str, Tensor]:
        return {"y": x**times}

    def yardstick(times: int, scale: float) -> Yardstick:
        x = scale * torch.ones(3)
        return yardstick_of(partial(power, times), Case({"x": x}, {"y": x}, {}, ("x",)), torch.float32)

    found = yardstick(2, 1.0 if name == "a" else 2.0)
    assert _yardsticks.setdefault(name, found) is found
    assert len({id(found), id(yardstick(3, 1.0)), id(yardstick(2, 3.0))}) == 3
    alike = [item for item in request.session.items if item.nodeid.split("[")[0] == request.node.nodeid.split("[")[0]]
    order = [item.callspec.params["name"] for item in alike]  # type: ignore[attr-defined]
    assert order == sorted(order)


def test_operators_that_are_not_known_are_an_error() -> None:
    with pytest.raises(NotImplementedError, match=r"say in tests\.helpers\.rounding how it rounds"):
        rounded(
            lambda: torch.fft.rfft(torch.randn(8, dtype=torch.float64)).real + torch.special.i0(torch.ones(3).double())
        )


@pytest.mark.parametrize("op", ["index_put", "index_add", "scatter_add", "embedding"])
def test_rounding_of_sums_by_index(op: str) -> None:
    """Of 1000 terms in three places, added one by one: far more than a rounding, and what float32 does."""
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    where = torch.arange(1000) % 3

    def sums(x: Tensor) -> Tensor:
        to = torch.zeros(3, 4, dtype=x.dtype)
        if op == "index_put":
            return to.index_put((where,), x, accumulate=True)
        if op == "index_add":
            return to.index_add(0, where, x)
        if op == "scatter_add":
            return to.scatter_add(0, where[:, None].expand(1000, 4), x)
        return torch.ops.aten.embedding_dense_backward(x, where, 3, -1, False)  # type: ignore[no-any-return]

    exact = sums(x.double())
    drawn = torch.stack([rounded(lambda: sums(x.double()), seed) - exact for seed in range(20)]).square().mean().sqrt()
    plain = (sums(x).double() - exact).square().mean().sqrt()
    assert plain / 2 < drawn < 4 * plain


@pytest.mark.parametrize("sizes", [(11, 2, 2), (3, 2, 2, 2), (5, 3)], ids=str)
def test_all_pairs_are_met(sizes: tuple[int, ...]) -> None:
    found = pairs(*map(range, sizes))
    for i, j in itertools.combinations(range(len(sizes)), 2):
        assert {(case[i], case[j]) for case in found} == set(itertools.product(range(sizes[i]), range(sizes[j])))
    assert len(found) == len(set(found)) <= math.prod(sizes) and found == pairs(*map(range, sizes))
