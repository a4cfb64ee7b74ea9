"""``task_mask`` for the dispatcher, on each compiled backend: schemas and fakes.

C++ implements the ops whose names end in ``_native`` (csrc/cpu/task_mask, csrc/cuda), Triton kernels those in
``_triton``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import define_compiled

TASK = "Tensor mapping, Tensor? tasks, int task"


def _gate(g: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(g)


def _mask_(*_: Any) -> None:
    return None


for _name, _schema, _fake in (
    ("gate", f"(Tensor g, Tensor? y, {TASK}) -> Tensor", _gate),
    ("rectify", f"(Tensor x, {TASK}) -> Tensor", _gate),
    ("mask_", f"(Tensor(a!) x, {TASK}, bool relu) -> ()", _mask_),
):
    define_compiled(f"_task_mask_{_name}_{{}}", _schema, _fake, tags=(torch.Tag.needs_fixed_stride_order,))
