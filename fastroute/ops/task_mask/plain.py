"""The plain backend of ``task_mask``, whose gradient is a mask again.

Axes: B samples, C channels (axis 1), T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import live, over


def rectify(x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int) -> Tensor:
    """max(x, 0) in live channels, 0 in dead ones; in the layout of x."""
    return gate(x, None, mapping, tasks, task).relu_()


def gate(g: Tensor, y: Tensor | None, mapping: Tensor, tasks: Tensor | None, task: int) -> Tensor:
    """g in live channels where y > 0 (everywhere, without y), 0 elsewhere. It masks, and is its own gradient."""
    dead = ~over(live(mapping, tasks, task), g)
    made = torch.empty_like(g).copy_(g)  # masked_fill would lose the layout
    return made.masked_fill_(dead if y is None else dead | (y <= 0), 0)


def mask_(x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int, relu: bool) -> None:
    """``gate(x, None)`` or ``rectify(x)``, written into x."""
    x.masked_fill_(~over(live(mapping, tasks, task), x), 0)
    if relu:
        x.relu_()
