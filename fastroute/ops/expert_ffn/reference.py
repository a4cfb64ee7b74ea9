"""A mixture of feed-forward experts, in plain PyTorch.

Axes: B samples, k experts that each takes, N = B k entries, K experts, D features in, H hidden ones, P features out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import ACTIVATIONS


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
