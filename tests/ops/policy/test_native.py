"""``policy``: the native backend against plain PyTorch, for every kind and way to choose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastroute import use_backend
from fastroute.ops.policy.op import KINDS, policy
from tests.helpers import seeds
from tests.helpers.backends import needs_native
from tests.helpers.budget import assert_within_budget
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_same
from tests.helpers.process_wide import on_threads

pytestmark = needs_native

SIZES = ((0, 3), (1, 1), (1000, 2), (777, 5), (3000, 20), (300, 100), (2, 9000))
WAYS = ("greedy", "draw", "coin", "forced")


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    seeds.manual_seed(0)


def some_choices(way: str, N: int, K: int, dtype: torch.dtype) -> dict[str, Tensor]:
    if way == "forced":
        return {"forced": torch.randint(-1, K, (N,))}
    uniform = {"uniform": torch.rand(N, K, dtype=dtype)} if way != "greedy" else {}
    return uniform | ({"coin": torch.rand(N, dtype=dtype)} if way == "coin" else {})


NAMES = ("value", "gradient")


def run(backend: str, scores: Tensor, kind: str, grad: Tensor, **choices: Tensor) -> list[Tensor]:
    """Actions, greedy actions, values, the gradient of the scores."""
    leaf = scores.detach().requires_grad_()
    with use_backend(backend):
        made = policy(leaf, kind=kind, temperature=0.7, exploration=0.4, **choices)
    (gradient,) = torch.autograd.grad(made.value, leaf, grad)
    return [made.actions, made.greedy, made.value.detach(), gradient]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_as_plain_pytorch(size: tuple[int, int], kind: str, way: str) -> None:
    scores = 3 * torch.randn(size, dtype=torch.float64)
    scores[: size[0] // 10] = scores[: size[0] // 10, :1]  # rows of ties
    choices = some_choices(way, *size, torch.float64)
    grad = torch.randn(size[0], dtype=torch.float64)
    found, expected = (run(name, scores, kind, grad, **choices) for name in ("native", "reference"))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert_same(found[2], expected[2], "value")
    assert_same(found[3], expected[3], "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [*SIZES[2:6], (50, 9000)], ids=str)
def test_within_budget(size: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    scores, grad = (3 * torch.randn(size)).to(dtype), torch.randn(size[0])
    uniform = some_choices("draw", *size, torch.float32)
    found, plain = (run(name, scores, kind, grad, **uniform) for name in ("native", "reference"))
    different = found[0] != plain[0]  # two races so close that rounding decides them
    assert int(different.sum()) <= 1e-3 * size[0]
    forced = {"forced": found[0]}
    assert found[3].dtype == dtype and found[2].dtype == torch.float32

    def exact() -> dict[str, Tensor]:
        return dict(zip(NAMES, run("reference", scores.double(), kind, grad.double(), **forced)[2:], strict=True))

    assert_within_budget(dict(zip(NAMES, found[2:], strict=True)), exact, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scores(kind: str) -> None:
    """The first of equals; -inf never; NaN in one row only; the largest and smallest numbers."""
    scores = torch.zeros(8, 5)
    scores[1] = torch.tensor([1.0, -torch.inf, 3.0, 3.0, -torch.inf])
    scores[2, 3] = torch.nan
    scores[3] = torch.tensor([1e-45, 0.0, 3e37, -3e37, 1.0])
    scores[4] = torch.tensor([-100.0, -200.0, 0.0, -87.5, -1000.0])
    uniform, grad = torch.rand(8, 5), torch.randn(8)
    for choices in ({}, {"uniform": uniform}, {"forced": torch.tensor([0, 2, 1, 4, 3, -1, 2, 0])}):
        found, expected = (run(name, scores, kind, grad, **choices) for name in ("native", "reference"))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2], equal_nan=True)
        clean = torch.tensor([0, 3, 4, 5, 6, 7] if kind == "shifted" else [0, 1, 3, 4, 5, 6, 7])
        torch.testing.assert_close(found[3][clean], expected[3][clean], equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kind: str, layout: str) -> None:
    arrange = LAYOUTS[layout]
    scores, grad = torch.randn(70, 6, dtype=torch.float64), torch.randn(70, dtype=torch.float64)
    for way in WAYS:
        choices = some_choices(way, 70, 6, torch.float64)
        expected = run("native", scores, kind, grad, **choices)
        found = run("native", arrange(scores), kind, arrange(grad), **{k: arrange(t) for k, t in choices.items()})
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_forced_out_of_range() -> None:
    with use_backend("native"), pytest.raises(IndexError, match="forced: expected indices below 3, got 3"):
        policy(torch.randn(4, 3), forced=torch.tensor([0, 1, 3, 2]))


def test_same_bits_on_any_number_of_threads() -> None:
    scores, grad = torch.randn(5000, 20), torch.randn(5000)
    uniform = torch.rand(5000, 20)
    made = on_threads((1, 2, 7), lambda: run("native", scores, "softmax", grad, uniform=uniform))
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))
