"""The helpers do what the tests that use them rely on."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.budget import assert_within_budget
from tests.helpers.layouts import LAYOUTS, Fenced

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
    exact = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    plain = exact.float() * (1 + 1e-6)
    assert_within_budget(exact.float(), exact, exact.float())
    assert_within_budget(exact.float() * (1 + 1.9e-6), exact, plain)
    with pytest.raises(
        AssertionError,
        match=r"M: error 1e-05 in the largest entry, allowed 6.08e-06 \(plain PyTorch 2.86e-06, scale 3, float32",
    ):
        assert_within_budget(exact.float() + 1e-5, exact, plain, "M")
    with pytest.raises(AssertionError, match="1 of 3 entries are not finite"):
        assert_within_budget(torch.tensor([1.0, math.nan, 3.0]), exact, plain)
    # every entry as bad as the single worst of plain PyTorch
    one_bad = exact.repeat(100).float()
    one_bad[0] += 1e-3
    with pytest.raises(AssertionError, match="Frobenius"):
        assert_within_budget(exact.repeat(100).float() + 1e-3, exact.repeat(100), one_bad)
