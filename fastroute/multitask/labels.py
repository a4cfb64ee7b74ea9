"""Predictions, labels and masks of one task brought into one shape: the same for its loss and for its metric.

Axes: B samples, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.checks import are_alike, together
from ..ops.host import may_look, read


def shown(value: Any) -> str:
    """A value's shape or type, for messages."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def tensors(y_hat: Any, y: Any, mask: Any) -> None:
    """TypeError, ValueError: no tensors, or not on one device; predictions that are complex."""
    for name, t in (("y_hat", y_hat), ("y", y)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {shown(t)}")
    if y_hat.is_complex():
        raise TypeError(f"y_hat: expected real predictions, got {y_hat.dtype}")
    together(("y_hat", y_hat), {"y": y, "mask": mask if isinstance(mask, Tensor) else None})


def known(y: Tensor, mask: Tensor | None, ignore_index: int | None = None) -> Tensor:
    """Which labels y are there: not NaN, not ``ignore_index`` and not masked; bool of y's shape.

    Args:
        mask: of y's shape.
    """
    there = ~y.isnan() if y.is_floating_point() else torch.ones_like(y, dtype=torch.bool)
    if ignore_index is not None:
        there = there & (y != ignore_index)
    return there if mask is None else there & mask


def refuse(wrong: Tensor, y: Tensor, what: str, of: str = "") -> None:
    """ValueError: a label is wrong. Only on a CPU, as nothing is read from another device."""
    if may_look(wrong) and bool(wrong.any()):
        raise ValueError(f"y{of}: expected {what}, got {read(y[wrong])[0]}")


def like(x: Tensor, y: Tensor, of: str = "") -> Tensor:
    """Labels y in the prediction's shape. PyTorch would broadcast [B] against [B, 1] to [B, B].

    Args:
        x: predictions.
        y: labels, one for each.
        of: what messages put after an argument's name.

    Raises:
        ValueError: shapes differ by more than axes of one element.
    """
    if not are_alike(x, y):
        raise ValueError(f"y{of}: expected the prediction's shape {shown(x)}, got {shown(y)}")
    return y if y.shape == x.shape else y.reshape(x.shape)


def spread(mask: Tensor, y: Tensor, of: str = "") -> Tensor:
    """A mask in the shape of y: one of that shape but for axes of one element, or [B].

    Raises:
        TypeError: it is no bool tensor. ValueError: it has another shape.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else shown(mask)
        raise TypeError(f"mask{of}: expected a bool tensor, got {got}")
    if are_alike(mask, y):
        return mask.reshape(y.shape)
    if mask.shape == y.shape[:1]:
        mask = mask.reshape(-1, *[1] * (y.dim() - 1))
    if mask.dim() != y.dim() or not all(n == 1 or n == wanted for n, wanted in zip(mask.shape, y.shape, strict=True)):
        raise ValueError(f"mask{of}: expected the target's shape {shown(y)}, or [B], got {shown(mask)}")
    return mask.expand_as(y)


def classes(x: Tensor, y: Tensor, mask: Tensor | None, of: str = "") -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores [B, C, ...]; class indices [B, ...], or probabilities [B, C, ...] where y has those; a mask [B, ...].

    Indices come back as integers, and what is NaN among them as 0 that is masked. Scores [C] are of one sample.

    Raises:
        ValueError: y is neither; on a CPU, an index that is there is no whole number.
    """
    if x.dim() == 1:
        x, y, mask = x[None], y[None], None if mask is None else mask[None]
    if y.shape == x.shape and y.is_floating_point():
        if mask is not None:
            mask = spread(mask, y, of).all(1) if mask.shape == y.shape else spread(mask, x.select(1, 0), of)
        return x, y, mask
    if y.dim() == x.dim() > 1 and y.shape[1] == 1:
        y = y.squeeze(1)  # [B, 1] as regression targets are
    if tuple(y.shape) != (*x.shape[:1], *x.shape[2:]):
        rows = [*x.shape[:1], *x.shape[2:]]
        raise ValueError(f"y{of}: expected class indices of shape {rows} for scores {shown(x)}, got {shown(y)}")
    mask = None if mask is None else spread(mask, y, of)
    if y.is_floating_point():
        there = ~y.isnan()
        mask = there if mask is None else mask & there
        refuse(mask & ((y != y.trunc()) | y.isinf()), y, "class indices, which are whole numbers", of)
        y = torch.where(there, y, 0)
    return x, y.long(), mask
