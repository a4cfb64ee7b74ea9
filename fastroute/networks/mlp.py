"""A multi-layer perceptron under upstream's parameter names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.arguments import checked
from ..ops.checks import at_least_one, floating, shown, tensor

#: An int or several; the constructor's own check tells all of them.
Widths = Annotated[int | Sequence[int], None]


class MLP(nn.Module):
    """Linear layers with a nonlinearity between them, none after the last.

    Args:
        input_dim: features in; of a tuple the product is taken.
        output_dim: features out.
        layers: the hidden layers' widths; () for a single linear layer. Also ``hidden``.
        nonlin: between layers, a function of a tensor.

    Shapes: [..., input_dim] -> [..., output_dim]. Parameters: ``_layers.{j}.weight``, ``_layers.{j}.bias``.

    Examples:
        >>> fastroute.MLP(8, 3, hidden=(16, 16))(torch.randn(4, 8)).shape
        torch.Size([4, 3])
    """

    @checked
    def __init__(
        self,
        input_dim: Widths,
        output_dim: Widths,
        layers: Widths = (),
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
        try:
            if isinstance(input_dim, Mapping) or isinstance(layers, Mapping):
                raise TypeError("dicts")
            inputs = [input_dim] if isinstance(input_dim, SupportsIndex) else input_dim
            inner = [layers] if isinstance(layers, SupportsIndex) else layers
            features = math.prod(at_least_one("input_dim", width) for width in inputs)
            widths = [features, *(at_least_one("layers", width) for width in inner)]
            widths.append(at_least_one("output_dim", output_dim))
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"MLP: expected widths of at least 1, got input {input_dim}, layers {layers}, output {output_dim} "
                "(input_dim, layers, output_dim)"
            ) from error
        self._nonlin, self._input_dim = nonlin, features
        self._layers = nn.ModuleList(nn.Linear(a, b, device=device, dtype=dtype) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_dim] -> [..., output_dim]."""
        tensor("x", x, "a tensor [..., input_dim]")
        floating("x", x)
        if x.dim() < 1 or x.shape[-1] != self._input_dim:
            raise ValueError(f"x: expected [..., {self._input_dim}], got {shown(x)}")
        for layer in self._layers[:-1]:
            x = self._nonlin(layer(x))
        return self._layers[-1](x)
