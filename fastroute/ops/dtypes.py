"""The dtypes that sums are kept in."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulating(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, softmax, statistics and weights, for inputs of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sums(*tensors: Tensor | None) -> torch.dtype:
    """float64 if one of the tensors is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
