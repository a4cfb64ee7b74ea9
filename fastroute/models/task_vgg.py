"""VGG-11 with task routing of Strezoski, van Noord and Worring (2019), also with fewer channels."""

from __future__ import annotations

from typing import Any, Literal

from ..ops.arguments import Positive, Several, checked, renamed
from ..tasks import VGG
from ..tasks.masks import Sigma
from ..tasks.vgg import cfg, make_layers


@renamed(cfg="width")
@checked
def routed_vgg(
    task_count: Several, sigma: Sigma = 0.5, *, width: Positive = 1.0, batch_norm: bool = True, **options: Any
) -> VGG:
    """VGG-11 with a task router after every convolution, its channels times ``width``.

    Strezoski, van Noord and Worring, "Many Task Learning With Task Routing", ICCV 2019 (arXiv 1903.12117).
    ``width=1`` is ``fastroute.vgg11_bn`` (``fastroute.vgg11`` without batch norm), which also loads torchvision's
    weights.

    Args:
        task_count: T.
        sigma: the fraction of channels that each task does without.
        width: the share of VGG-11's channels, 64 to 512; every layer keeps at least 4.
        batch_norm: after every convolution.
        options: of :class:`~fastroute.VGG` (``bottleneck_spatial``, ``init_weights``, ...) and ``device``, ``dtype``,
            ``generator``, ``no_orphans``, ``balanced``.

    Raises:
        ValueError, TypeError: naming the argument.

    Example::

        >>> import torch
        >>> from fastroute.models import routed_vgg
        >>> model = routed_vgg(40, width=0.25, bottleneck_spatial=(1, 1))
        >>> model(torch.randn(3, 3, 32, 32), torch.tensor([0, 7, 39])).shape
        torch.Size([3, 2])
    """
    masks = {name: options.pop(name) for name in ("generator", "no_orphans", "balanced") if name in options}
    own = {name: options[name] for name in ("device", "dtype") if name in options}
    pool: Literal["M"] = "M"
    scaled = [pool if entry == "M" else max(4, round(int(entry) * width)) for entry in cfg["A"]]
    return VGG(make_layers(scaled, task_count, sigma, batch_norm, **own, **masks), task_count, **options)
