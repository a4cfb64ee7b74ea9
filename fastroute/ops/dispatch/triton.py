"""The Triton backend of ``dispatch`` as the implementation of its compiled op.

Triton is imported by the first call. Importing this module registers the implementations.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..backends import Case
from ..registry import implement
from . import reference


@cache
def _kernels() -> Any:
    from ...kernels import dispatch

    return dispatch


def refuses(case: Case) -> str | None:
    """Why the kernels would not take a case."""
    return _kernels().unsupported(case.device, **dict(case.sizes))


@torch.no_grad()
def _plan(actions: Tensor, modules: int) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor] | None = _kernels().plan(actions, modules)
    if made is None:  # sorting is faster
        order, offsets, beyond = reference.plan(actions, modules)[:3]
        return order, offsets, beyond
    return made


implement("_dispatch_plan_triton", _plan)
