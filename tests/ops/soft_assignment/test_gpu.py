"""``soft_assignment`` and its layer on a GPU: no synchronisation, CUDA graphs, and which backend is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import DefinableVectorRouting, explain, functional
from tests.helpers import seeds

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

B, N, M, D, H = 4, 300, 10, 64, 48


class Agreement(nn.Module):
    def forward(self, x: Tensor, pred: Tensor) -> Tensor:
        return x @ pred.mT * D**-0.5


def layer(n_inp: int) -> DefinableVectorRouting:
    modules = nn.Linear(D, 1, device="cuda"), nn.Linear(D, M * H, device="cuda"), nn.Linear(H, D, device="cuda")
    return DefinableVectorRouting(*modules, Agreement(), n_inp, M, n_iters=3, d_inp=D, device="cuda")


def test_takes_triton() -> None:
    for n_inp in (N, -1):
        made = explain(layer(n_inp), torch.randn(B, N, D, device="cuda"))
        assert {decision.backend for decision in made} == {"triton"}


class Step:
    """A training step in memory that stays."""

    def __init__(self, n_inp: int, padded: bool) -> None:
        seeds.manual_seed(0)
        self.layer = layer(n_inp)
        self.x = torch.randn(B, N, D, device="cuda", requires_grad=True)
        self.lengths = torch.tensor([N, 3, 0, 77], device="cuda") if padded else None
        self.mask = torch.rand(N, M, device="cuda") < 0.3 if padded else None

    def __call__(self) -> list[Tensor]:
        y = self.layer(self.x, self.mask, lengths=self.lengths)
        wanted = [self.x, *self.layer.parameters()]
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("n_inp", [N, -1])
def test_a_training_step_is_captured_without_a_sync(n_inp: int, padded: bool) -> None:
    step = Step(n_inp, padded)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    graph.replay()
    captured = [t.clone() for t in made]
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected) and got.isfinite().all()


def test_slots_are_captured_without_a_sync() -> None:
    scores: Any = torch.randn(B, N, 7, device="cuda", requires_grad=True)
    values: Any = torch.randn(B, N, 1, H, device="cuda", requires_grad=True)

    def step() -> list[Tensor]:
        y = functional.soft_assignment(scores, values, mean=True, eps=1e-8)
        return [y, *torch.autograd.grad(y.square().sum(), [scores, values])]

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = step(), step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_more_than_two_to_the_thirty_one_votes() -> None:
    """Offsets are of 64 bits: a vote of the last row reaches its output, and gets its gradient."""
    n, m, h = 1 << 16, 64, 520  # 2.2e9 votes of two bytes
    votes = torch.zeros(1, n, m, h, dtype=torch.bfloat16, device="cuda")
    votes[0, -1] = 1.0
    scores = torch.zeros(1, n, m, device="cuda", requires_grad=True)
    y = functional.soft_assignment(scores, votes)
    assert torch.allclose(y, torch.full_like(y, 1 / m))
    (grad,) = torch.autograd.grad(y[0, 0].sum(), scores)
    assert grad[0, -1, 0] > 0 and not grad[0, :-1].any()
