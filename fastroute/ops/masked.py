"""What a mask leaves out is left out before anything is computed from it.

0 times NaN is NaN: a result that is zeroed afterwards still has a gradient. Selecting x first selects its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def only(x: Tensor, kept: Tensor | None, others: Tensor | float = 0) -> Tensor:
    """x with ``others`` where ``kept``, bool of x's first axes, is False.

    What stood there reaches nothing, and no gradient reaches it. None: all of x is kept.
    """
    if kept is None:
        return x
    return torch.where(kept.reshape(*kept.shape, *[1] * (x.dim() - kept.dim())), x, others)


def reaching(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, n, ...] with zeros for inputs that a mask [B, n, m] lets reach no output."""
    return x if mask is None else only(x, reaches(mask))


def reaches(mask: Tensor) -> Tensor:
    """[B, n] bool: inputs that a mask [B, n, m] of pairs, True for masked ones, lets reach some output."""
    if mask.stride(-1) == 0:  # expanded: the same for all outputs
        return ~mask[..., 0]
    return ~mask.all(-1)
