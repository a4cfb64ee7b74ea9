"""The plain backend of ``policy``: the definition forward, its gradient written out.

torch.compile traces no autograd in a backward pass. Axes: N rows, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import accumulating
from .reference import clamped, shifted
from .reference import policy as forward

__all__ = ["backward", "forward"]


def backward(grad: Tensor, scores: Tensor, actions: Tensor, kind: str, temperature: float) -> Tensor:
    """The gradient of scores from that of value; written out, since torch.compile traces no autograd in a backward."""
    z, K = scores.to(accumulating(scores.dtype)), scores.shape[-1]
    taken, g = torch.arange(K, device=z.device) == actions[:, None], grad.to(z.dtype)[:, None]
    if kind == "softmax":
        made = (taken.to(z.dtype) - torch.softmax(z / temperature, -1)) * (g / temperature)
    elif kind == "score":
        made = taken * g
    else:
        lowest = z.min(-1, keepdim=True)
        weight = shifted(z)
        total, own = weight.sum(-1, keepdim=True), weight.gather(-1, actions.clamp(min=0)[:, None])
        share = own / total
        g = torch.where(share == clamped(share), g, 0)
        # the lowest score is taken from every weight: from its own, nothing is left
        of_own = torch.where(actions[:, None] == lowest.indices, 0, g / own)
        made = (taken * of_own - g / total).scatter_add(-1, lowest.indices, K * g / total - of_own)
    return torch.where((actions >= 0)[:, None], made, 0).to(scores.dtype)
