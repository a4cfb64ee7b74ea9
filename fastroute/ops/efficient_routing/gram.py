"""The gated Gram matrix of the inputs, which replaces the products with n_inp = -1's linear betas.

Axes: B batch, n input vectors, d width of an input vector. Derived in ``docs/vector_routing.md``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..gemm import products
from ..tiles import tile_rows
from ..vector_routing.contract import Grads


def _tiles(
    x: Tensor, lengths: Tensor | None, acc: torch.dtype
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor | None]]:
    """((samples, rows), those rows in acc with dead ones zero, which are live): a tile's worth of each at a time."""
    B, n, d = x.shape
    size = tile_rows(1, n, 2 * d, acc.itemsize, x.device)
    samples = max(1, tile_rows(1, B * n, 2 * d, acc.itemsize, x.device) // n)
    for b in range(0, B, samples):
        for start in range(0, n, size):
            at = slice(b, b + samples), slice(start, start + size)
            tile = x[at].to(acc)
            live = None
            if lengths is not None:
                live = torch.arange(start, start + tile.shape[1], device=x.device) < lengths[at[0], None]
                tile = tile.masked_fill(~live[..., None], 0.0)
            yield at, tile, live


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates f = sigmoid(scale <x_i, weight> + bias) [B, n], G = sum_i f_i x_i x_i^T [B, d, d], and
    g = (sum_i f_i x_i, sum_i f_i) [B, d + 1]. ``weight`` is [1, d], ``bias`` [1]."""
    B, n, d = x.shape
    acc = scale.dtype
    w = weight.to(acc)
    gate = x.new_empty((B, n), dtype=acc)
    G = x.new_zeros((B, d, d), dtype=acc)
    g = x.new_zeros((B, d + 1), dtype=acc)
    half = d // 2 if d >= 128 else 0
    for at, tile, live in _tiles(x, lengths, acc):
        b = at[0]
        f = torch.addcmul(bias.to(acc), (tile @ w.mT)[..., 0], scale[b, None]).sigmoid()
        if live is not None:
            f = f.masked_fill(~live, 0.0)
        gate[at] = f
        weighted = tile * f[..., None]
        g[b, :d] += weighted.sum(1)
        g[b, d] += f.sum(1)
        # G is symmetric: three of its four quarters suffice
        G[b, :, half:] += products(tile.mT, weighted[..., half:])
        if half:
            G[b, :half, :half] += products(tile[..., :half].mT, weighted[..., :half])
    if half:
        G[:, half:, :half] = G[:, :half, half:].mT
    return gate, G, g


def backward(
    x: Tensor, gate: Tensor, weight: Tensor, scale: Tensor, lengths: Tensor | None, dG: Tensor, dg: Tensor, grads: Grads
) -> None:
    """Adds to grads.gate and grads.x, then makes grads.gate_weight and grads.gate_bias; grads.fresh as for a step."""
    d = x.shape[-1]
    acc = scale.dtype
    w = weight.to(acc)
    sym = dG + dG.mT
    dweight = torch.zeros_like(w)
    dbias = w.new_zeros(1)
    for at, tile, live in _tiles(x, lengths, acc):
        f = gate[at]
        if live is not None:
            f = f.masked_fill(~live, 0.0)
        y = products(tile, sym[at[0]]).add_(dg[at[0], None, :d])  # sym x + dgbar
        df = 0.5 * (torch.einsum("brd,brd->br", y, tile) + torch.bmm(tile, dg[at[0], :d, None])[..., 0]) + dg[at[0], d:]
        if not grads.fresh:
            df = df + grads.gate[at]
        if live is not None:
            df = df.masked_fill(~live, 0.0)
        grads.gate[at] = df
        slope = f * (1 - f)
        da = torch.where(slope == 0, 0, df * slope)  # behind a gate that is shut: 0, not 0 inf
        sda = da * scale[at[0], None]
        dweight += (sda[..., None] * tile).sum((0, 1))  # cascaded: a product would sum the rows one by one
        dbias += da.sum()
        if grads.x is not None:
            dx = y.mul_(f[..., None]).add_(sda[..., None] * w)
            if live is not None:
                dx = dx.masked_fill(~live[..., None], 0.0)
            if grads.fresh:
                grads.x[at] = dx.to(grads.x.dtype)
            else:
                grads.x[at] += dx.to(grads.x.dtype)
    if grads.gate_weight is not None and grads.gate_bias is not None:
        grads.gate_weight.copy_(dweight)
        grads.gate_bias.copy_(dbias)
