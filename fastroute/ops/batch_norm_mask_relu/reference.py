"""Batch norm, then the mask of a task, then ReLU: the definition, with autograd.

Axes: B samples, C channels (axis 1), T tasks; a task as for ``task_mask``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..task_mask.reference import live, over, split, task_mask


def batch_norm_mask_relu(
    x: Tensor,
    mapping: Tensor,
    task: int | Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool = True,
) -> Tensor:
    """The definition, with autograd: every channel is normalised and counted, then masked, then rectified.

    What is masked has a gradient of zero, whatever it holds: it is detached, and in evaluation, where it is not
    counted, it is 0.
    """
    alive = live(mapping, *split(task))
    ever = alive.any(0)
    x = torch.where(over(ever[None], x), x, x.detach()) if training else torch.where(over(alive, x), x, 0)
    weight, bias = (None if t is None else torch.where(ever, t, t.detach()) for t in (weight, bias))
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return task_mask(y, mapping, task, relu)
