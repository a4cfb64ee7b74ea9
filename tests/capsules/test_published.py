"""The papers' models have as many parameters here as they report.

arXiv 2211.11754: heads on frozen BEiT-large and RoBERTa-large; arXiv 1911.00792: the smallNORB model.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastroute.models import CapsuleHead, SmallNORB
from tests.helpers import seeds

BEIT_LARGE = 304.4e6  #: of the frozen backbone, as reported


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("classes", "count", "millions"),
    [
        (1000, 8_380_777, 312.8),
        (100, 5_384_677, 309.8),
        (10, 5_085_067, 309.5),
        (5, 5_068_422, None),
        (2, 5_058_435, None),
    ],
    ids=["ImageNet", "CIFAR-100", "CIFAR-10", "SST-5", "SST-2"],
)
def test_heads(classes: int, count: int, millions: float | None) -> None:
    made = parameters(CapsuleHead(classes, device="meta"))
    assert made == count
    if millions is not None:  # the paper's figure, with the backbone, to a tenth of a million
        assert round((BEIT_LARGE + made) / 1e6, 1) == millions


def test_a_head_runs() -> None:
    seeds.manual_seed(0)
    assert CapsuleHead(5)(torch.randn(2, 3, 25, 1024)).shape == (2, 5)


def test_small_norb() -> None:
    seeds.manual_seed(0)
    model = SmallNORB()
    assert parameters(model) == 271_688  # "about 272K"
    scores = model(torch.randn(2, 2, 48, 48))
    assert scores.shape == (2, 5)
    scores.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.routings.parameters())
