"""The plain backend of ``grouped_linear``: on sorted rows, with the gradient written out.

Axes: N rows (a plan's entries, or so many times the rows of one), K modules, F features in, O features out. Weights
and biases are K tensors [O, F] and [O], or one of each, stacked: [K, O, F] and [K, O].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, slope
from ..dispatch.contract import check_plan
from ..dispatch.reference import module_of_row
from ..host import on_host
from .reference import _each, _width

#: Where counts stay on the device, weights are gathered row by row, no more than so many bytes at a time.
GATHERED_BYTES = 1 << 28


#: One batched product, with zeros where modules have fewer rows than others, may multiply so many times too much. It
#: spares calls, which counts where no module has more rows than that (``bench/calibrate_thresholds.py``).
WASTE, BATCHED_ROWS = 4, 32


def forward(
    x: Tensor,
    take: Tensor | None,
    put: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str = "none",
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sorted row i reads x[take[i]] and writes y[put[i]] (None: i itself); rows past offsets[K] write zeros.

    Returns y and, if ``keep``, what the activation was applied to, else an empty tensor.
    """
    weights, biases = _each(weights, 3), _each(biases, 2)
    rows = x.shape[0] if take is None else take.shape[0]
    check_plan(put, offsets, rows)
    sorted_x = x if take is None or not weights else x.index_select(0, take)
    bounds = on_host(offsets)
    if not weights:
        y = _tables(biases, offsets, rows)
    elif bounds is None:
        y = _gathered(sorted_x, offsets, weights, biases)
    elif (slots := _Slots.of(offsets, bounds)) is not None:
        w, in_slots = torch.stack(tuple(weights)), slots.fill(sorted_x)
        made = (
            torch.baddbmm(torch.stack(tuple(biases))[:, None], in_slots, w.mT) if biases else torch.bmm(in_slots, w.mT)
        )
        y = slots.read(made, rows)
    else:
        y = x.new_zeros(rows, _width(weights, biases))
        for k, (start, stop) in enumerate(pairwise(bounds)):
            of_module = y[start:stop]
            if start == stop:
                continue
            if biases:
                torch.addmm(biases[k], sorted_x[start:stop], weights[k].mT, out=of_module)
            else:
                torch.mm(sorted_x[start:stop], weights[k].mT, out=of_module)
    before = y if keep else y.new_empty(0)
    if activation != "none":
        y = ACTIVATIONS[activation](y)
        if activation == "sigmoid":  # sigmoid(0) is 0.5, so dropped rows are zeroed again
            y = torch.where((torch.arange(rows, device=y.device) < offsets[-1])[:, None], y, 0)
    return _scattered(y, put), _scattered(before, put) if keep else before


def _scattered(y: Tensor, put: Tensor | None) -> Tensor:
    return y if put is None else torch.zeros_like(y).index_copy_(0, put, y)  # zeros where no row is put


class _Slots:
    """Sorted rows in [K, C] slots, C the most rows that a module has: one batched product instead of K small ones."""

    def __init__(self, at: Tensor, modules: int, capacity: int) -> None:
        self.at, self.modules, self.capacity = at, modules, capacity

    @classmethod
    def of(cls, offsets: Tensor, bounds: list[int]) -> _Slots | None:
        """None where too many slots would stay empty."""
        K, capacity = len(bounds) - 1, max(b - a for a, b in pairwise(bounds))
        if not 0 < capacity <= BATCHED_ROWS or K * capacity > WASTE * bounds[-1]:
            return None
        ids = module_of_row(offsets, bounds[-1])
        first = offsets.index_select(0, ids)
        return cls(ids * capacity + torch.arange(bounds[-1], device=offsets.device) - first, K, capacity)

    def fill(self, rows: Tensor) -> Tensor:
        """[N, F] -> [K, C, F], zeros in empty slots."""
        made = rows.new_zeros(self.modules * self.capacity, rows.shape[1])
        made.index_copy_(0, self.at, rows[: len(self.at)])
        return made.view(self.modules, self.capacity, -1)

    def read(self, slots: Tensor, rows: int) -> Tensor:
        """[K, C, O] -> [N, O], zeros in dropped rows."""
        kept = slots.flatten(0, 1).index_select(0, self.at)
        return kept if len(kept) == rows else torch.cat([kept, kept.new_zeros(rows - len(kept), kept.shape[1])])


