"""The Triton backend of ``grouped_linear`` as implementations of its compiled ops.

Importing this module registers the implementations.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..precision import precision_of
from ..registry import Kernels, implement
from .contract import BackwardCall

_kernels = Kernels("grouped_linear.launch")
unsupported = _kernels.unsupported


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *_, weights, biases, _, _ = args
    return _kernels.forward(*args, precision_of((weights or biases)[0], ""))


def _backward(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    c = BackwardCall(*args)
    wants = c.want_x, c.want_weights, c.want_biases
    return _kernels.backward(*c[:8], wants, c.activation, c.kept, precision_of(c.grad, ""))


implement("_grouped_linear_triton", _forward)
implement("_grouped_linear_triton_backward", _backward)
