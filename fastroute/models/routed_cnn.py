"""The convolutional network with routed layers of Rosenbaum, Klinger and Riemer (2018), "Routing Networks"."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..networks import WPL, CollaborationReward, Initialization, Selection, Trajectory
from ..ops import checks
from ..ops.arguments import Count, NotNegative, Several, checked, renamed


class RoutedCNN(nn.Module):
    """Images and their tasks to logits: shared convolutions, then layers in which each task takes one module.

    Rosenbaum, Klinger and Riemer, "Routing Networks and the Adaptive Selection of Non-linear Functions for Multi-Task
    Learning", ICLR 2018 (arXiv 1711.01239), the network of the authors' example: four blocks of a convolution 3 x 3
    with 32 maps, ReLU and pooling by two; a batch norm; three routed layers of width 48, each with as many modules as
    tasks; an agent per task with a table of preferences, trained by the weighted policy learner, and rewarded with
    ``collaboration`` times the share of samples that took the same module.

    Args:
        tasks: T, also the number of modules of a layer if ``modules`` is None.
        classes: logits of a task.
        in_channels: of the images.
        image_size: H and W of the images: what the linear layers take depends on it.
        blocks: of convolutions; each halves height and width, rounded down.
        width: of the routed layers; ``channels`` of the convolutions; ``layers``, how many are routed.
        modules: K of each routed layer.
        collaboration: the reward's ratio, 0 for none.
        exploration: how often agents choose at random while they learn.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: naming the argument; images too small for the blocks.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> from fastroute import Loss, NegLossReward
        >>> from fastroute.models import RoutedCNN
        >>> model = RoutedCNN(tasks=20, classes=5)
        >>> images, tasks = torch.randn(8, 3, 32, 32), torch.randint(20, (8,))
        >>> logits, meta = model(images, tasks)
        >>> logits.shape, len(meta.records)
        (torch.Size([8, 5]), 3)
        >>> loss = Loss(nn.CrossEntropyLoss(), NegLossReward())
        >>> module_loss, routing_loss = loss(logits, meta, torch.randint(5, (8,)))
        >>> (module_loss + routing_loss).backward()
    """

    @checked
    def __init__(
        self,
        tasks: Count,
        classes: Count,
        in_channels: Count = 3,
        image_size: Count = 32,
        *,
        blocks: Several = 4,
        channels: Count = 32,
        width: Count = 48,
        layers: Several = 3,
        modules: Count | None = None,
        collaboration: NotNegative = 0.3,
        exploration: NotNegative = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        K = tasks if modules is None else modules
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        side = image_size >> blocks
        if side < 1:
            raise ValueError(f"image_size: expected at least {1 << blocks} for {blocks} blocks, got {image_size}")
        self.tasks, self.classes, self.in_channels, self.image_size = tasks, classes, in_channels, image_size
        convolutions: list[nn.Module] = []
        for before, after in pairwise([in_channels] + [channels] * blocks):
            convolutions += [nn.Conv2d(before, after, 3, padding=1, **own), nn.ReLU(), nn.MaxPool2d(2)]
        self.convolve = nn.Sequential(*convolutions, nn.BatchNorm2d(channels, **own), nn.Flatten())
        self.begin = Initialization()
        widths = [channels * side * side] + [width] * (layers - 1) + [classes]
        self.decisions = nn.ModuleList()
        for before in widths[:-1]:
            reward = CollaborationReward(collaboration, K) if collaboration else None
            self.decisions.append(
                WPL(
                    K, before, num_agents=tasks, exploration=exploration, policy_storage_type="tabular",
                    additional_reward_func=reward, **own,
                )
            )  # fmt: skip
        self.selections = nn.ModuleList(
            Selection(*(_layer(a, b, last, **own) for _ in range(K)))
            for (a, b), last in zip(pairwise(widths), [False] * (layers - 1) + [True], strict=True)
        )

    @renamed(agents="tasks")
    def forward(self, images: Tensor, tasks: Tensor) -> tuple[Tensor, Trajectory]:
        """Decide and apply, layer by layer.

        Args:
            images: [B, in_channels, image_size, image_size].
            tasks: [B] integers below T.

        Returns:
            (logits [B, classes], the trajectory, for ``Loss``).

        Raises:
            ValueError, TypeError, IndexError: naming the argument.
        """
        checks.tensor("images", images, "a tensor [B, in_channels, H, W]")
        shape = (self.in_channels, self.image_size, self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != shape:
            raise ValueError(f"images: expected [B, {', '.join(map(str, shape))}], got {checks.shown(images)}")
        checks.floating("images", images)
        x = checks.as_parameters("images", images, self, self.convolve, images)
        x, meta, _ = self.begin(x, tasks=tasks)
        for decide, select in zip(self.decisions, self.selections, strict=True):
            x, meta, actions = decide(x, meta, tasks)
            x, meta, _ = select(x, meta, actions)
        return x, meta


def _layer(before: int, after: int, last: bool, **own: Any) -> nn.Module:
    linear = nn.Linear(before, after, **own)
    return linear if last else nn.Sequential(linear, nn.ReLU())