def _gathered(x: Tensor, offsets: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Without reading a count: every row multiplies its own copy of its module's weights, some rows at a time."""
    K, N = len(weights), x.shape[0]
    ids = module_of_row(offsets, N)
    kept, ids = (ids < K)[:, None], ids.clamp(max=K - 1)
    stacked = torch.stack(tuple(weights))
    chunk = max(1, GATHERED_BYTES // max(1, stacked[0].numel() * stacked.element_size()))
    parts = [
        torch.bmm(stacked[i], part[:, :, None])[:, :, 0]
        for part, i in zip(x.split(chunk), ids.split(chunk), strict=True)
    ]
    y = torch.cat(parts)
    if biases:
        y = y + torch.stack(tuple(biases))[ids]
    return torch.where(kept, y, 0)


def _tables(biases: Sequence[Tensor], offsets: Tensor, rows: int) -> Tensor:
    """Every row its table's, zeros past offsets[K]."""
    tables = torch.cat([b.reshape(1, -1) for b in biases])
    ids = module_of_row(offsets, rows)
    return torch.where((ids < len(biases))[:, None], tables[ids.clamp(max=len(biases) - 1)], 0)


def backward(
    grad: Tensor,
    x: Tensor,
    take: Tensor | None,
    spread: Tensor | None,
    put: Tensor | None,
    offsets: Tensor,
    weights: Sequence[Tensor],
    modules: int,
    wants: tuple[bool, bool, bool],
    activation: str = "none",
    kept: Tensor | None = None,
    stacked: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of x, of every weight and of every bias, as wanted; zeros for modules without rows.

    Sorted row i's gradient of x is written at spread[i], one row for each reading of x. With ``stacked`` there is one
    gradient of weights [K, O, F] and one of biases [K, O].
    """
    weights = _each(weights, 3)
    if kept is not None:
        grad = slope(grad, kept, activation)
    g = grad if put is None else grad.index_select(0, put)
    sorted_x = x if take is None or not wants[1] else x.index_select(0, take)
    bounds = on_host(offsets)
    slots = _Slots.of(offsets, bounds) if bounds is not None else None
    if bounds is None:
        dx, dw, db = _backward_gathered(g, sorted_x, offsets, weights, modules, wants)
    elif slots is not None:
        dx, dw, db = _backward_in_slots(g, sorted_x, slots, weights, wants)
    else:
        dx, dw, db = _backward_by_module(g, sorted_x, bounds, weights, wants)
    if stacked:
        dw, db = [torch.stack(dw)] if dw else [], [torch.stack(db)] if db else []
    elif not weights:
        db = [b[None] for b in db]
    return x.new_empty(0) if dx is None else _scattered(dx, spread), dw, db


_Gradients = tuple[Tensor | None, list[Tensor], list[Tensor]]


def _backward_gathered(
    g: Tensor, x: Tensor, offsets: Tensor, weights: Sequence[Tensor], modules: int, wants: tuple[bool, bool, bool]
) -> _Gradients:
    """One product a module over all rows: dense, but nothing is read back and the order of sums is fixed.

    Other modules' rows are selected away, not multiplied by zero: what is not a number there stays there.
    """
    ids = module_of_row(offsets, g.shape[0])
    dx = forward(g, None, None, offsets, [w.mT for w in weights], ())[0] if wants[0] and weights else None
    dw, db = [], []
    for k in range(modules):
        own = (ids == k)[:, None]
        of_module = torch.where(own, g, 0)
        if wants[1]:
            dw.append(of_module.mT @ torch.where(own, x, 0))
        if wants[2]:
            db.append(of_module.sum(0))
    return dx, dw, db


def _backward_in_slots(
    g: Tensor, x: Tensor, slots: _Slots, weights: Sequence[Tensor], wants: tuple[bool, bool, bool]
) -> _Gradients:
    in_slots = slots.fill(g)
    dx = slots.read(torch.bmm(in_slots, torch.stack(tuple(weights))), len(g)) if wants[0] and weights else None
    dw = list(torch.bmm(in_slots.mT, slots.fill(x))) if wants[1] else []
    return dx, dw, list(in_slots.sum(1)) if wants[2] else []


def _backward_by_module(
    g: Tensor, x: Tensor, bounds: list[int], weights: Sequence[Tensor], wants: tuple[bool, bool, bool]
) -> _Gradients:
    dx = None
    spans = list(pairwise(bounds))
    if wants[0] and weights:
        dx = g.new_zeros(len(g), weights[0].shape[1])
        for k, (start, stop) in enumerate(spans):
            if start < stop:
                torch.mm(g[start:stop], weights[k], out=dx[start:stop])
    dw = [g[a:b].mT @ x[a:b] for a, b in spans] if wants[1] else []
    return dx, dw, [g[a:b].sum(0) for a, b in spans] if wants[2] else []
