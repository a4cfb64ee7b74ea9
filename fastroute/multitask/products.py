"""The products of many small networks on one input.

Axes: T networks, N rows, F features, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def together(x: Tensor, weight: Tensor, bias: Tensor | None, T: int) -> Tensor:
    """Every network's linear map of the same rows: one product.

    Args:
        x: [N, F].
        weight: [T O, F]. bias: [T O].

    Returns:
        [T, N, O], a view of [N, T, O].
    """
    return F.linear(x, weight, bias).view(x.shape[0], T, -1).transpose(0, 1)


def each(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every network's linear map of its own rows: one batched product.

    Args:
        h: [T, N, F].
        weight: [T, O, F]. bias: [T, O].

    Returns:
        [T, N, O].
    """
    turned = weight.transpose(1, 2)
    if bias is None:
        return torch.bmm(h, turned)
    return torch.baddbmm(bias.unsqueeze(1), h, turned)
