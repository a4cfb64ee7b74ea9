"""Dispatch by action in plain PyTorch: which entries go to which module.

Axes: B samples, k modules that each takes, N = B k entries (entry n is of sample n // k), K modules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..host import compares, is_exporting, read
from .contract import Plan


def plan(actions: Tensor, modules: int) -> Plan:
    """actions [N] int64 -> their plan."""
    key = torch.where((actions >= 0) & (actions < modules), actions, modules)
    N = key.shape[0]
    unique = is_exporting()  # ONNX knows no stable sort
    order = (key * N + torch.arange(N, device=key.device)).argsort() if unique else key.argsort(stable=True)
    bounds = torch.arange(modules + 1, device=actions.device)
    offsets = (key[:, None] < bounds).sum(0) if compares(key) else torch.searchsorted(key[order], bounds)
    return Plan(order, offsets, (actions >= modules).sum().reshape(1))


def bounds_of(plan: Plan) -> list[int]:
    """The offsets as numbers; on the meta device, which has none, those of entries that are spread evenly."""
    if plan.bounds is not None:
        return plan.bounds
    if plan.offsets.is_meta:
        K = plan.offsets.shape[0] - 1
        return [plan.order.shape[0] * k // K for k in range(K + 1)]
    return read(plan.offsets)


def module_of_row(offsets: Tensor, rows: int) -> Tensor:
    """[N] int64: the module of every sorted row, K for dropped ones."""
    row = torch.arange(rows, device=offsets.device)
    if compares(offsets):
        return (row[:, None] >= offsets[1:]).sum(1)
    return torch.searchsorted(offsets[1:], row, right=True)
