"""The hidden layer of a mixture of experts, with its gradient written out.

Axes: N entries, H hidden features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, TOLD_BY_VALUE, slope
from ..dtypes import accumulating


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

    def gradients(
        self, t: Tensor, w: Tensor | None, want_u: bool, want_weights: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of u and of w [N], from t [N, H], that of what was weighted; None where not wanted."""
        t = t.to(self.a.dtype)
        return self._of_u(t, w) if want_u else None, (t * self.h).sum(1) if want_weights else None

    def _of_u(self, t: Tensor, w: Tensor | None) -> Tensor:
        dh = t if w is None else t * w[:, None]
        kept = self.a if self.activation in TOLD_BY_VALUE else self.g
        if self.v is None:
            return slope(dh, kept, self.activation).to(self.dtype)
        return torch.cat([slope(dh * self.v, kept, self.activation), dh * self.a], 1).to(self.dtype)
