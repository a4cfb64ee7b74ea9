"""A mixture of feed-forward experts, in plain PyTorch.

Axes: B samples, k experts that each takes, N = B k entries, K experts, D features in, H hidden ones, P features out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grouped_linear import ACTIVATIONS, TOLD_BY_VALUE, slope
from .policy import accumulating


def expert_ffn(
    x: Tensor,
    actions: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str = "silu",
    gated: bool = True,
) -> Tensor:
    """y_b = sum_j w_bj W_out,a h(W_in,a x_b), a = actions_bj, without the entries that name no expert: the definition.

    h(u) = act(g) * v with [g, v] = u if ``gated`` (Shazeer 2020, arXiv 2002.05202), else act(u).
    """
    y = x.new_zeros(x.shape[0], w_out.shape[1])
    for e in range(w_in.shape[0]):
        u = x @ w_in[e].mT
        if gated:
            g, v = u.chunk(2, -1)
            h = ACTIVATIONS[activation](g) * v
        else:
            h = ACTIVATIONS[activation](u)
        made = h @ w_out[e].mT
        for j in range(actions.shape[1]):
            y = y + torch.where((actions[:, j] == e)[:, None], weights[:, j, None].to(made.dtype) * made, 0)
    return y


class Hidden:
    """h(u) for the sorted entries' u [N, 2H] or [N, H], in float32 for half precision."""

    def __init__(self, u: Tensor, activation: str, gated: bool) -> None:
        self.dtype, self.activation = u.dtype, activation
        u = u.to(accumulating(u.dtype))
        self.g: Tensor
        self.v: Tensor | None
        self.g, self.v = u.chunk(2, -1) if gated else (u, None)
        self.a = ACTIVATIONS[activation](self.g)
        self.h = self.a if self.v is None else self.a * self.v

    def weighted(self, w: Tensor | None) -> Tensor:
        """[N, H]: w_n h_n, rounded once. w [N] in ``accumulating`` dtype."""
        return (self.h if w is None else self.h * w[:, None]).to(self.dtype)

    def backward(self, t: Tensor, w: Tensor | None) -> Tensor:
        """The gradient of u, from t [N, H], that of what was weighted: dh = w t."""
        dh = t if w is None else t * w[:, None]
        kept = self.a if self.activation in TOLD_BY_VALUE else self.g
        if self.v is None:
            return slope(dh, kept, self.activation).to(self.dtype)
        return torch.cat([slope(dh * self.v, kept, self.activation), dh * self.a], 1).to(self.dtype)

    def weights_backward(self, t: Tensor) -> Tensor:
        """[N], the gradient of w: <t, h>."""
        return (t * self.h).sum(1)
