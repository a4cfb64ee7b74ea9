"""The same values in another place in memory, and the fences around it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def sliced_rows(t: Tensor) -> Tensor:
    """Rows of a wider matrix: the last axis dense, gaps of NaN between rows."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), _junk(t.dtype), dtype=t.dtype)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def transposed_batch(t: Tensor) -> Tensor:
    """The first two axes stored the other way round, as in [time, batch, features]."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 2 else t.contiguous()


def columns_first(t: Tensor) -> Tensor:
    """The last two axes stored the other way round: dense, but no row is."""
    return t.mT.contiguous().mT if t.dim() > 1 else t.contiguous()


def strided(t: Tensor) -> Tensor:
    """Every second element of the last axis of a larger tensor, NaN between."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), _junk(t.dtype), dtype=t.dtype)
    wide[..., 1::2] = t
    return wide[..., 1::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (contiguous, sliced_rows, transposed_batch, columns_first, strided)
}


def _junk(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).max


class Fenced:
    """A tensor inside a larger buffer whose margins must stay as they are.

    The margins hold NaN (the largest integer), so that reading them shows in a result, and ``intact`` sees writes.
    """

    margin = 64  #: elements either side, more than the widest vector register holds

    def __init__(self, t: Tensor) -> None:
        self._buffer = torch.full((t.numel() + 2 * self.margin,), _junk(t.dtype), dtype=t.dtype)
        self.tensor = self._buffer[self.margin : self.margin + t.numel()].view(t.shape)
        self.tensor.copy_(t)

    def intact(self) -> bool:
        margins = torch.cat([self._buffer[: self.margin], self._buffer[self.margin + self.tensor.numel() :]])
        return bool((margins.isnan() if margins.is_floating_point() else margins == _junk(margins.dtype)).all())
