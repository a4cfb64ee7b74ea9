"""RELAX."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute import networks

from ..._upstream import callable_as_its_class
from ..Decision import Decision


class RELAX(Decision, networks.RELAX):
    """``fastroute.networks.RELAX`` with upstream's estimate, whose gradients come with ``backward()``."""


def entropy(probs: Tensor) -> Tensor:
    """[N, K] probabilities -> [N]."""
    return -(probs * probs.log()).sum(1)


def make_samples(logits: Tensor, temp: float, eps: float = 1e-8) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] -> actions [N] and two relaxed choices [N, K], the second one drawn given the actions; see ``RELAX``."""
    log_p = logits.log_softmax(1)
    u1, u2 = torch.rand(2, *logits.shape, dtype=logits.dtype, device=logits.device)
    noisy = log_p - (eps - (u1 + eps).log()).log()
    actions = noisy.argmax(1)
    chosen = F.one_hot(actions, logits.shape[1]).to(logits.dtype)
    conditional = networks.RELAX._conditional(log_p, u2, chosen, upstream=True)
    return actions, (noisy / temp).softmax(1), (conditional / temp).softmax(1)


callable_as_its_class(__name__)
