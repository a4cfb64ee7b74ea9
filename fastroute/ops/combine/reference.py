"""The weighted sum over a sample's entries, in plain PyTorch.

Axes: B samples, k entries of each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine(z: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """[B, k, ...] and [B, k] -> [B, ...]: y_b = sum_j w_bj z_bj over the entries that are valid."""
    by = (*weights.shape, *[1] * (z.dim() - 2))
    return torch.where(valid.reshape(by), weights.reshape(by).to(z.dtype) * z, 0).sum(1)
