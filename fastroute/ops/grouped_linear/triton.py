"""The Triton backend of ``grouped_linear`` as implementations of its compiled ops.

Triton is imported by the first call. Importing this module registers the implementations.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from ..backends import Case
from ..precision import precision_of
from ..registry import implement
from .contract import BackwardCall


@cache
def _kernels() -> Any:
    from ...kernels.grouped_linear import launch

    return launch


def refuses(case: Case) -> str | None:
    """Why the kernels would not take a case."""
    return _kernels().unsupported(case.device, case.dtype, **dict(case.sizes))


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *_, weights, biases, _, _ = args
    return _kernels().forward(*args, precision_of((weights or biases)[0], ""))


def _backward(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    c = BackwardCall(*args)
    wants = c.want_x, c.want_weights, c.want_biases
    return _kernels().backward(*c[:8], wants, c.activation, c.kept, precision_of(c.grad, ""))


implement("_grouped_linear_triton", _forward)
implement("_grouped_linear_triton_backward", _backward)
