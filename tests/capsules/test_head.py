"""``CapsuleHead`` and ``CapsuleClassifier``: padding that is never read, credit on demand, and what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute.capsules import record
from fastroute.models import CapsuleClassifier, CapsuleHead
from tests.helpers import seeds
from tests.helpers.opcheck import assert_same

F64 = torch.float64
MASK = torch.tensor([[1] * 7, [0, 1, 1, 0, 1, 1, 0]])


def head(**options: Any) -> CapsuleHead:
    seeds.manual_seed(0)
    return CapsuleHead(5, 8, 2, parts=4, dtype=F64, **options)


def states() -> list[Tensor]:
    return [torch.randn(2, 7, 8, dtype=F64, generator=seeds.generator(k)) for k in range(2)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("return_credit", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_what_is_masked_reaches_nothing(bad: float, return_credit: bool, stacked: bool) -> None:
    """Neither the scores nor a gradient, whatever stands there."""
    model, found = head(return_credit=return_credit), []
    for value in (0.5, bad):
        hidden = states()
        for t in hidden:
            t[MASK == 0] = value
            t.requires_grad_()
        model.zero_grad()
        made = model(torch.stack(hidden, 2) if stacked else hidden, MASK)
        y, credit = made if return_credit else (made, torch.zeros(2, 7, 2, 5, dtype=F64))
        (y.square().sum() + credit.square().sum()).backward()
        grads = [t.grad for t in (*hidden, *model.parameters())]
        assert all(g is not None and g.isfinite().all() for g in grads)
        assert not any(t.grad[MASK == 0].any() for t in hidden)  # type: ignore[index]
        found.append([y.detach(), credit.detach(), *grads])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_credit_may_be_asked_for_later() -> None:
    model, x = head(), states()
    y, (same, credit) = model(x, MASK), head(return_credit=True)(x, MASK)
    assert_same(y.detach(), same.detach())
    model.return_credit = True
    assert model.return_credit and torch.equal(model(x, MASK)[1], credit)
    with record(model) as found:
        recorded = model(x, MASK)
    assert torch.equal(recorded, same) and len(found) == 3
    model.return_credit = False
    assert not model.return_credit and torch.equal(model(x, MASK), y)


def compiled(model: CapsuleHead) -> None:
    model.route = torch.compile(model.route, backend="eager")  # type: ignore[assignment]


def hooked(model: CapsuleHead) -> None:
    model.route.register_forward_hook(lambda _, __, made: None)


@pytest.mark.parametrize("wrap", [compiled, hooked])
@pytest.mark.parametrize("return_credit", [False, True])
@pytest.mark.parametrize("mask", [None, MASK])
def test_the_routings_are_called_as_one_module(
    wrap: Callable[[CapsuleHead], None], return_credit: bool, mask: Tensor | None
) -> None:
    model, x = head(return_credit=return_credit), states()
    expected = model(x, mask)
    wrap(model)
    runs: list[int] = []
    model.route.register_forward_hook(lambda *_: runs.append(1))
    found = model(x, mask)
    assert len(runs) == 1
    torch.testing.assert_close(found, expected)
    model.reset_parameters()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=8, num_hidden_layers=1)
        self.first, self.second = nn.Linear(8, 8, dtype=F64), nn.Linear(8, 8, dtype=F64)

    def forward(self, x: Tensor, output_hidden_states: bool) -> SimpleNamespace:
        made = self.first(x)
        return SimpleNamespace(hidden_states=(made, self.second(made)))


@pytest.mark.parametrize("wanted", ["nothing", "a parameter", "the input"])
def test_a_frozen_encoder_gives_the_gradients_that_are_asked_for(wanted: str) -> None:
    seeds.manual_seed(0)
    model = CapsuleClassifier(Encoder(), 5, parts=4, dtype=F64)
    x = torch.randn(2, 7, 8, dtype=F64, requires_grad=wanted == "the input")
    model.encoder.second.requires_grad_(wanted == "a parameter")
    model(x).square().sum().backward()
    assert (x.grad is not None) == (wanted == "the input")
    assert (model.encoder.second.weight.grad is not None) == (wanted == "a parameter")
    assert model.encoder.first.weight.grad is None and not model.train().encoder.training
    assert all(p.grad is not None for p in model.head.parameters())
