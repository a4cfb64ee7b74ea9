"""Collectives with a gradient, each in two halves, so that what is computed in between overlaps with them.

All are functional collectives of PyTorch (``torch.ops._c10d_functional``), which torch.compile takes into its graphs.

Axes: W ranks of a group, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Splits = Sequence[int]


def _all_to_all(x: Tensor, out: Splits, given: Splits, group: str) -> Tensor:
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), list(out), list(given), group)


def _waited(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


def sum_of(x: Tensor, group: str) -> Tensor:
    """The sum over ranks, without a gradient."""
    return _waited(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group))


def rows_of_all(x: Tensor, ranks: int, group: str) -> Tensor:
    """[...] -> [W, ...], without a gradient."""
    made = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous()[None], ranks, group)
    return _waited(made)


def swap(x: Tensor, out: Splits, given: Splits, group: str) -> Tensor:
    """All-to-all of rows, without a gradient: ``given[r]`` of them go to rank r, ``out[r]`` come from it."""
    return _waited(_all_to_all(x, out, given, group))


class _Swapped(torch.autograd.Function):
    """``swap`` with a gradient, for second derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Splits, given: Splits, group: str) -> Tensor:
        ctx.splits = out, given, group
        return swap(x, out, given, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        out, given, group = ctx.splits
        return _Swapped.apply(grad, given, out, group), None, None, None


class _Begun(torch.autograd.Function):
    """All-to-all, begun. Backward is the end of the opposite one.

    The graph goes through a stand-in of x's shape: what is on its way back has that, and what is on its way there not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tie: Tensor, out: Splits, given: Splits, group: str) -> tuple[Tensor, Tensor]:
        moving = _all_to_all(x, out, given, group)
        ctx.mark_non_differentiable(moving)
        return moving, x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Any, ...]:
        made = grad if torch.is_grad_enabled() else _waited(grad)
        return made, grad.new_zeros(()), None, None, None


class _Ended(torch.autograd.Function):
    """All-to-all, waited for. Backward begins the opposite one, whatever became of the rows on this rank."""

    @staticmethod
    def forward(
        ctx: Any, moving: Tensor, stand_in: Tensor, out: Splits, given: Splits, group: str
    ) -> tuple[Tensor, Tensor]:
        ctx.splits = out, given, group
        made = _waited(moving)
        return made.view_as(made), moving.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor, tie: Tensor) -> tuple[Any, ...]:
        out, given, group = ctx.splits
        again = torch.is_grad_enabled()
        made = _Swapped.apply(grad, given, out, group) if again else _all_to_all(grad, given, out, group)
        return None, made, None, None, None


class Moving(NamedTuple):
    """Rows on their way."""

    rows: Tensor
    stand_in: Tensor


def begin(x: Tensor, tie: Tensor, out: Splits, given: Splits, group: str) -> Moving:
    """Begin an all-to-all of rows: ``given[r]`` go to rank r, ``out[r]`` come from it. To be given to :func:`end`.

    Args:
        tie: [] that requires a gradient on all ranks or on none: then so does the result, so that all ranks take part
            in backward, also those without a row.
    """
    return Moving(*_Begun.apply(x, tie, out, given, group))


def end(moving: Moving, out: Splits, given: Splits, group: str) -> tuple[Tensor, Tensor]:
    """(the rows, a tie to be given to what is begun with what is made of them)."""
    return _Ended.apply(*moving, out, given, group)


class _Spread(torch.autograd.Function):
    """A row for each entry. Backward sums a sample's entries in their order: no atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, entries: Tensor, per_sample: int) -> Tensor:
        ctx.save_for_backward(entries)
        ctx.shape, ctx.per_sample = x.shape, per_sample
        return x.index_select(0, entries if per_sample == 1 else entries // per_sample)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (entries,), k = ctx.saved_tensors, ctx.per_sample
        made = placed(grad, entries, ctx.shape[0] * k)
        return (made if k == 1 else made.view(ctx.shape[0], k, *ctx.shape[1:]).sum(1)), None, None


def spread(x: Tensor, entries: Tensor, per_sample: int) -> Tensor:
    """[B, ...] -> [n, ...]: the samples of entries [n] int64, entry e being of sample e // per_sample."""
    return _Spread.apply(x, entries, per_sample)


def placed(y: Tensor, entries: Tensor, count: int) -> Tensor:
    """[n, ...] -> [count, ...]: every row at its entry, zeros elsewhere."""
    return y.new_zeros(count, *y.shape[1:]).index_copy(0, entries, y)


class _Part(torch.autograd.Function):
    """Of what all ranks have, this rank's chunk of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, rank: int, group: str) -> Tensor:
        ctx.options = x.shape[0], ranks, rank, group
        size, first = _chunk(x.shape[0], ranks, rank)
        return x.narrow(0, first, size).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Whole.apply(grad, *ctx.options), None, None, None


class _Whole(torch.autograd.Function):
    """All ranks' chunks together. The loss is the same on all ranks, so that backward takes the own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, ranks: int, rank: int, group: str) -> Tensor:
        ctx.options = ranks, rank, group
        full = -(-rows // ranks)
        padded = x.new_zeros(full, *x.shape[1:])
        padded[: x.shape[0]] = x
        return rows_of_all(padded, ranks, group).flatten(0, 1)[:rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Part.apply(grad, *ctx.options), None, None, None, None


def _chunk(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """How many, from where: those of torch.chunk, and so of ``Shard``."""
    full = -(-rows // ranks)
    first = min(rank * full, rows)
    return min(full, rows - first), first


def bounds_by_rank(rows: int, ranks: int) -> tuple[int, ...]:
    """[W + 1]: rank r has the rows from bounds[r] up to bounds[r + 1], as ``Shard(0)`` gives them out."""
    return (*(_chunk(rows, ranks, r)[1] for r in range(ranks)), rows)


def part(x: Tensor, ranks: int, rank: int, group: str) -> Tensor:
    """[B, ...], the same on all ranks -> this rank's chunk; its gradient is gathered."""
    return _Part.apply(x, ranks, rank, group)


def whole(x: Tensor, rows: int, ranks: int, rank: int, group: str) -> Tensor:
    """This rank's chunk -> all [rows, ...], on all ranks."""
    return _Whole.apply(x, rows, ranks, rank, group)


class _Copied(torch.autograd.Function):
    """x itself, the same on all ranks. Each rank uses a part of it, so gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> tuple[Tensor, Tensor]:
        ctx.group = group
        return x.view_as(x), x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor, tie: Tensor) -> tuple[Any, ...]:
        return _Summed.apply(grad, tie, ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum over ranks, which all have; each rank's part has its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tie: Tensor, group: str) -> Tensor:
        ctx.group = group
        return sum_of(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Copied.apply(grad, ctx.group)[0], grad.new_zeros(()), None


def copied(x: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """(x, the same on all ranks, a tie as of :func:`end`); the gradient is the sum over ranks."""
    return _Copied.apply(x, group)


def summed(x: Tensor, tie: Tensor, group: str) -> Tensor:
    """The sum over ranks, the same on all; the gradient is the output's."""
    return _Summed.apply(x, tie, group)


class _Mean(torch.autograd.Function):
    """A parameter; of its gradient 1 / parts, and the mean over a group of replicas."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, parts: int, replicas: int, group: str) -> Tensor:
        ctx.options = parts, replicas, group
        ctx.set_materialize_grads(replicas > 1)  # replicas wait for each other
        return p.view_as(p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        parts, replicas, group = ctx.options
        if grad is not None:
            grad = grad / (parts * replicas)
            grad = _Summed.apply(grad, grad.new_zeros(()), group) if replicas > 1 else grad
        return grad, None, None, None


def mean_gradient(p: Tensor, parts: int, replicas: int, group: str) -> Tensor:
    """A parameter whose gradient is divided by ``parts`` and averaged over the ``replicas`` ranks of ``group``."""
    return _Mean.apply(p, parts, replicas, group)
