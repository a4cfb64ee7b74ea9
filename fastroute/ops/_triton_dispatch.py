"""The Triton backend of ``dispatch`` and ``grouped_linear`` as implementations of their compiled ops.

Triton is imported by the first call, not before. Importing this module registers the implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._backends import Case, interpreting
from ._registry import library
from .vector_routing import precision_of


@cache
def _plans() -> Any:
    from ..kernels import dispatch

    return dispatch


@cache
def _products() -> Any:
    from ..kernels import grouped_linear

    return grouped_linear


def dispatch_refuses(case: Case) -> str | None:
    """Why the kernels of plans would not take a case."""
    why: str | None = _plans().unsupported(case.device, **dict(case.sizes))
    return why


def grouped_linear_refuses(case: Case) -> str | None:
    """Why the kernels of products would not take a case."""
    why: str | None = _products().unsupported(case.device, case.dtype, **dict(case.sizes))
    return why


def _plan(actions: Tensor, modules: int) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor] = _plans().plan(actions, modules)
    return made


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
    made: tuple[Tensor, Tensor] = _products().forward(
        x, take, put, offsets, weights, biases, activation, keep, precision_of((weights or biases)[0], "")
    )
    return made


def _backward(
    grad: Tensor, x: Tensor, take: Tensor | None, spread: Tensor | None, put: Tensor | None, offsets: Tensor,
    weights: Sequence[Tensor], modules: int, want_x: bool, want_weights: bool, want_biases: bool, activation: int,
    kept: Tensor | None, stacked: bool, keep_empty: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    made: tuple[Tensor, list[Tensor], list[Tensor]] = _products().backward(
        grad, x, take, spread, put, offsets, weights, modules, (want_x, want_weights, want_biases), activation, kept,
        precision_of(grad, ""),
    )  # fmt: skip
    return made


for _key in ("CUDA", "CPU") if interpreting() else ("CUDA",):
    for _name, _function in (
        ("_dispatch_plan_triton", _plan),
        ("_grouped_linear_triton", _forward),
        ("_grouped_linear_triton_backward", _backward),
    ):
        library.impl(_name, torch.no_grad()(_function), _key)
