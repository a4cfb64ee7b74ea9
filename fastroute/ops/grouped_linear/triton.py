"""The Triton backend of ``grouped_linear`` as implementations of its compiled ops.

Triton is imported by the first call. Importing this module registers the implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from ..backends import Case
from ..precision import precision_of
from ..registry import implement


@cache
def _kernels() -> Any:
    from ...kernels.grouped_linear import launch

    return launch


def refuses(case: Case) -> str | None:
    """Why the kernels would not take a case."""
    return _kernels().unsupported(case.device, case.dtype, **dict(case.sizes))


def _forward(
    x: Tensor,
    take: Tensor | None,
    put: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return _kernels().forward(
        x, take, put, offsets, weights, biases, activation, keep, precision_of((weights or biases)[0], "")
    )


def _backward(
    grad: Tensor, x: Tensor, take: Tensor | None, spread: Tensor | None, put: Tensor | None, offsets: Tensor,
    weights: Sequence[Tensor], modules: int, want_x: bool, want_weights: bool, want_biases: bool, activation: int,
    kept: Tensor | None, stacked: bool, keep_empty: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    return _kernels().backward(
        grad, x, take, spread, put, offsets, weights, modules, (want_x, want_weights, want_biases), activation, kept,
        precision_of(grad, ""),
    )  # fmt: skip


implement("_grouped_linear_triton", _forward)
implement("_grouped_linear_triton_backward", _backward)
