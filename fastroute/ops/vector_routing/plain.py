"""The ``reference`` backend: one iteration over tiles of input rows in plain PyTorch, with its gradient written out.

It needs no compiler and no GPU, never holds an [n, m] array for more than a tile, and is the same mathematics as the
C++ and the Triton kernels, one line per formula. ``docs/vector_routing.md`` derives them.
Axes: B batch, r rows of a tile, n input vectors, m output vectors, d width of an input vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tiles import add_products, einsum_in_runs, open_prior, tile_rows
from .contract import Grads, Step


class _Tile(NamedTuple):
    rows: slice
    x: Tensor  # [B, r, d] acc
    gate: Tensor  # [B, r, 1]; exactly 0 past a sample's length
    live: Tensor | None  # [B, r] bool
    open: Tensor | None  # [B, r, m] bool, or [1, r, m]


class _Row(NamedTuple):
    """One tile's [B, r, m] arrays."""

    L: Tensor | None
    z: Tensor | None
    R: Tensor
    benefit: Tensor  # use + ign
    t: Tensor  # benefit * R - ign, so that phi = gate * t
    phi: Tensor


def _per_row(p: Tensor, rows: slice, acc: torch.dtype) -> Tensor:
    return (p if p.shape[0] == 1 else p[rows]).to(acc)


def _tiles(step: Step, gate: Tensor) -> Iterator[_Tile]:
    B, n, d = step.x.shape
    size = tile_rows(B, n, d + 4 * step.n_out, step.acc.itemsize, step.x.device)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        x = step.x[:, rows].to(step.acc)
        live = None
        if step.lengths is not None:
            live = torch.arange(rows.start, rows.stop, device=x.device) < step.lengths[:, None]
            x = x.masked_fill(~live[..., None], 0.0)
        if step.gate is None:
            assert step.gate_weight is not None and step.gate_bias is not None and step.scale is not None
            w, b = _per_row(step.gate_weight, rows, step.acc), _per_row(step.gate_bias, rows, step.acc)
            f = torch.addcmul(b, (x * w).sum(-1), step.scale[:, None]).sigmoid()
            gate[:, rows] = f if live is None else f.masked_fill(~live, 0.0)
        f = gate[:, rows] if live is None else gate[:, rows].masked_fill(~live, 0.0)
        mask = None if step.mask is None else ~step.mask[:, rows]
        yield _Tile(rows, x, f[..., None], live, mask)


