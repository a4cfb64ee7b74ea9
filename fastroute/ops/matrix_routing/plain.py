"""The ``reference`` backend of ``matrix_routing``: tiles of inputs in plain PyTorch, with the gradient written out.

It needs no compiler and no GPU, never holds the votes of more than a tile, and is the same mathematics as the C++ and
the Triton kernels, one line per formula of ``contract.py``. ``docs/matrix_routing.md`` derives them.
Axes: B batch, r inputs of a tile, n inputs, m outputs, c rows of a capsule, d its columns before, h after routing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tiles import einsum_in_runs
from .contract import MatrixGrads, MatrixStep, Moments, OutputGrads, PreviousGrads
from .settling import log_prior

_TILE_BYTES = 4 << 20  #: of votes


class _Tile(NamedTuple):
    rows: slice
    mu_inp: Tensor  # [B, r, c, d]; zero where the gate is
    gate: Tensor  # [B, r, 1]
    W: Tensor  # [r or 1, m, d, h] acc
    use: Tensor  # [r or 1, m] acc
    ign: Tensor  # [r or 1, m] acc
    open: Tensor | None  # [B, r, m] bool
    V: Tensor  # [B, r, m, c, h]
    off: Tensor | None  # V - mu of the previous iteration
    R: Tensor  # [B, r, m]
    D: Tensor  # [B, r, m]


def tile_rows(batch: int, n: int, votes: int, itemsize: int, device: torch.device) -> int:
    """Inputs of a tile: what fits; on a GPU 64 times as many, since launches are what costs there."""
    room = _TILE_BYTES if device.type == "cpu" else 64 * _TILE_BYTES
    return min(n, max(1, room // max(1, batch * votes * itemsize)))


def _tiles(step: MatrixStep) -> Iterator[_Tile]:
    B, n, m, c, _, h = step.sizes
    size = tile_rows(B, n, m * c * h, step.acc.itemsize, step.mu_inp.device)
    prior: Any
    prior = precision = None
    if step.previous is not None:
        prior = log_prior(step.previous, step.p_model)
        precision = step.previous.sig2.reciprocal() if step.p_model == "gaussian" else None
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        W, bias, use, ign = (
            (p if step.shared else p[rows]).to(step.acc) for p in (step.W, step.bias, step.beta_use, step.beta_ign)
        )
        gate = step.gate[:, rows, None]
        is_open = None if step.mask is None else ~step.mask[:, rows]
        dropped = gate == 0
        if is_open is not None:
            dropped = dropped | ~is_open.any(-1, keepdim=True)
        mu_inp = step.mu_inp[:, rows].masked_fill(dropped[..., None], 0.0)
        V = mu_inp[:, :, None] @ W + bias
        off = None
        if step.previous is None:
            R = torch.full_like(V[..., 0, 0], 1 / m)
            if is_open is not None:
                R = is_open / is_open.sum(-1, keepdim=True).clamp_min(1).to(step.acc)
        else:
            off = V - step.previous.mu[:, None]
            squares = off.square() if precision is None else 0.5 * off.square() * precision[:, None]
            log_R = prior[:, None] - squares.sum((-2, -1))
            if is_open is not None:
                log_R = log_R.masked_fill(~is_open & is_open.any(-1, keepdim=True), -torch.inf)
            R = log_R.softmax(-1)
            if is_open is not None:
                R = R * is_open
        yield _Tile(rows, mu_inp, gate, W, use, ign, is_open, V, off, R, gate * R)


def forward(step: MatrixStep) -> Moments:
    B, _, m, c, _, h = step.sizes
    tiny = torch.finfo(step.acc).tiny
    a = step.mu_inp.new_zeros(B, m)
    # tiles are put together in float64: there are few numbers, and what is left of the mean's rounding is wanted
    N0, mean, M2 = (step.mu_inp.new_zeros(size, dtype=torch.float64) for size in ((B, m), (B, m, c, h), (B, m, c, h)))
    for tile in _tiles(step):
        ignored = tile.gate - tile.D
        if tile.open is not None:
            ignored = ignored * tile.open
        a += (tile.use * tile.D).sum(1) - (tile.ign * ignored).sum(1)
        weight = tile.D.sum(1)
        share = tile.D / weight.clamp_min(tiny)[:, None]
        here = einsum_in_runs("brj,brjch->bjch", share, tile.V)
        e = tile.V - here[:, None]
        M2_here = einsum_in_runs("brj,brjch->bjch", tile.D, e.square())
        exact = here.double() + einsum_in_runs("brj,brjch->bjch", share, e)
        total = N0 + weight
        ratio = (weight / total.clamp_min(tiny))[..., None, None]
        step_to = exact - mean
        M2 += M2_here + step_to.square() * N0[..., None, None] * ratio
        mean += step_to * ratio
        N0 = total
    rounded = mean.to(step.acc)
    return Moments(N0.to(step.acc), rounded, M2.to(step.acc), a, (mean - rounded).to(step.acc))


def _add(out: Tensor | None, at: slice | tuple[slice, slice] | None, value: Tensor, fresh: bool) -> None:
    """Put a tile's share into its buffer; ``at`` None: a buffer that all tiles add to."""
    if out is None:
        return
    if at is None:
        out += value
    elif fresh:
        out[at] = value
    else:
        out[at] += value


