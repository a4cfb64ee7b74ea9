"""Straight-through Gumbel-softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute import networks

from ..._upstream import callable_as_its_class
from ..Decision import Decision


class GumbelSoftmax(Decision, networks.GumbelSoftmax):
    """``fastroute.networks.GumbelSoftmax``."""


class GumbelSoftmaxSampling(nn.Module):
    """A draw from a softmax that lets gradients through; in eval the most likely choice.

    Args:
        temperature: of the softmax that the gradient is of.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        self.temperature = temperature

    def forward(self, logits: Tensor) -> Tensor:
        """Logits [..., K] -> one-hot rows [..., K]."""
        if self.training:
            return F.gumbel_softmax(logits, self.temperature, hard=True)
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)


callable_as_its_class(__name__)
