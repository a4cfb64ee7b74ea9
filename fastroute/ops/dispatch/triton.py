"""The Triton backend of ``dispatch`` as the implementation of its compiled op.

Importing this module registers the implementations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Kernels, implement
from . import reference

_kernels = Kernels("dispatch")
unsupported = _kernels.unsupported


@torch.no_grad()
def _plan(actions: Tensor, modules: int) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor] | None = _kernels.plan(actions, modules)
    if made is None:  # sorting is faster
        order, offsets, beyond = reference.plan(actions, modules)[:3]
        return order, offsets, beyond
    return made


implement("_dispatch_plan_triton", _plan)
