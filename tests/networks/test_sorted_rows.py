"""A batch's rows in a plan's order and back: values, and gradients of all kinds, beside plain indexing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastroute.networks.sorted_rows import SortedRows
from fastroute.ops.dispatch.op import plan
from tests.helpers import seeds

ACTIONS = torch.tensor([2, -1, 0, 0, 2, -1, 1, 0])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_as_plain_indexing(k: int, shape: tuple[int, ...]) -> None:
    seeds.manual_seed(0)
    made = plan(ACTIONS, 3)
    B, samples = len(ACTIONS) // k, made.order // k
    if k > 1:
        made = made._replace(samples=samples, per_sample=k)
    x = torch.randn(B, *shape, dtype=torch.float64, requires_grad=True)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = SortedRows(made)
        there = rows.sort(x)
        return there, rows.unsort(there.sin())

    there, back = both(x)
    assert torch.equal(there, x[samples]) and torch.equal(back, x.detach().repeat_interleave(k, 0).sin())
    assert torch.equal(SortedRows(made).sort(x.detach()), there.detach())
    g = torch.randn_like(back)
    found = torch.autograd.grad(back, x, g, create_graph=True)[0]
    torch.testing.assert_close(found, g.view(B, k, *shape).sum(1) * x.cos())
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], -g.view(B, k, *shape).sum(1) * x.sin())
    many = torch.randn(3, *back.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(both(x)[1], x, many, is_grads_batched=True)
    torch.testing.assert_close(batched, many.view(3, B, k, *shape).sum(2) * x.detach().cos())
    torch.testing.assert_close(torch.func.grad(lambda x: (both(x)[1] * g).sum())(x.detach()), found.detach())
