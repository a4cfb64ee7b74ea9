"""Faults that a kernel can have, planted in plain PyTorch: one operator of a computation is made wrong in one way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.rounding import PRODUCT_RUN, decomposition

aten = torch.ops.aten
TILE = 32

_SLOPES = ("sigmoid_backward", "threshold_backward", "tanh_backward", "log_sigmoid_backward", "silu_backward", "where")

Terms = Callable[[Tensor], Tensor]  # all terms of a sum [..., n] to its value


def _in_bfloat16(terms: Tensor) -> Tensor:
    """The accumulator is bfloat16; sixteen terms at a time are added in float32."""
    total = torch.zeros_like(terms[..., 0])
    for part in terms.split(16, -1):
        total = (total + part.sum(-1)).bfloat16().float()
    return total


def _without_the_last(terms: Tensor) -> Tensor:
    return terms[..., :-1].sum(-1)


def _one_by_one(terms: Tensor) -> Tensor:
    total = torch.zeros_like(terms[..., 0])
    for k in range(terms.shape[-1]):
        total = total + terms[..., k]
    return total


def _off_by_one_tile(terms: Tensor) -> Tensor:
    """The second tile begins one too early and ends one too early."""
    n = terms.shape[-1]
    rows = torch.arange(n)
    rows[TILE : min(2 * TILE, n)] -= 1
    return terms[..., rows].sum(-1)


def _of_bfloat16_sums(terms: Tensor) -> Tensor:
    """In float32, of partial sums that were stored in bfloat16."""
    return torch.stack([part.sum(-1).bfloat16().float() for part in terms.split(256, -1)]).sum(0)


#: fault: (what a sum becomes, the least number of terms it is planted in)
SUMS: dict[str, tuple[Terms, int]] = {
    "an accumulator in bfloat16": (_in_bfloat16, 48),
    "the last term dropped": (_without_the_last, 3),
    "one tile off by one": (_off_by_one_tile, TILE + 1),
    "one long run": (_one_by_one, 1000),
    "float32 of bfloat16 partial sums": (_of_bfloat16_sums, 48),
}
ROUNDED_BIAS, SLOPE = "a bias rounded alike into every row", "a wrong slope at one point"
FAULTS = (*SUMS, ROUNDED_BIAS, SLOPE)


class Planted(TorchDispatchMode):
    """Plants ``fault`` in the ``place``-th operator that can have it; ``places`` counts those that could."""

    def __init__(self, fault: str, place: int) -> None:
        super().__init__()
        self.fault, self.place, self.places = fault, place, 0

    def _here(self) -> bool:
        self.places += 1
        return self.places - 1 == self.place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if (
            name not in _SLOPES and (parts := decomposition(func)) is not None
        ):  # where there are sums to plant faults in
            with self:
                return parts(*args, **kwargs)
        if self.fault in SUMS:
            total, least = SUMS[self.fault]
            if name in ("mm", "bmm") and args[0].shape[-1] >= least and self._here():
                return _product(total, *args)
            if name in ("sum", "mean") and args[0].is_floating_point():
                terms, shape = _terms(*args, **kwargs)
                if terms.shape[-1] >= least and self._here():
                    return total(terms).reshape(shape) / (terms.shape[-1] if name == "mean" else 1)
        if self.fault == ROUNDED_BIAS and name in ("add", "sub") and _is_broadcast(args) and self._here():
            smaller = 0 if _own(args[0]) < _own(args[1]) else 1
            return func(*(_coarse(a) if k == smaller else a for k, a in enumerate(args)), **kwargs)
        if name in ("mm", "bmm") and args[0].shape[-1] > PRODUCT_RUN:  # PyTorch adds the terms of small ones one by one
            return _in_runs(func, *args)
        made = func(*args, **kwargs)
        if self.fault == SLOPE and name in _SLOPES and isinstance(made, Tensor) and made.is_floating_point():
            wrong = made.flatten().abs()
            if wrong.numel() and wrong.max() > 0 and self._here():  # at a point whose slope is of middling size
                made = made.contiguous().clone()
                made.view(-1)[int(wrong.argsort()[wrong.numel() // 2 :][0])] *= 1.01
        return made


def _in_runs(product: Any, a: Tensor, b: Tensor) -> Tensor:
    parts = zip(a.split(PRODUCT_RUN, -1), b.split(PRODUCT_RUN, -2), strict=True)
    return torch.stack([product(x, y) for x, y in parts]).sum(0)


def _product(total: Terms, a: Tensor, b: Tensor) -> Tensor:
    """Row by row of the second factor's columns, so that no more than one matrix of terms is held."""
    return torch.stack([total(a * b[..., :, j].unsqueeze(-2)) for j in range(b.shape[-1])], -1)


def _terms(t: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> tuple[Tensor, list[int]]:
    axes = sorted(d % t.dim() for d in dim) if dim else list(range(t.dim()))
    kept = [d for d in range(t.dim()) if d not in axes]
    shape = [1 if d in axes else t.shape[d] for d in range(t.dim()) if keepdim or d not in axes]
    return t.permute(*kept, *axes).reshape(*(t.shape[d] for d in kept), -1), shape


def _own(t: Tensor) -> int:
    """Numbers that a tensor holds, however often it repeats them."""
    return (
        math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) if 0 in t.stride() else t.numel()
    )


def _is_broadcast(args: Any) -> bool:
    """A term of all rows: smaller than the other, by ten rows and more."""
    if len(args) < 2 or not all(isinstance(a, Tensor) and a.dtype == torch.float32 for a in args[:2]):
        return False
    sizes = sorted(map(_own, args[:2]))
    return sizes[0] > 1 and sizes[0] * 10 <= sizes[1]


def _coarse(t: Tensor) -> Tensor:
    """Three bits less than float32 has."""
    wide = t.double() * (2.0**32 + 1)  # Veltkamp's splitting, to 21 bits
    return (wide - (wide - t.double())).float()
