"""What FlopCounterMode counts: the products of the definitions, forward, and twice that backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fastroute
from fastroute import use_backend
from tests.helpers import seeds
from tests.helpers.backends import HERE

B, n, m, d, h, c = 2, 7, 5, 6, 4, 3
evr = fastroute.EfficientVectorRouting


def select(**options: Any) -> nn.Module:
    class Selected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastroute.Selection(*(nn.Linear(6, 5) for _ in range(3)), **options)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.layer(x, fastroute.Initialization()(x)[1], torch.arange(12) % 3)[0]
            return made

    return Selected()


#: A layer, its inputs, and how many it takes forward.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], int]] = {
    "EfficientVectorRouting": (
        lambda: evr(n, m, d, h), ((B, n, d),), 2 * B * m * d * (3 * n + 3 * h)
    ),
    "EfficientVectorRouting, any length": (
        lambda: evr(-1, m, d, h, n_iters=3), ((B, n, d),), 2 * B * m * d * (7 * n + 5 * h)
    ),
    "GenerativeMatrixRouting": (
        lambda: fastroute.GenerativeMatrixRouting(n, m, c, d, h), ((B, n), (B, n, c, d)), 2 * B * n * m * c * d * h
    ),
    "Selection": (select, ((12, 6),), 2 * 12 * 6 * 5),
    "MoE": (lambda: fastroute.MoE(6, 8, 4), ((12, 6),), 2 * 12 * 6 * 4 + 2 * 24 * (6 * 16 + 8 * 6)),
}  # fmt: skip


@pytest.mark.parametrize("backend", [b for b in HERE if b != "reference"])  # which PyTorch counts as it computes
@pytest.mark.parametrize("name", CASES)
def test_counts(name: str, backend: str) -> None:
    build, shapes, expected = CASES[name]
    seeds.manual_seed(0)
    layer = build()
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with use_backend(backend):
        with FlopCounterMode(display=False) as forward:
            made = [t for t in tree_leaves(layer(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
        assert forward.get_total_flops() == expected
        with FlopCounterMode(display=False) as backward:
            sum(t.sum() for t in made).backward()  # type: ignore[union-attr]
    again = 2 * 24 * 6 * 16 if name == "MoE" else 0  # the hidden layer is made a second time
    assert backward.get_total_flops() == 2 * expected + again
