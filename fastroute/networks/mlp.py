"""A multi-layer perceptron under upstream's parameter names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear layers with a nonlinearity between them, none after the last.

    Args:
        input_dim: features in; of a tuple the product is taken.
        output_dim: features out.
        layers: the hidden layers' widths; () for a single linear layer. Also ``hidden``.
        nonlin: between layers, a function of a tensor.

    Shapes: [..., input_dim] -> [..., output_dim]. Parameters: ``_layers.{j}.weight``, ``_layers.{j}.bias``.
    """

    def __init__(
        self,
        input_dim: int | Sequence[int],
        output_dim: int,
        layers: Sequence[int] = (),
        nonlin: Callable[[Tensor], Tensor] = F.relu,
        *,
        hidden: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden is not None:
            if layers != ():
                raise TypeError(f"MLP: expected layers or hidden, got both, {layers} and {hidden}")
            layers = hidden
        features = input_dim if isinstance(input_dim, int) else math.prod(input_dim)
        widths = [features, *([layers] if isinstance(layers, int) else layers), output_dim]
        if any(not isinstance(w, int) or isinstance(w, bool) or w < 1 for w in widths):
            raise ValueError(
                f"MLP: expected widths of at least 1, got input {input_dim}, layers {layers}, output {output_dim}"
            )
        self._nonlin = nonlin
        self._layers = nn.ModuleList(nn.Linear(a, b, device=device, dtype=dtype) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_dim] -> [..., output_dim]."""
        for layer in self._layers[:-1]:
            x = self._nonlin(layer(x))
        made: Tensor = self._layers[-1](x)
        return made
