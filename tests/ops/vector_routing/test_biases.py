"""Biases of linear benefits and costs, in sums over many rows."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import Tensor

from fastroute import use_backend
from fastroute.functional import vector_routing
from tests.helpers import seeds
from tests.helpers.backends import needs_native

F32, F64 = torch.float32, torch.float64


@needs_native
@pytest.mark.skipif(
    platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="a processor that cannot multiply and add in one rounding",
)
def test_a_bias_is_not_rounded_alike_in_all_rows() -> None:
    """A constant added to numbers that are rounded already is rounded the same way in each of them, and p, the sum of
    all rows, collects that. Two plain sums of such numbers, made in float64, are what the kernel has to beat."""
    n, d, m = 20_000, 16, 64
    g = seeds.generator(0)
    x, use, ign = torch.randn(1, n, d, generator=g), *torch.randn(2, m, d, generator=g) / 8
    bias_use, bias_ign = (torch.rand(2, m, generator=g) - 0.5) / 16
    gate, prior = torch.rand(1, n, generator=g), torch.full((m,), 1 / m)

    def p(dtype: torch.dtype) -> Tensor:
        a, b = (x[0].to(dtype) @ w.to(dtype).T + bias.to(dtype) for w, bias in ((use, bias_use), (ign, bias_ign)))
        c = prior.to(dtype)
        return (gate[0, :, None].to(dtype) * (a * c - b * (1 - c))).double().sum(0)

    with use_backend("native"):
        made = vector_routing(x, gate, None, None, None, use, ign, use_bias=bias_use, ign_bias=bias_ign, prior=prior)[
            1
        ][0]
    exact = p(F64)
    error, plain = ((t.double() - exact).square().mean().sqrt() for t in (made, p(F32)))
    assert error < plain / 2
