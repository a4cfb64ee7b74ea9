"""The network for smallNORB of Heinsen (2019), "An Algorithm for Routing Capsules in All Domains"."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..capsules import GenerativeMatrixRouting
from ..ops import checks
from ..ops.arguments import Count, OutputCapsules, Several, checked


class SmallNORB(nn.Module):
    """Pairs of images to scores of classes: six convolutions, then capsules of 4 x 4 routed twice.

    Heinsen (2019, arXiv 1911.00792), section 4.1. Channels of coordinates from -1 to 1 are put beside the images;
    convolutions are 3 x 3 with strides 1, 2, 1, 2, 1, 2, each after a batch norm and before a SiLU; at every position
    that remains, ``parts`` capsules are routed, as many as there are, to ``parts`` ones, and these to one per class. It
    has 271,688 parameters as published (the paper says 272 K).

    Args:
        classes: how many scores, at least 2.
        views: images of a sample: 2 for a stereo pair, 1 for one image.
        parts: capsules at a position, and of the first routing's output.
        channels: of the convolutions.
        n_iters: iterations of each routing.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: naming the argument.

    Example::

        >>> import torch
        >>> from fastroute.models import SmallNORB
        >>> model = SmallNORB()
        >>> sum(p.numel() for p in model.parameters())
        271688
        >>> model(torch.rand(2, 2, 48, 48)).shape
        torch.Size([2, 5])
    """

    @checked
    def __init__(
        self,
        classes: OutputCapsules = 5,
        views: Count = 2,
        *,
        parts: OutputCapsules = 64,
        channels: Count = 64,
        n_iters: Several = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        self.views = views
        blocks: list[nn.Module] = []
        for k, (before, after) in enumerate(pairwise([views + 2] + [channels] * 6)):
            blocks += [nn.BatchNorm2d(before, **own), nn.Conv2d(before, after, 3, stride=1 + k % 2, **own), nn.SiLU()]
        self.convolve = nn.Sequential(*blocks)
        self.compute_a = nn.Sequential(nn.BatchNorm2d(channels, **own), nn.Conv2d(channels, parts, 1, **own))
        self.compute_mu = nn.Sequential(nn.BatchNorm2d(channels, **own), nn.Conv2d(channels, parts * 16, 1, **own))
        self.routings = nn.ModuleList(
            [
                GenerativeMatrixRouting(-1, parts, 4, 4, 4, n_iters=n_iters, **own),
                GenerativeMatrixRouting(parts, classes, 4, 4, 4, n_iters=n_iters, **own),
            ]
        )

    def forward(self, images: Tensor) -> Tensor:
        """Scores of classes, before the softmax.

        Args:
            images: [B, views, H, W], H and W at least 29; the paper's are 48.

        Returns:
            [B, classes].

        Raises:
            ValueError, TypeError: naming the argument.
        """
        checks.tensor("images", images, "a tensor [B, views, H, W]")
        checks.floating("images", images)
        if images.dim() != 4 or images.shape[1] != self.views or min(images.shape[2:]) < 29:
            expected = f"[B, {self.views}, H, W], H and W at least 29"
            raise ValueError(f"images: expected {expected}, got {checks.shown(images)}")
        B, _, H, W = images.shape
        rows = torch.linspace(-1, 1, H, device=images.device, dtype=images.dtype).view(1, 1, H, 1).expand(B, 1, H, W)
        columns = torch.linspace(-1, 1, W, device=images.device, dtype=images.dtype).view(1, 1, 1, W).expand(B, 1, H, W)
        placed = torch.cat([images, rows, columns], 1)
        x = checks.as_parameters("images", images, self, self.convolve, placed)
        a = self.compute_a(x).flatten(1)
        mu = self.compute_mu(x).unflatten(1, (-1, 4, 4)).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
        for routing in self.routings:
            a, mu, _ = routing(a, mu)
        return a