def _beta(step: Step, tile: _Tile, beta: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return beta[tile.rows].to(step.acc)
    return F.linear(tile.x, beta.to(step.acc), bias.to(step.acc))


def _row(step: Step, tile: _Tile) -> _Row:
    L = z = None
    if step.pred is None:
        assert step.prior is not None
        R = open_prior(step.prior.expand(*tile.x.shape[:-1], -1), tile.open)
    else:
        assert step.score_weight is not None and step.score_bias is not None
        L = torch.bmm(tile.x, step.pred.mT)
        z = _per_row(step.score_bias, tile.rows, step.acc) + L * _per_row(step.score_weight, tile.rows, step.acc)
        log_R = F.logsigmoid(z)
        if tile.open is None:
            R = log_R.softmax(-1)
        else:
            any_open = tile.open.any(-1, keepdim=True)
            R = log_R.masked_fill(~tile.open & any_open, -torch.inf).softmax(-1) * tile.open
    benefit = _beta(step, tile, step.use, step.use_bias)
    if step.ign is None:
        t = benefit * R
    else:
        ign = _beta(step, tile, step.ign, step.ign_bias)
        benefit = benefit + ign
        t = (benefit - ign) * R - ign * (1 - R)
    if tile.open is not None:
        t = t * tile.open
    return _Row(L, z, R, benefit, t, tile.gate * t)


def forward(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    B, n, d = step.x.shape
    M = step.x.new_zeros((B, step.n_out, d), dtype=step.acc)
    p = step.x.new_zeros((B, step.n_out), dtype=step.acc)
    gate = step.x.new_empty((B, n), dtype=step.acc) if step.gate is None else step.gate
    for tile in _tiles(step, gate):
        phi = _row(step, tile).phi
        add_products(M, phi, tile.x)
        p += phi.sum(1)
    return M, p, gate


def _add(out: Tensor | None, rows: slice | None, value: Tensor, fresh: bool) -> None:
    """Put a tile's share of a gradient into its buffer; a buffer of one row collects the sum over the tile's rows."""
    if out is None:
        return
    if rows is None:
        out += value.to(out.dtype)
    elif fresh:
        out[rows] = value.to(out.dtype)
    else:
        out[rows] += value.to(out.dtype)


def backward(step: Step, dM: Tensor, dp: Tensor, grads: Grads) -> Tensor | None:
    dpred = None if step.pred is None else torch.zeros_like(step.pred)
    gate = step.gate
    assert gate is not None
    makes_gates = step.gate_weight is not None
    wants = grads.use is not None
    if grads.fresh:
        shared = [grads.use, grads.ign, grads.use_bias, grads.ign_bias] if step.linear else []
        shared += [b for b in (grads.score_weight, grads.score_bias) if b is not None and b.shape[0] == 1]
        for buffer in shared:
            if buffer is not None:
                buffer.zero_()
        if step.pred is None and not step.linear:
            for buffer in (grads.score_weight, grads.score_bias):
                if buffer is not None:
                    buffer.zero_()
    if makes_gates and wants:
        for buffer in (grads.gate_weight, grads.gate_bias):
            if buffer is not None and buffer.shape[0] == 1:
                buffer.zero_()
    for tile in _tiles(step, gate):
        x, f, rows = tile.x, tile.gate, tile.rows
        row = _row(step, tile)
        dphi = torch.baddbmm(dp[:, None, :], x, dM.mT)
        if tile.open is not None:
            dphi = dphi * tile.open
        dgate = (dphi * row.t).sum(-1)
        if tile.live is not None:
            dgate = dgate.masked_fill(~tile.live, 0.0)
        if grads.fresh:
            grads.gate[:, rows] = dgate
        else:
            dgate = dgate + grads.gate[:, rows]
            grads.gate[:, rows] = dgate
        dx = torch.bmm(row.phi, dM) if grads.x is not None else None
        if wants or step.linear:
            duse = f * row.R * dphi
            dign = duse - f * dphi
            if step.linear:
                weights = [(duse, step.use, grads.use, grads.use_bias)]
                if step.ign is not None:
                    weights.append((dign, step.ign, grads.ign, grads.ign_bias))
                for dbeta, weight, dweight, dbias in weights:
                    if wants:
                        _add(dweight, None, einsum_in_runs("brm,brd->md", dbeta, x), False)
                        _add(dbias, None, dbeta.sum((0, 1)), False)
                    if dx is not None:
                        dx += dbeta @ weight.to(step.acc)
            else:
                _add(grads.use, rows, duse.sum(0), grads.fresh)
                _add(grads.ign, rows, dign.sum(0), grads.fresh)
        if dpred is not None:
            assert row.L is not None and row.z is not None and step.pred is not None
            assert step.score_weight is not None
            dR = f * row.benefit * dphi
            dz = row.R * (dR - (row.R * dR).sum(-1, keepdim=True)) * torch.sigmoid(-row.z)
            dL = dz * _per_row(step.score_weight, rows, step.acc)
            add_products(dpred, dL, x)
            if dx is not None:
                dx.baddbmm_(dL, step.pred)
            if wants:
                for dscore, value in ((grads.score_weight, dz * row.L), (grads.score_bias, dz)):
                    one = dscore is not None and dscore.shape[0] == 1
                    _add(dscore, None if one else rows, value.sum((0, 1) if one else 0), grads.fresh)
        if makes_gates:
            assert step.gate_weight is not None and step.scale is not None
            slope = gate[:, rows] * (1 - gate[:, rows])
            da = torch.where(slope == 0, 0, dgate * slope)  # behind a gate that is shut: 0, not 0 inf
            sda = da * step.scale[:, None]
            if dx is not None:
                dx += sda[..., None] * _per_row(step.gate_weight, rows, step.acc)
            if wants:
                one = step.gate_weight.shape[0] == 1
                _add(
                    grads.gate_weight,
                    None if one else rows,
                    (sda[..., None] * x).sum((0, 1) if one else 0),
                    True,
                )
                _add(grads.gate_bias, None if one else rows, da.sum() if one else da.sum(0), True)
        if grads.x is not None:
            assert dx is not None
            if tile.live is not None:
                dx = dx.masked_fill(~tile.live[..., None], 0.0)
            if grads.fresh:
                grads.x[:, rows] = dx.to(grads.x.dtype)
            else:
                grads.x[:, rows] += dx.to(grads.x.dtype)
    return dpred
