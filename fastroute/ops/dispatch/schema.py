"""``dispatch`` for the dispatcher, on each compiled backend: schema and fake.

C++ implements ``_dispatch_plan_native`` (csrc/cpu/dispatch, csrc/cuda), Triton kernels ``_dispatch_plan_triton``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import define_compiled


def _plan(actions: Tensor, modules: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(actions), actions.new_empty(modules + 1), actions.new_empty(1)


define_compiled("_dispatch_plan_{}", "(Tensor actions, int modules) -> (Tensor, Tensor, Tensor)", _plan)
