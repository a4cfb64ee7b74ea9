"""Batch norm, then the mask of a task, then ReLU: the definition, with autograd.

Axes: B samples, C channels (axis 1), T tasks; a task as for ``task_mask``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..task_mask.reference import task_mask


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
    """The definition, with autograd: every channel is normalised and counted, then masked, then rectified."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return task_mask(y, mapping, task, relu)
