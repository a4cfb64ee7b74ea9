"""Straight-through Gumbel-softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute import networks

from ..._upstream import callable_as_its_class
from ..Decision import Decision


class GumbelSoftmax(Decision, networks.GumbelSoftmax):
    """``fastroute.networks.GumbelSoftmax``."""


class GumbelSoftmaxSampling(nn.Module):
    """A draw from a softmax that lets gradients through; in eval ``forward`` gives the most likely choice.

    Args:
        temperature_init: of the softmax that the gradient is of.
        hard: whether ``forward`` gives one-hot rows, or the softmax.
        hook: of the softmax's gradient.
    """

    def __init__(
        self, temperature_init: float = 1.0, hard: bool = True, hook: Callable[[Tensor], Any] | None = None
    ) -> None:
        super().__init__()
        self._hard, self._hook = hard, hook
        self.set_temperature(temperature_init)

    def set_temperature(self, temperature: float) -> None:
        """Of all draws from now on."""
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        self._temperature = temperature

    def _soft(self, logits: Tensor) -> Tensor:
        u = torch.rand_like(logits)
        soft = ((logits - (1e-20 - (u + 1e-20).log()).log()) / self._temperature).softmax(-1)
        if self._hook is not None and soft.requires_grad:
            soft.register_hook(self._hook)
        return soft

    def forward(self, logits: Tensor) -> Tensor:
        """Logits [..., K] -> one-hot rows [..., K], or the softmax."""
        if not self.training:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        soft = self._soft(logits)
        return F.one_hot(soft.argmax(-1), soft.shape[-1]) + (soft - soft.detach()) if self._hard else soft

    def sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, K] -> actions [N, 1], and ones [N, 1] whose gradient is that of the softmax there."""
        soft = self._soft(logits)
        index = soft.detach().argmax(-1, keepdim=True)
        return index, 1 + (soft - soft.detach()).gather(-1, index)


callable_as_its_class(__name__)
