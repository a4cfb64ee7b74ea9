"""Tiles of rows for the plain backends, and sums over rows in runs of fixed length."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

_TILE_BYTES = 4 << 20  #: of x and of the row arrays together: stays in a second-level cache


def tile_rows(batch: int, n: int, width: int, itemsize: int, device: torch.device) -> int:
    """Rows of a tile: what fits, in steps of 64; on a GPU 32 times as many, since launches are what costs there."""
    room = _TILE_BYTES if device.type == "cpu" else 32 * _TILE_BYTES
    return min(n, max(64, room // (batch * width * itemsize) // 64 * 64))


_RUN = 512  #: terms of a sum that are added one by one, as in csrc/common/gemm.h


def add_products(out: Tensor, rows: Tensor, x: Tensor) -> None:
    """out [B, m, d] += rows [B, r, m]^T x [B, r, d], in runs: where m and d are small, libraries add term by term."""
    for some, of_x in zip(rows.split(_RUN, 1), x.split(_RUN, 1), strict=True):
        out.baddbmm_(some.mT, of_x)


def einsum_in_runs(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """``torch.einsum``, its sum over the axis "r" in runs that are added up afterwards: see :func:`add_products`."""
    rows = [letters.index("r") for letters in equation.split("->")[0].split(",")]
    parts = zip(a.split(_RUN, rows[0]), b.split(_RUN, rows[1]), strict=True)
    return reduce(torch.add, (torch.einsum(equation, x, y) for x, y in parts))


def open_prior(prior: Tensor, open: Tensor | None) -> Tensor:
    """[..., m]: R of no scores. The prior where it is open, divided by its sum there if that is more than 0."""
    if open is None:
        return prior
    R = prior * open
    total = R.sum(-1, keepdim=True)
    return R / total.where(total > 0, 1.0)
