"""The activations that the products of modules may end with, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


#: By what may follow the product.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
}
#: The number that kernels know an activation by.
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}

#: Activations whose derivative is computed from their output; for the others the pre-activation is saved.
TOLD_BY_VALUE = ("none", "relu", "tanh", "sigmoid")


def slope(grad: Tensor, kept: Tensor, activation: str) -> Tensor:
    """grad times the activation's derivative; ``kept`` is its value, or what it was applied to (see TOLD_BY_VALUE)."""
    made = grad
    if activation == "relu":
        made = torch.where(kept <= 0, 0, grad)
    elif activation == "tanh":
        made = torch.ops.aten.tanh_backward(grad, kept)
    elif activation == "sigmoid":
        made = torch.ops.aten.sigmoid_backward(grad, kept)
    elif activation == "silu":
        made = torch.ops.aten.silu_backward(grad, kept)
    elif activation != "none":
        made = torch.ops.aten.gelu_backward(grad, kept, approximate="tanh" if activation == "gelu_tanh" else "none")
    return made
