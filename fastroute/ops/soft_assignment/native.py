"""The ``native`` backend of ``soft_assignment``: the C++ of csrc/cpu/soft_assignment, given dense tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import accumulating
from ..registry import library
from .contract import Grads, Pairs

_INPUTS = (
    "Tensor votes, Tensor? scores, Tensor? gate, Tensor? use, Tensor? ign, Tensor? prior, Tensor? mask, "
    "Tensor? lengths, float eps"
)
library.define(f"_soft_assignment_native({_INPUTS}, bool mean) -> (Tensor, Tensor)")
library.define(
    f"_soft_assignment_native_backward({_INPUTS}, Tensor dM, Tensor dp, Tensor(a!)? dvotes, Tensor(b!)? dscores, "
    "Tensor(c!)? dgate, Tensor(d!)? duse, Tensor(e!)? dign) -> ()"
)


def _plain(votes: Tensor, pairs: Pairs) -> tuple[Tensor | float | None, ...]:
    """As the C++ reads it: dense in the dtype of sums, but for votes, whose last axis is dense, and the mask."""
    acc = accumulating(votes.dtype)

    def dense(t: Tensor) -> Tensor:
        return t if t.dtype == acc and t.is_contiguous() else t.to(acc).contiguous()

    votes = votes if votes.stride(-1) == 1 or votes.shape[-1] == 1 else votes.contiguous()
    *given, mask, lengths, eps = pairs
    lengths = None if lengths is None else lengths.contiguous()
    return votes, *[None if t is None else dense(t) for t in given], mask, lengths, eps


def forward(votes: Tensor, pairs: Pairs, mean: bool = False) -> tuple[Tensor, Tensor]:
    """M and p; for a ``mean`` M / p and p, which is 1 where it is 0."""
    return torch.ops.fastroute._soft_assignment_native(*_plain(votes, pairs), mean)


def backward(votes: Tensor, pairs: Pairs, dM: Tensor, dp: Tensor, grads: Grads) -> None:
    acc = accumulating(votes.dtype)
    lent = [t if t is None or t.dtype == acc else torch.empty_like(t, dtype=acc) for t in grads[1:]]
    torch.ops.fastroute._soft_assignment_native_backward(
        *_plain(votes, pairs), dM.contiguous(), dp.contiguous(), grads.votes, *lent
    )
    for t, other in zip(grads[1:], lent, strict=True):
        if t is not None and other is not None and other is not t:
            t.copy_(other)
