"""One routing iteration, written as in Heinsen (2022), "An Algorithm for Routing Vectors in Sequences", section 2.

Axes: B batch, n input vectors, m output vectors, d width of an input vector.

Every function here materialises the [B, n, m] arrays and leaves gradients to autograd. It is the truth the
other backends are checked against, and what ``return_dict=True`` shows for the last iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_over_outputs(t: Tensor) -> Tensor:
    """Over the last axis. Dynamo of torch 2.11 takes no ``partial`` as a default."""
    return torch.softmax(t, dim=-1)


class Assignment(NamedTuple):
    """The arrays of one iteration, all [B, n, m]."""

    S: Tensor | None  #: log-sigmoid scores, before the mask; None in the first iteration
    R: Tensor  #: probability that input i is routed to output j; rows sum to 1 (0 when fully masked)
    D_use: Tensor  #: share of input i used by output j
    D_ign: Tensor  #: share of input i ignored by output j
    phi: Tensor  #: net benefit less cost, the credit of input i in output j


def row_is_live(x: Tensor, lengths: Tensor) -> Tensor:
    """[B, n] bool: True for the rows before each sample's length."""
    return torch.arange(x.shape[-2], device=x.device) < lengths[:, None]


def gates(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """a_i = scale * <x_i, weight_i> + bias_i, the score of using input i at all. [B, n], before the sigmoid."""
    return scale[:, None] * (x * weight).sum(-1) + bias


def betas(x: Tensor, beta: Tensor, bias: Tensor | None) -> Tensor:
    """Net benefit (or cost) per pair: the parameter [n, m] itself, or a Linear of x when a bias [m] is given."""
    return beta if bias is None else F.linear(x, beta, bias)


def assign(
    x: Tensor,
    gate: Tensor,
    pred: Tensor | None,
    score_weight: Tensor | None,
    score_bias: Tensor | None,
    use: Tensor,
    ign: Tensor | None,
    *,
    use_bias: Tensor | None = None,
    ign_bias: Tensor | None = None,
    prior: Tensor | None = None,
    mask: Tensor | None = None,
    log_f: Callable[[Tensor], Tensor] = F.logsigmoid,
    softmax: Callable[[Tensor], Tensor] = softmax_over_outputs,
) -> Assignment:
    """The E-step (scores, softmax over *outputs*), the D-step (shares) and phi of one iteration."""
    f = gate.unsqueeze(-1)
    if pred is None:
        assert prior is not None  # the op has checked; these narrow types
        S, log_R = None, prior.log().expand(*x.shape[:-1], -1)
        R = prior.expand(*x.shape[:-1], -1)
    else:
        assert score_weight is not None and score_bias is not None
        S = log_R = log_f(x @ pred.mT * score_weight + score_bias)
        R = softmax(S)
    if mask is not None:
        shut = mask.all(-1, keepdim=True)
        R = softmax(log_R.masked_fill(mask & ~shut, -torch.inf)).masked_fill(shut, 0.0)
        f = f.expand_as(R).masked_fill(mask, 0.0)
    D_use = f * R
    D_ign = f - D_use
    phi = betas(x, use, use_bias) * D_use
    if ign is not None:
        phi = phi - betas(x, ign, ign_bias) * D_ign
    return Assignment(S, R, D_use, D_ign, phi)


def vector_routing(
    x: Tensor,
    gate: Tensor,
    pred: Tensor | None,
    score_weight: Tensor | None,
    score_bias: Tensor | None,
    use: Tensor,
    ign: Tensor | None,
    *,
    use_bias: Tensor | None = None,
    ign_bias: Tensor | None = None,
    prior: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One iteration: (M, p) with M_jd = sum_i phi_ij x_id  [B, m, d] and p_j = sum_i phi_ij  [B, m]."""
    if lengths is not None:
        live = row_is_live(x, lengths)
        x = x.masked_fill(~live[..., None], 0.0)
        gate = gate.masked_fill(~live, 0.0)
    phi = assign(
        x, gate, pred, score_weight, score_bias, use, ign, use_bias=use_bias, ign_bias=ign_bias, prior=prior, mask=mask
    ).phi
    return phi.mT @ x, phi.sum(-2)
