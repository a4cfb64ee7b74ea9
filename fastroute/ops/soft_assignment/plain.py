"""The plain backend of ``soft_assignment``: tiles of inputs, with the gradient written out.

Nothing of size n x m is stored. Axes: B batch, n inputs (r rows of a tile), m outputs, h width of a vote. Votes come as
[B, n, m, h]; an axis B or m of size 1 is shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import accumulating
from ..tiles import einsum_in_runs, open_prior, tile_rows
from .contract import Grads, Pairs, sizes


class _Tile(NamedTuple):
    """A tile's arrays [B, r, m]; ``t`` is phi / f."""

    rows: slice
    R: Tensor
    f: Tensor | None  # [B, r, 1]
    use: Tensor | None
    ign: Tensor | None
    t: Tensor
    w: Tensor
    open: Tensor | None
    live: Tensor | None  # [B, r, 1] bool


def _per_row(t: Tensor | None, rows: slice, acc: torch.dtype) -> Tensor | None:
    return None if t is None else t[:, rows].to(acc)


def _tiles(votes: Tensor, pairs: Pairs) -> Iterator[_Tile]:
    B, n, m, h = sizes(votes, pairs)
    acc = accumulating(votes.dtype)
    wide = votes.shape[0] * votes.shape[2] * h // B  # of votes, for one row of one sample
    size = tile_rows(B, n, max(1, wide + 4 * m), acc.itemsize, votes.device)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        live = None
        if pairs.lengths is not None:
            live = (torch.arange(start, rows.stop, device=votes.device) < pairs.lengths[:, None])[..., None]
        open = None if pairs.mask is None else ~pairs.mask[:, rows]
        if pairs.scores is None:
            assert pairs.prior is not None
            R = open_prior(pairs.prior.expand(B, rows.stop - start, m), open)
        else:
            S = pairs.scores[:, rows].to(acc)
            S = S if live is None else S.masked_fill(~live, 0.0)
            if open is None:
                R = S.softmax(-1)
            else:
                shut = ~open.any(-1, keepdim=True)
                R = S.masked_fill(~open, -torch.inf).masked_fill(shut, 0.0).softmax(-1) * open
        use, ign = _per_row(pairs.use, rows, acc), _per_row(pairs.ign, rows, acc)
        t = R if use is None else use * R
        t = t if ign is None else t - ign * (1 - R)
        open = live if open is None else open if live is None else open & live
        t = t if open is None else t.masked_fill(~open, 0.0)
        f = None if pairs.gate is None else pairs.gate[:, rows, None]
        f = f if f is None or live is None else f.masked_fill(~live, 0.0)
        w = t if f is None else f * t
        if pairs.eps:
            w = w + pairs.eps if open is None else torch.where(open, w + pairs.eps, w)
        yield _Tile(rows, R, f, use, ign, t, w, open, live)


def _letters(votes: Tensor, B: int, m: int) -> tuple[str, tuple[int, ...]]:
    """The axes of votes for einsum, and which axes are shared and left out."""
    shared = tuple(axis for axis, size in ((0, B), (2, m)) if votes.shape[axis] != size)
    return "".join(letter for axis, letter in enumerate("brmh") if axis not in shared), shared


def _rows_of(votes: Tensor, tile: _Tile, shared: tuple[int, ...], acc: torch.dtype) -> Tensor:
    made = votes[:, tile.rows].to(acc)
    if tile.live is not None and 0 not in shared:
        made = made.masked_fill(~tile.live[..., None], 0.0)
    return made.squeeze(shared)


def forward(votes: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    B, _, m, h = sizes(votes, pairs)
    acc = accumulating(votes.dtype)
    letters, shared = _letters(votes, B, m)
    M, p = votes.new_zeros((B, m, h), dtype=acc), votes.new_zeros((B, m), dtype=acc)
    for tile in _tiles(votes, pairs):
        V = _rows_of(votes, tile, shared, acc)
        M += einsum_in_runs(f"brm,{letters}->bmh", tile.w, V) if shared else (tile.w[..., None] * V).sum(1)
        p += tile.w.sum(1)
    return M, p


def _put(out: Tensor | None, rows: slice, value: Tensor) -> None:
    if out is not None:
        out[:, rows] = value if out.shape[0] == value.shape[0] else value.sum(0, keepdim=True)


def backward(votes: Tensor, pairs: Pairs, dM: Tensor, dp: Tensor, grads: Grads) -> None:
    B, _, m, _ = sizes(votes, pairs)
    acc = accumulating(votes.dtype)
    letters, shared = _letters(votes, B, m)
    for tile in _tiles(votes, pairs):
        rows, R = tile.rows, tile.R
        if grads.votes is not None:
            dvotes = torch.einsum(f"brm,bmh->{letters}", tile.w, dM)
            for axis in shared:
                dvotes = dvotes.unsqueeze(axis)
            grads.votes[:, rows] = dvotes
        dphi = torch.einsum(f"bmh,{letters}->brm", dM, _rows_of(votes, tile, shared, acc)) + dp[:, None]
        dphi = dphi if tile.open is None else dphi.masked_fill(~tile.open, 0.0)
        if grads.gate is not None:
            grads.gate[:, rows] = (dphi * tile.t).sum(-1)
        dphi = dphi if tile.f is None else tile.f * dphi
        _put(grads.use, rows, dphi * R)
        _put(grads.ign, rows, dphi * (R - 1))
        if grads.scores is not None:
            benefit = tile.use if tile.ign is None else tile.ign + (1 if tile.use is None else tile.use)
            dR = dphi if benefit is None else dphi * benefit
            grads.scores[:, rows] = R * (dR - (R * dR).sum(-1, keepdim=True))
