"""Routing of matrix capsules, as in Heinsen (2019), "An Algorithm for Routing Capsules in All Domains", section 2.

All votes are held: this is to be read, to be compared with, and to be differentiated twice.
Axes: B batch, n input capsules, m output capsules, c rows of a capsule's matrix (d_cov), d its columns before routing
(d_inp), h its columns after (d_out).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Capsules, Outputs


class Routing(NamedTuple):
    """What the last iteration saw and made."""

    V: Tensor  # [B, n, m, c, h], the votes
    log_p: Tensor | None  # [B, n, m], None when there is one iteration
    R: Tensor  # [B, n, m]
    D_use: Tensor  # [B, n, m]
    D_ign: Tensor  # [B, n, m]
    a_out: Tensor  # [B, m]
    mu_out: Tensor  # [B, m, c, h]
    sig2_out: Tensor  # [B, m, c, h]


def votes(mu_inp: Tensor, w: Capsules) -> Tensor:
    """V_ij = mu_inp_i W_ij + B_ij."""
    return mu_inp[:, :, None] @ w.W + w.B


def log_probability(V: Tensor, mu: Tensor, sig2: Tensor, p_model: str) -> Tensor:
    """log p_ij of the votes [B, n, m], under Gaussians but for their constant, or under the soft k-means of "skm"."""
    square = (V - mu[:, None]).square()
    if p_model == "skm":
        return F.log_softmax(-square.sum((-2, -1)), -1)
    sig2 = sig2[:, None]
    return -(square / (2 * sig2)).sum((-2, -1)) - sig2.sqrt().log().sum((-2, -1))


def first_or_next(
    a_inp: Tensor,
    mu_inp: Tensor,
    before: Outputs | None,
    w: Capsules,
    *,
    p_model: str = "gaussian",
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Routing:
    """One iteration, after what ``before`` made; None: the first."""
    f = torch.sigmoid(a_inp)[..., None]
    closed = torch.zeros((), dtype=torch.bool, device=f.device) if mask is None else mask
    closed = closed.expand(*a_inp.shape, w.W.shape[1])
    nowhere = closed.all(-1, keepdim=True)
    V = votes(mu_inp.masked_fill(((f == 0) | nowhere)[..., None], 0.0), w)
    log_p = None
    scores = torch.zeros_like(V[..., 0, 0])
    if before is not None:
        log_p = log_probability(V, before.mu, before.sig2, p_model)
        scores = F.logsigmoid(before.a)[:, None] + log_p
    R = scores.masked_fill(closed & ~nowhere, -torch.inf).softmax(-1).masked_fill(closed, 0.0)
    D_use = f * R
    D_ign = (f - D_use).masked_fill(closed, 0.0)
    a_out = (w.beta_use * D_use).sum(1) - (w.beta_ign * D_ign).sum(1)
    q = D_use / (D_use.sum(1, keepdim=True) + eps)
    mu_out = torch.einsum("bij,bijch->bjch", q, V)
    sig2_out = torch.einsum("bij,bijch->bjch", q, (V - mu_out[:, None]).square()) + eps
    return Routing(V, log_p, R, D_use, D_ign, a_out, mu_out, sig2_out)


def matrix_routing(
    a_inp: Tensor,
    mu_inp: Tensor,
    w: Capsules,
    *,
    n_iters: int,
    p_model: str = "gaussian",
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Routing:
    """Route input capsules a_inp [B, n], mu_inp [B, n, c, d] to output capsules by n_iters iterations.

    ``mask``, [B, n, m] bool: True = input i may not reach output j, which is then neither used nor ignored. An input
    masked for every output contributes nothing; so does one of a_inp = -inf, whatever its matrix.
    """
    made = first_or_next(a_inp, mu_inp, None, w, p_model=p_model, eps=eps, mask=mask)
    for _ in range(n_iters - 1):
        before = Outputs(made.a_out, made.mu_out, made.sig2_out)
        made = first_or_next(a_inp, mu_inp, before, w, p_model=p_model, eps=eps, mask=mask)
    return made
