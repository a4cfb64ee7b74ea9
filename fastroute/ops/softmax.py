"""Softmax over few numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import is_observed

#: Of a vector of ATen's; with fewer bytes in a row its softmax goes number by number.
_VECTOR_BYTES = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)
#: Rows from which on two copies cost less (0.11 ms instead of 0.31 for 1024 rows of 8, forward and backward, AVX-512).
_MANY = 256


def softmax_of_few(z: Tensor) -> Tensor:
    """``z.softmax(-1)``, contiguous; on a CPU many short rows go side by side, in vectors over rows."""
    E = z.shape[-1]
    if not z.is_cpu or is_observed(z) or E * z.element_size() >= _VECTOR_BYTES or z.numel() < _MANY * E:
        return z.softmax(-1).contiguous()
    return z.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1).contiguous()