def backward(step: MatrixStep, out: OutputGrads, grads: MatrixGrads) -> PreviousGrads | None:
    B, _, m, c, _, h = step.sizes
    fresh, shared = grads.fresh, step.shared
    if fresh and shared:
        for buffer in (grads.W, grads.bias, grads.beta_use, grads.beta_ign):
            if buffer is not None:
                buffer.zero_()
    center, g1, g2, k, da = (t[:, None] for t in out)
    previous, sums, precision = step.previous, None, None
    if previous is not None:
        new = step.mu_inp.new_zeros
        sums = PreviousGrads(new(B, m), new(B, m, c, h), new(B, m, c, h))
        precision = previous.sig2.reciprocal()[:, None] if step.p_model == "gaussian" else None
    for tile in _tiles(step):
        each = (slice(None), tile.rows)
        e = tile.V - center
        dD = (e * (g1 + g2 * e)).sum((-2, -1)) - k + da * (tile.use + tile.ign)
        ignored, loss = tile.gate - tile.D, da * tile.ign
        if tile.open is not None:
            ignored, loss, dD = ignored * tile.open, loss * tile.open, dD * tile.open
        _add(grads.gate, each, (dD * tile.R - loss).sum(-1), fresh)
        dV = tile.D[..., None, None] * (g1 + 2 * g2 * e)
        off = tile.off
        if sums is not None and off is not None:
            dR = tile.gate * dD
            dl = tile.R * (dR - (tile.R * dR).sum(-1, keepdim=True))
            weighted = dl[..., None, None] * off
            sums.A0.add_(dl.sum(1))
            sums.A1.add_(weighted.sum(1))
            sums.A2.add_((weighted * off).sum(1))
            dV = dV - weighted * (2 if precision is None else precision)
        if grads.mu_inp is not None:
            W = tile.W.expand(dV.shape[1], -1, -1, -1)
            _add(grads.mu_inp, each, torch.einsum("brjch,rjdh->brcd", dV, W), fresh)
        if grads.W is not None:
            at = None if shared else tile.rows
            axes = (0, 1) if shared else 0
            dW = "brcd,brjch->jdh" if shared else "brcd,brjch->rjdh"
            _add(grads.W, at, (einsum_in_runs if shared else torch.einsum)(dW, tile.mu_inp, dV), fresh)
            _add(grads.bias, at, dV.sum(axes), fresh)
            _add(grads.beta_use, at, (da * tile.D).sum(axes), fresh)
            _add(grads.beta_ign, at, (-da * ignored).sum(axes), fresh)
    return sums
