"""Task routing in plain PyTorch: a fixed binary mask of channels for every task (Strezoski et al. 2019).

Axes: B samples, C channels (axis 1), T tasks. A task is one for the whole batch, as the int ``task`` or a 0-d tensor
``tasks``, or one for each sample, ``tasks`` [B]; where ``tasks`` is given, ``task`` is not looked at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def sum_dtype(x: Tensor) -> torch.dtype:
    """What statistics are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _split(task: int | Tensor) -> tuple[Tensor | None, int]:
    return (task, 0) if isinstance(task, Tensor) else (None, task)


def task_mask(x: Tensor, mapping: Tensor, task: int | Tensor, relu: bool = False) -> Tensor:
    """The definition, with autograd: x where a channel takes part, 0 elsewhere, then max(., 0) if ``relu``."""
    y = torch.where(over(live(mapping, *_split(task)), x), x, 0)
    return y.relu() if relu else y


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


# ----------------------------------------------------------------------------- the op's contract (backend "reference")


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


def batch_norm(
    x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int, running_mean: Tensor | None,
    running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float,
    eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean [C], 1 / deviation [C] of the batch; empty when not training). Running statistics are written."""
    y, mean, scale = torch.native_batch_norm(
        x, weight, bias, running_mean, running_var, training, momentum, eps
    )  # fmt: skip
    mask_(y, mapping, tasks, task, relu)
    return y, mean, scale


def batch_norm_backward(
    g: Tensor, x: Tensor, y: Tensor | None, mapping: Tensor, tasks: Tensor | None, task: int,
    running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    scale: Tensor, training: bool, eps: float, relu: bool, want_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (empty, where it is not wanted), weight and bias (of no use, where there is none)."""
    g = gate(g, y if relu else None, mapping, tasks, task)
    wants = [want_x, weight is not None, bias is not None]
    dx, dw, db = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, running_mean, running_var, mean, scale, training, eps, wants
    )
    return tuple(x.new_empty(0) if t is None else t for t in (dx, dw, db))  # type: ignore[return-value]
