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


def _parts(u: Tensor, activation: str, gated: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is activated, its activation, and what that is multiplied by; in the dtype that sums are made in."""
    u = u.to(accumulating(u.dtype))
    g, v = u.chunk(2, -1) if gated else (u, None)
    return g, ACTIVATIONS[activation](g), v


def hidden(u: Tensor, w: Tensor | None, activation: str, gated: bool) -> Tensor:
    """[N, H]: w_n h(u_n), rounded once. w [N] as in ``accumulating`` dtype."""
    _, a, v = _parts(u, activation, gated)
    h = a if v is None else a * v
    return (h if w is None else h * w[:, None]).to(u.dtype)


def hidden_backward(
    t: Tensor, u: Tensor, w: Tensor | None, activation: str, gated: bool, want_w: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of u and of w, from t [N, H], what comes back to h before w: d(w h) = t, so dw = <t, h>, dh = w t."""
    g, a, v = _parts(u, activation, gated)
    t = t.to(a.dtype)
    dw = None
    if want_w:
        h = a if v is None else a * v
        dw = (t * h).sum(1)
    dh = t if w is None else t * w[:, None]
    kept = a if activation in TOLD_BY_VALUE else g
    if v is None:
        return slope(dh, kept, activation).to(u.dtype), dw
    return torch.cat([slope(dh * v, kept, activation), dh * a], 1).to(u.dtype), dw
