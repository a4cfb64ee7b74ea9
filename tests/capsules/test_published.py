"""The papers' models have as many parameters here as they report.

arXiv 2211.11754: heads on frozen BEiT-large and RoBERTa-large; arXiv 1911.00792: the smallNORB model.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fastroute import EfficientVectorRouting, GenerativeMatrixRouting
from tests.helpers import seeds

DEPTHS, D = 25, 1024
BEIT_LARGE = 304.4e6  #: of the frozen backbone, as reported


class Head(nn.Module):
    """Hidden states [..., positions, depths, d] to scores of classes: a norm, a scale per depth, three routings."""

    def __init__(self, classes: int, device: str | None = None) -> None:
        super().__init__()
        self.normalize = nn.LayerNorm(D, elementwise_affine=False)
        self.W = nn.Parameter(torch.ones(DEPTHS, D, device=device))
        self.B = nn.Parameter(torch.zeros(DEPTHS, D, device=device))
        self.route = nn.Sequential(
            EfficientVectorRouting(-1, 64, D, D, device=device),
            EfficientVectorRouting(64, 64, D, D, device=device),
            EfficientVectorRouting(64, classes, D, 1, device=device),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x) * self.W + self.B
        return self.route(x.flatten(-3, -2)).squeeze(-1)  # type: ignore[no-any-return]


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
    made = parameters(Head(classes, device="meta"))
    assert made == count
    if millions is not None:  # the paper's figure, with the backbone, to a tenth of a million
        assert round((BEIT_LARGE + made) / 1e6, 1) == millions


def test_a_head_runs() -> None:
    seeds.manual_seed(0)
    assert Head(5)(torch.randn(2, 3, DEPTHS, D)).shape == (2, 5)


class SmallNORB(nn.Module):
    """Stereo images with two channels of coordinates [..., 4, H, W] to 5 classes: six convolutions, two routings."""

    def __init__(self, parts: int = 64, channels: int = 64, classes: int = 5) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for k, (before, after) in enumerate(pairwise([4] + [channels] * 6)):
            blocks += [nn.BatchNorm2d(before), nn.Conv2d(before, after, 3, stride=1 + k % 2), nn.SiLU()]
        self.convolve = nn.Sequential(*blocks)
        self.compute_a = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, parts, 1))
        self.compute_mu = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, parts * 16, 1))
        self.routings = nn.ModuleList(
            [GenerativeMatrixRouting(-1, parts, 4, 4, 4), GenerativeMatrixRouting(parts, classes, 4, 4, 4)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolve(x)
        a = self.compute_a(x).flatten(1)
        mu = self.compute_mu(x).unflatten(1, (-1, 4, 4)).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
        for routing in self.routings:
            a, mu, _ = routing(a, mu)
        return a  # type: ignore[no-any-return]


def test_small_norb() -> None:
    seeds.manual_seed(0)
    model = SmallNORB()
    assert parameters(model) == 271_688  # "about 272K"
    scores = model(torch.randn(2, 4, 48, 48))
    assert scores.shape == (2, 5)
    scores.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.routings.parameters())
