"""Task routing in plain PyTorch: a fixed binary mask of channels for every task (Strezoski et al. 2019).

Axes: B samples, C channels (axis 1), T tasks. A task is one for the whole batch, as the int ``task`` or a 0-d tensor
``tasks``, or one for each sample, ``tasks`` [B]; where ``tasks`` is given, ``task`` is not looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor


def live(mapping: Tensor, tasks: Tensor | None, task: int) -> Tensor:
    """[B, C] or [1, C] bool: the channels that take part. A sample whose task does not exist has none."""
    if tasks is None:
        return (mapping[task] != 0)[None]
    tasks = tasks.reshape(-1)  # an index of no axis is read as a number, which waits for a GPU
    exists = (tasks >= 0) & (tasks < mapping.shape[0])
    return (mapping != 0)[torch.where(exists, tasks, 0)] & exists[:, None]


def over(channels: Tensor, x: Tensor) -> Tensor:
    """[B or 1, C] as a view that broadcasts to x [B, C, ...]."""
    return channels[(...,) + (None,) * (x.dim() - 2)]


def split(task: int | Tensor) -> tuple[Tensor | None, int]:
    """(tasks, task), as ``live`` takes them."""
    return (task, 0) if isinstance(task, Tensor) else (None, task)


def task_mask(x: Tensor, mapping: Tensor, task: int | Tensor, relu: bool = False) -> Tensor:
    """The definition, with autograd: x where a channel takes part, 0 elsewhere, then max(., 0) if ``relu``."""
    y = torch.where(over(live(mapping, *split(task)), x), x, 0)
    return y.relu() if relu else y
