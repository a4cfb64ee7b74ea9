"""Soft assignment of inputs to outputs, and the outputs' sums of what the inputs vote for.

Heinsen (2022), section 2, the D and M steps of any routing; with weighted means, Locatello et al. (2020), Algorithm 1.
Axes: B batch, n inputs (r rows of a tile), m outputs, h width of a vote. Votes come as [B, n, m, h]; an axis B or m of
size 1 is shared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Pairs, Shares


def share(
    scores: Tensor | None, gate: Tensor, use: Tensor | None, ign: Tensor | None, prior: Tensor | None,
    mask: Tensor | None,
) -> Shares:  # fmt: skip
    """R, D and phi, written as in the paper. gate [B, n]."""
    f = gate.unsqueeze(-1)
    if scores is None:
        assert prior is not None  # the op has checked
        scores = prior.log().expand(*gate.shape, -1)
        R = prior.expand(*gate.shape, -1)
    else:
        R = scores.softmax(-1)
    if mask is not None:
        shut = mask.all(-1, keepdim=True)
        R = scores.masked_fill(mask, -torch.inf).masked_fill(shut, 0.0).softmax(-1).masked_fill(shut, 0.0)
        f = f.expand_as(R).masked_fill(mask, 0.0)
    D_use = f * R
    D_ign = f - D_use
    phi = D_use if use is None else use * D_use
    return Shares(R, D_use, D_ign, phi if ign is None else phi - ign * D_ign)


def soft_assignment(votes: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """M_jh = sum_i w_ij V_ijh [B, m, h] and p_j = sum_i w_ij [B, m], with w = phi + eps where a pair is open."""
    scores, gate, use, ign, prior, mask, lengths, eps = pairs
    known = scores if scores is not None else gate
    assert known is not None
    B, n = known.shape[:2]
    gate = known.new_ones(B, n) if gate is None else gate
    if lengths is not None:
        live = torch.arange(n, device=known.device) < lengths[:, None]
        gate = gate.masked_fill(~live, 0.0)
        scores = None if scores is None else scores.masked_fill(~live[..., None], 0.0)
        if votes.shape[0] == B:
            votes = votes.masked_fill(~live[..., None, None], 0.0)
    w = share(scores, gate, use, ign, prior, mask).phi
    if eps:
        spare = torch.full_like(w, eps)
        spare = spare if mask is None else spare.masked_fill(mask, 0.0)
        w = w + (spare if lengths is None else spare.masked_fill(~live[..., None], 0.0))
    return (w[..., None] * votes).sum(1), w.sum(1)
