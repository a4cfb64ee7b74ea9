"""What follows from an iteration's moments, for each output: ``contract`` has the equations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .contract import Moments, Outputs


def settle(made: Moments, eps: float) -> Outputs:
    """mu_j = sum_i q_ij V_ij and sig2_j = sum_i q_ij (V_ij - mu_j)^2 + eps with q = D / (N0 + eps)."""
    s = (made.N0 + eps)[..., None, None]
    S1 = made.N0[..., None, None] / s
    mu = S1 * made.mean
    return Outputs(made.a, mu, made.M2 / s + S1 * (made.mean * (eps / s)).square() + eps)


def log_prior(previous: Outputs, p_model: str) -> Tensor:
    """[B, m]: the part of l_ij that is per output."""
    prior = F.logsigmoid(previous.a)
    return prior if p_model == "skm" else prior - 0.5 * previous.sig2.log().sum((-2, -1))
