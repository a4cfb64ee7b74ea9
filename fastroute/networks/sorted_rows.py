"""A batch's rows in the order of a plan, and back.

Axes: B samples, k entries of each, N = B k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.autograd import apply, is_observed
from ..ops.dispatch.contract import Plan


class _Gathered(torch.autograd.Function):
    """Rows by index, each sample's k times. Its gradient is gathered, too, where autograd's adds rows to zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        made = grad.index_select(0, inverse)
        return made if ctx.k == 1 else made.view(-1, ctx.k, *made.shape[1:]).sum(1), None, None, None


class SortedRows:
    """The orders of one plan's entries."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self._inverse = plan, None

    _inverse: Tensor | None

    def _back(self) -> Tensor:
        if self._inverse is None:
            order = self.plan.order
            self._inverse = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
        return self._inverse

    def sort(self, x: Tensor) -> Tensor:
        """[N, ...]: the samples x [B, ...] of the sorted entries."""
        rows = self.plan.order if self.plan.samples is None else self.plan.samples
        if is_observed(x) or not (x.requires_grad and torch.is_grad_enabled()):
            return x.index_select(0, rows)
        return apply(_Gathered, x, rows, self._back(), self.plan.per_sample)

    def unsort(self, y: Tensor) -> Tensor:
        """y [N, ...] of the sorted entries, in the entries' own order."""
        if is_observed(y):
            return torch.zeros_like(y).index_copy(0, self.plan.order, y)
        return apply(_Gathered, y, self._back(), self.plan.order, 1)
