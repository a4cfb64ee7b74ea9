"""The Triton backend of ``task_mask`` as implementations of its compiled ops.

Importing this module registers the implementations.
"""

from __future__ import annotations

from torch import Tensor

from ..registry import Kernels, implement
from . import plain

_kernels = Kernels("task_mask")


def _gate(g: Tensor, y: Tensor | None, mapping: Tensor, tasks: Tensor | None, task: int) -> Tensor:
    made: Tensor | None = _kernels.gate(g, y, mapping, tasks, task)
    return plain.gate(g, y, mapping, tasks, task) if made is None else made


def _rectify(x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int) -> Tensor:
    made: Tensor | None = _kernels.rectify(x, mapping, tasks, task)
    return plain.rectify(x, mapping, tasks, task) if made is None else made


def _mask_(x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int, relu: bool) -> None:
    if not _kernels.mask_(x, mapping, tasks, task, relu):
        plain.mask_(x, mapping, tasks, task, relu)


implement("_task_mask_gate_triton", _gate, anywhere=True)
implement("_task_mask_rectify_triton", _rectify, anywhere=True)
implement("_task_mask_mask__triton", _mask_, anywhere=True)
