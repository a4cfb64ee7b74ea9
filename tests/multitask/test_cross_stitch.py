"""CrossStitch against its sum, by its laws, and as layers between columns.

Axes: T tasks, B samples, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute.multitask import CrossStitch
from tests.helpers import seeds
from tests.helpers.budget import assert_within_budget
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_same, check_compiled

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
T, C = 3, 4


def stitch(channels: int | None = None, *, dtype: torch.dtype = F64, tasks: Any = T, **options: Any) -> CrossStitch:
    made = CrossStitch(tasks, channels=channels, dtype=dtype, **options)
    with torch.no_grad():
        made.alpha.add_(torch.randn(made.alpha.shape, generator=seeds.generator(0), dtype=F64) / 3)
    return made


def columns(*shape: int, dtype: torch.dtype = F64, count: int = T) -> list[Tensor]:
    generator = seeds.generator(1)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for _ in range(count)]


def by_sum(module: CrossStitch, xs: list[Tensor]) -> list[Tensor]:
    def alpha(t: int, s: int) -> Tensor:
        a = module.alpha[..., t, s].to(xs[0].dtype)
        return a if a.dim() == 0 else a.reshape(-1, *[1] * (xs[0].dim() - 2))

    return [sum(alpha(t, s) * x for s, x in enumerate(xs)) for t in range(len(xs))]  # type: ignore[misc]


SHAPES = [(5, C), (5, C, 2), (5, C, 3, 2), (0, C)]


@pytest.mark.parametrize("channels", [None, C])
@pytest.mark.parametrize("shape", [*SHAPES, (2, C, 2, 2, 3)], ids=str)
def test_the_same_as_its_sum(channels: int | None, shape: tuple[int, ...]) -> None:
    module, xs = stitch(channels), [x.requires_grad_() for x in columns(*shape)]
    leaves = [*xs, module.alpha]
    made, expected = module(*xs), by_sum(module, xs)
    cotangents = columns(*shape)
    for got, wanted in zip(made, expected, strict=True):
        assert got.shape == shape
        assert_same(got.detach(), wanted.detach())
    for got, wanted in zip(
        torch.autograd.grad(made, leaves, cotangents), torch.autograd.grad(expected, leaves, cotangents), strict=True
    ):
        assert_same(got, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [None, C])
def test_layouts(channels: int | None, layout: str) -> None:
    module, xs = stitch(channels), columns(5, C, 3)
    for got, expected in zip(module(*map(LAYOUTS[layout], xs)), module(*xs), strict=True):
        assert_same(got.detach(), expected.detach())


def test_any_rank_without_channels() -> None:
    module = stitch()
    for shape in ((), (3,), (2, 1, 2)):
        xs = columns(*shape)
        for got, expected in zip(module(*xs), by_sum(module, xs), strict=True):
            assert_same(got.detach(), expected.detach())


@pytest.mark.parametrize("channels", [None, C])
def test_gradcheck(channels: int | None) -> None:
    module = stitch(channels)

    def call(alpha: Tensor, *xs: Tensor) -> Any:
        return torch.func.functional_call(module, {"alpha": alpha}, xs)

    leaves = [module.alpha.detach().clone(), *columns(2, C, 2)]
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("channels", [None, C])
def test_the_identity_is_separate_networks(channels: int | None) -> None:
    """Bit for bit, gradients included."""
    seeds.manual_seed(0)
    module, x = CrossStitch(T, channels=channels, own=1.0), torch.randn(6, 5)
    nets = [(nn.Linear(5, C), nn.Linear(C, 2)) for _ in range(T)]
    leaves = [p for pair in nets for layer in pair for p in layer.parameters()]

    def run(mixed: bool) -> list[Tensor]:
        hidden = [a(x).relu() for a, _ in nets]
        ys = [b(h) for (_, b), h in zip(nets, module(hidden) if mixed else hidden, strict=True)]
        return [*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)]  # type: ignore[arg-type]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("channels", [None, C])
def test_permuting_tasks(channels: int | None) -> None:
    module, xs, order = stitch(channels), columns(4, C), [2, 0, 1]
    moved = stitch(channels)
    with torch.no_grad():
        moved.alpha.copy_(module.alpha[..., order, :][..., order])
    made = module(xs)
    for got, t in zip(moved([xs[t] for t in order]), order, strict=True):
        assert_same(got.detach(), made[t].detach())


def test_the_same_for_every_channel_is_one_for_all() -> None:
    module, each, xs = stitch(), CrossStitch(T, channels=C, dtype=F64), columns(4, C, 2)
    with torch.no_grad():
        each.alpha.copy_(module.alpha.expand(C, T, T))
    for got, expected in zip(each(*xs), module(*xs), strict=True):
        assert_same(got.detach(), expected.detach())


def test_not_a_number_stays_in_its_sample() -> None:
    module, xs = stitch(C), columns(5, C)
    expected = module(*xs)
    xs[1][2] = torch.nan
    for got, y in zip(module(*xs), expected, strict=True):
        rows = torch.arange(5) == 2
        assert torch.equal(got[~rows], y[~rows]) and got[rows].isnan().all()


def test_initial_values() -> None:
    made = CrossStitch(5, channels=2, own=0.6)
    assert made.alpha.shape == (2, 5, 5) and made.alpha.dtype == F32
    torch.testing.assert_close(made.alpha.sum(-1), torch.ones(2, 5))
    assert (made.alpha.diagonal(dim1=1, dim2=2) == 0.6).all() and torch.isclose(made.alpha[1, 0, 3], torch.tensor(0.1))
    assert list(CrossStitch(1).state_dict()) == ["alpha"] and CrossStitch(1, own=0.5).alpha == 0.5
    assert CrossStitch(2, device="meta").alpha.is_meta


def test_names() -> None:
    module, xs = stitch(tasks=["a", "b", "c"]), columns(2, C)
    by_order = module(xs)
    assert list(by_order) == ["a", "b", "c"]
    named = module(dict(zip("bca", (xs[1], xs[2], xs[0]), strict=True)))
    assert all(torch.equal(by_order[k], named[k]) for k in "abc")
    assert all(torch.equal(a, b) for a, b in zip(module(*xs).values(), by_order.values(), strict=True))


@pytest.mark.parametrize("channels", [None, C])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dtypes(channels: int | None, dtype: torch.dtype) -> None:
    module, xs = stitch(channels, dtype=dtype), columns(40, C, 3, dtype=dtype)
    exact = stitch(channels)
    with torch.no_grad():
        exact.alpha.copy_(module.alpha)
    made = torch.stack(module(*xs)).detach()
    assert made.dtype == dtype
    xs64 = [x.double() for x in xs]
    assert_within_budget({"y": made}, lambda: {"y": torch.stack(by_sum(exact, xs64)).detach()}, dtype)
    with torch.autocast("cpu", dtype=BF16):
        assert all(y.dtype == dtype for y in module(*xs))


@pytest.mark.parametrize("channels", [None, C])
@pytest.mark.long_after(1)
def test_compile(channels: int | None) -> None:
    module = stitch(channels)
    calls = [[x.requires_grad_() for x in columns(B, C, 7)] for B in (8, 9, 13)]
    check_compiled(module, calls, parameters=[module.alpha])


def test_export() -> None:
    module = stitch(C, dtype=F32)
    batch = torch.export.Dim("batch", min=2, max=100)
    program = torch.export.export(module, tuple(columns(4, C, dtype=F32)), dynamic_shapes=(({0: batch},) * T,))
    xs = columns(9, C, dtype=F32)
    assert all(torch.equal(a, b) for a, b in zip(program.module()(*xs), module(*xs), strict=True))


CONSTRUCTION: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: CrossStitch(0), ValueError, "tasks: expected at least 1, got 0"),
    (lambda: CrossStitch(2.0), TypeError, "tasks: expected an int, got 2.0"),  # type: ignore[arg-type]
    (lambda: CrossStitch(2, channels=0), ValueError, "channels: expected at least 1, got 0"),
    (lambda: CrossStitch(2, own="all"), TypeError, "own: expected a number, got 'all'"),  # type: ignore[arg-type]
    (lambda: CrossStitch(2, dtype=torch.int64), TypeError, "dtype: expected a floating-point dtype, got torch.int64"),
]


@pytest.mark.parametrize("make, error, message", CONSTRUCTION, ids=[c[2][:30] for c in CONSTRUCTION])
def test_construction(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_bad_input() -> None:
    a, b, c = columns(2, C)
    for error, message, args in (
        (ValueError, "inputs: expected 3, one per task, got 2", (a, b)),
        (ValueError, "inputs: expected 3, one per task, got 1", (a,)),
        (TypeError, "inputs: expected 3 tensors, got set", ({a, b, c},)),
        (TypeError, r"inputs\[1\]: expected a tensor, got int", (a, 2, c)),
        (TypeError, r"inputs\[2\]: expected a floating-point tensor, got torch.int64", (a, b, c.long())),
        (ValueError, r"inputs\[1\]: expected the shape \[2, 4\] of inputs\[0\], got \[1, 4\]", (a, b[:1], c)),
        (
            TypeError,
            r"inputs\[2\]: expected the dtype torch.float64 of inputs\[0\], got torch.float32",
            (a, b, c.float()),
        ),
        (ValueError, r"expected a list \(tasks have no names\), got a dict with keys \['a'\]", ({"a": a},)),
    ):
        with pytest.raises(error, match=message):
            stitch()(*args)
    with pytest.raises(ValueError, match=r"inputs\[1\]: expected a tensor on cpu like the parameters, got one on meta"):
        CrossStitch(2)(torch.ones(2), torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match=r"inputs\[0\]: expected \[B, 4, ...\], got \[2, 3\]"):
        stitch(C)(*columns(2, 3))
    with pytest.raises(ValueError, match=r"inputs: expected keys \['a', 'b'\], got a dict with keys \['a', 'c'\]"):
        stitch(tasks=["a", "b"])({"a": a, "c": c})
