"""``combine``: the weighted sum over a sample's entries, in float32 for half precision.

Axes: B samples, k entries of each, M numbers in an entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import explained
from ..autograd import apply, asked_again, own, through, transformed
from ..checks import floating, shown
from ..dtypes import accumulating


def _selected(weights: Tensor, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    w = weights.to(accumulating(dtype))
    return w if valid is None else torch.where(valid, w, 0)


def _combined(z: Tensor, weights: Tensor, valid: Tensor | None) -> Tensor:
    w = _selected(weights, valid, z.dtype)
    y = z[:, 0].to(w.dtype) * w[:, 0, None]
    for j in range(1, z.shape[1]):
        y = torch.addcmul(y, z[:, j].to(w.dtype), w[:, j, None])
    return y.to(z.dtype)


def _plain(z: Tensor, weights: Tensor, valid: Tensor | None) -> list[Tensor]:
    return [_combined(z if valid is None else torch.where(valid[:, :, None], z, 0), weights, valid)]


class _Combine(torch.autograd.Function):
    """Autograd would keep a float32 copy of every entry."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, weights, valid)
        return own(_combined(z, weights, valid))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weights, valid = ctx.saved_tensors
        if asked_again(grad):
            return tuple(through(_plain, (z, weights, valid), ctx.needs_input_grad, [grad]))
        dz = d_weights = None
        w = _selected(weights, valid, z.dtype)
        g = grad.to(w.dtype)
        if ctx.needs_input_grad[0]:
            dz = torch.stack([(g * w[:, j, None]).to(z.dtype) for j in range(z.shape[1])], 1)
            if valid is not None:  # not by their zero weights, which a NaN would survive
                dz = torch.where(valid[:, :, None], dz, 0)
        if ctx.needs_input_grad[1]:
            d_weights = torch.stack([(g * z[:, j].to(w.dtype)).sum(1) for j in range(z.shape[1])], 1)
            d_weights = _selected(d_weights, valid, z.dtype).to(weights.dtype)
        return dz, d_weights, None


@explained
def combine(z: Tensor, weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """y_b = sum_j w_bj z_bj over the entries that are valid.

    Args:
        z: [B, k, ...] floating, k at least 1; zeros in entries that are not valid.
        weights: [B, k], any floating dtype. Those of entries that are not valid are not looked at.
        valid: [B, k] bool; None: all are.

    Returns:
        y [B, ...] in z's dtype, summed in the order of j, in float32 for half precision.

    Raises:
        ValueError, TypeError: naming the argument.

    Examples:
        >>> z, weights = torch.tensor([[[1.0], [10.0]]]), torch.tensor([[0.5, 0.25]])
        >>> fastroute.functional.combine(z, weights)
        tensor([[3.]])
    """
    floating("z", z)
    floating("weights", weights)
    if z.dim() < 2 or z.shape[1] < 1:
        raise ValueError(f"z: expected [B, k, ...], k at least 1, got {shown(z)}")
    for name, t in (("weights", weights), ("valid", valid)):
        if t is not None and t.shape != z.shape[:2]:
            raise ValueError(f"{name}: expected one per entry, {list(z.shape[:2])}, got {shown(t)}")
    if valid is not None and valid.dtype != torch.bool:
        raise TypeError(f"valid: expected bool, got {valid.dtype}")
    flat = z[:, :, None] if z.dim() == 2 else z.flatten(2)
    made: Tensor = _plain(flat, weights, valid)[0] if transformed() else apply(_Combine, flat, weights, valid)
    return made.reshape(z.shape[0], *z.shape[2:])
