"""Softmax over few numbers is PyTorch's, whichever way it goes."""

from __future__ import annotations

import pytest
import torch

from fastroute.ops import softmax
from tests.helpers import seeds
from tests.helpers.opcheck import assert_same


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (300, 1), (300, 3), (90, 4, 8), (300, 40)], ids=str)
def test_values_and_gradients(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "_VECTOR_BYTES", 128)
    for strided in (False, True):
        z = torch.randn(shape, generator=seeds.generator(1), dtype=torch.float64) * 4
        z = (z.mT.contiguous().mT if strided else z).requires_grad_()
        dy = torch.randn(shape, generator=seeds.generator(2), dtype=torch.float64)
        y, exact = softmax.softmax_of_few(z), z.softmax(-1)
        assert y.is_contiguous()
        (found,), (expected,) = (torch.autograd.grad(t, z, dy) for t in (y, exact))
        assert_same(y, exact, "y")
        assert_same(found, expected, "dz")


def test_rows_that_are_closed_or_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "_VECTOR_BYTES", 64)
    z = torch.zeros(300, 3)
    z[0, 0], z[1], z[2, 1], z[3, 2] = -torch.inf, -torch.inf, torch.nan, 3e38
    y = softmax.softmax_of_few(z)
    assert torch.equal(y[0], torch.tensor([0, 0.5, 0.5])) and torch.equal(y[3], torch.tensor([0, 0, 1.0]))
    assert y[1:3].isnan().all() and (y[4:] - 1 / 3).abs().max() < 1e-7
