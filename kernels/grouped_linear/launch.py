"""The Triton backend of ``grouped_linear``: launches its kernels, forward and backward.

The kernels are in ``grouped_linear_products``, what follows a product in ``grouped_linear_activation``;
``grouped_linear_plan`` chooses blocks, ``grouped_linear_parameters`` finds the modules' parameters.
Axes: N rows, K modules, F features in, O features out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import launch as start
from ..launch import cdiv, dense, multiprocessors, on, power_of_2, shared_memory
from .parameters import gathered
from .plan import Device, Tile, row_tiles, rows_tile, search, slope_apart, sums_tile
from .products import gradients_kernel, reduce_kernel, rows_kernel, slope_kernel, sums_kernel

__all__ = ["backward", "forward", "unsupported"]

#: Row tiles that go through the columns together.
GROUP = 8


def unsupported(
    device_type: str, dtype: torch.dtype, N: int = 0, K: int = 1, F: int = 1, O: int = 1, **_: int
) -> str | None:
    """Why this backend cannot take a case, or None if it can."""
    if why := start.refuses(device_type, dtype):
        return why
    if max(N, K, F, O) >= 2**31 - 2**16:
        return f"the triton kernels count rows, modules and features in 32 bits: N={N}, K={K}, F={F}, O={O}"
    return None


def device_of(t: Tensor) -> Device:
    return Device(multiprocessors(t.device), shared_memory(t.device))


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _stacked(tensors: Sequence[Tensor], dims: int) -> bool:
    return len(tensors) == 1 and tensors[0].dim() == dims


class _Call(NamedTuple):
    """A launch that may yet become part of another."""

    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    tile: Tile


def _launch(kernel: Any, call: _Call) -> None:
    tile = call.tile
    start.launch(kernel, (call.programs,), *call.args, **call.constants, warps=tile.warps, stages=tile.stages)


def _rows(
    x: Tensor | None, take: Tensor | None, kept: Tensor | None, slope: int, weights: Sequence[Tensor], turned: bool,
    biases: Sequence[Tensor], put: Tensor | None, offsets: Tensor, y: Tensor, before: Tensor | None, activation: int,
    precision: str,
) -> _Call | None:  # fmt: skip
    """``rows_kernel`` into y [N, OUT]; ``turned``: the modules' matrices are [IN, OUT]."""
    N, OUT = y.shape
    K = offsets.shape[0] - 1
    if y.numel() == 0:
        return None
    IN, W, w_strides, w_pointers, w_aligned = 1, None, (0, 0, 0), False, False
    if weights:
        assert x is not None
        IN = x.shape[1]
        shape = (IN, OUT) if turned else (OUT, IN)
        W, w_strides, w_pointers, w_aligned = gathered(weights, K, shape, _stacked(weights, 3))
        if turned:
            w_strides = (w_strides[0], w_strides[2], w_strides[1])
    b, b_strides, b_pointers = None, (0, 0), False
    if biases:
        b, b_strides, b_pointers, _ = _of_biases(biases, K, OUT, tables=not weights)
    tile = rows_tile(N, K, IN, OUT, y.dtype, precision, device_of(y), slope > 0)
    tiles = row_tiles(N, K, tile.rows)
    args = (
        x if weights else None, x.stride(0) if weights and x is not None else 0,
        kept if slope else None, OUT if kept is None else kept.stride(0), take, W, *w_strides, b, *b_strides,
        offsets, put, y, before, N, K, tiles,
    )  # fmt: skip
    constants = {
        "IN": IN, "OUT": OUT, "W_POINTERS": w_pointers, "W_ALIGNED": w_aligned, "B_POINTERS": b_pointers,
        "ACTIVATION": activation, "SLOPE": slope, "PRECISION": precision, "SEARCH": search(K), "GROUP": GROUP,
        "BLOCK_N": tile.rows, "BLOCK_OUT": tile.columns, "BLOCK_IN": tile.depth,
    }  # fmt: skip
    return _Call(tiles * cdiv(OUT, tile.columns), args, constants, tile)


def _of_biases(biases: Sequence[Tensor], K: int, O: int, *, tables: bool) -> tuple[Tensor, tuple[int, ...], bool, bool]:
    """K biases [O], or tables [1, O], or all of them in one [K, O]."""
    if len(biases) == 1 and biases[0].shape == (K, O):
        return biases[0], biases[0].stride(), False, False
    made = gathered(biases, K, (1, O) if tables else (O,), False)
    return made.tensor, (made.strides[0], made.strides[-1]), made.pointers, made.aligned


def forward(
    x: Tensor, take: Tensor | None, put: Tensor | None, offsets: Tensor, weights: Sequence[Tensor],
    biases: Sequence[Tensor], activation: int = 0, keep: bool = False, precision: str = "ieee",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.grouped_linear.forward``, with the activation's number; precision of float32: "ieee" or "tf32"."""
    like = (weights or biases)[0]
    N = x.shape[0] if take is None else take.shape[0]
    y = like.new_empty(N, like.shape[-2 if weights else -1])
    before = torch.empty_like(y) if keep else like.new_empty(0)
    with on(y):
        call = _rows(
            _dense_rows(x) if weights else None, dense(take), None, 0, weights, False, biases, dense(put),
            offsets.contiguous(), y, before if keep else None, activation, precision,
        )  # fmt: skip
        if call is not None:
            _launch(rows_kernel, call)
    return y, before


def backward(
    grad: Tensor, x: Tensor, take: Tensor | None, spread: Tensor | None, put: Tensor | None, offsets: Tensor,
    weights: Sequence[Tensor], modules: int, wants: tuple[bool, bool, bool], activation: int = 0,
    kept: Tensor | None = None, precision: str = "ieee",
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """As ``reference.grouped_linear.backward`` of stacked parameters, whether or not they are.

    Several sorted rows may read the same row of ``grad``.
    """
    N, O = _sorted_shape(grad, put)
    take, spread, put = dense(take), dense(spread), dense(put)
    grad, offsets = _dense_rows(grad), offsets.contiguous()
    kept = None if kept is None else _dense_rows(kept)
    slope = 0 if kept is None else activation
    F = x.shape[1] if weights else 0
    dx = grad.new_empty((N, F) if wants[0] else (0,))
    dw = grad.new_empty(modules, O, F) if wants[1] else None
    db = grad.new_empty(modules, O) if wants[2] else None
    with on(grad):
        if slope and _apart(N, modules, F, O, wants, grad, precision):
            grad, kept, slope, put = _sloped(grad, kept, slope, put), None, 0, None
        rows, sums = None, None
        if wants[0]:
            rows = _rows(grad, put, kept, slope, weights, True, (), spread, offsets, dx, None, 0, precision)
        if dw is not None or db is not None:
            source = _dense_rows(x) if wants[1] else None
            sums = _Sums.of(grad, kept, slope, put, source, take, offsets, dw, db, precision)
        if rows and sums and wants[1] and together(rows.tile, sums.call.tile, rows.programs + sums.call.programs, grad):
            _both(rows, sums.call)
        else:
            if rows:
                _launch(rows_kernel, rows)
            if sums:
                _launch(sums_kernel, sums.call)
        if sums:
            sums.finish(offsets, dw, db)
    return dx, [] if dw is None else [dw], [] if db is None else [db]


def _sorted_shape(grad: Tensor, put: Tensor | None) -> tuple[int, int]:
    """(N, O) of a gradient as sorted rows read it."""
    return grad.shape[0] if put is None else put.shape[0], grad.shape[1]


def _apart(N: int, K: int, F: int, O: int, wants: tuple[bool, bool, bool], like: Tensor, precision: str) -> bool:
    device = device_of(like)
    rows = rows_tile(N, K, O, F, like.dtype, precision, device) if wants[0] else None
    sums = sums_tile(N, K, F if wants[1] else 0, O, like.dtype, precision, device) if wants[1] or wants[2] else None
    return slope_apart(N, O, rows, sums, F)


def _sloped(grad: Tensor, kept: Tensor | None, slope: int, put: Tensor | None) -> Tensor:
    """The gradient before the activation [N, O], sorted."""
    assert kept is not None
    N, O = _sorted_shape(grad, put)
    g = grad.new_empty(N, O)
    wide = min(128, power_of_2(O))
    start.launch(
        slope_kernel, (cdiv(N, 2048 // wide) * cdiv(O, wide),), grad, grad.stride(0), kept, kept.stride(0), put, g, N,
        OUT=O, SLOPE=slope, BLOCK_N=2048 // wide, BLOCK_OUT=wide, warps=4, stages=2,
    )  # fmt: skip
    return g


def together(rows: Tile, sums: Tile, programs: int, like: Tensor) -> bool:
    """Whether gradients of x and of parameters are one launch: where all programs are small, and run nearly at once."""
    return rows.warps == sums.warps == 4 and programs <= 8 * multiprocessors(like.device)


def _both(rows: _Call, sums: _Call) -> None:
    constants = {
        **{name: rows.constants[name] for name in ("W_POINTERS", "W_ALIGNED", "SLOPE", "PRECISION", "SEARCH", "GROUP")},
        "F": rows.constants["OUT"], "O": rows.constants["IN"], "PIECE": sums.constants["PIECE"],
        "ROWS_N": rows.tile.rows, "ROWS_F": rows.tile.columns, "ROWS_O": rows.tile.depth,
        "SUMS_O": sums.tile.rows, "SUMS_F": sums.tile.columns, "SUMS_N": sums.tile.depth,
    }  # fmt: skip
    _, _, _, _, _, x, x_row, take, _, dw, dw_stride, db, db_stride, _ = sums.args
    args = (*rows.args, rows.programs, x, x_row, take, dw, dw_stride, db, db_stride)
    _launch(gradients_kernel, _Call(rows.programs + sums.programs, args, constants, rows.tile))


class _Sums(NamedTuple):
    """``sums_kernel`` into dw [K, O, F] and db [K, O], those that are wanted, or into pieces of them."""

    call: _Call
    partial: Tensor | None

    @classmethod
    def of(
        cls, grad: Tensor, kept: Tensor | None, slope: int, put: Tensor | None, x: Tensor | None, take: Tensor | None,
        offsets: Tensor, dw: Tensor | None, db: Tensor | None, precision: str,
    ) -> _Sums | None:  # fmt: skip
        N, O = _sorted_shape(grad, put)
        K, F = offsets.shape[0] - 1, 0 if dw is None else dw.shape[2]
        dw = dw if F else None
        if K * O == 0 or (dw is None and db is None):
            return None
        tile, piece, pieces = sums_tile(N, K, F, O, grad.dtype, precision, device_of(grad), slope > 0)
        into, dw_stride, db_stride, partial = (dw, db), O * F, O, None
        if piece:
            dw_stride = db_stride = O * F + (0 if db is None else O)
            partial = grad.new_empty(pieces, dw_stride, dtype=torch.float32)
            into = (None if dw is None else partial, None if db is None else partial[:, O * F :])
        args = (
            grad, grad.stride(0), kept if slope else None, O if kept is None else kept.stride(0), put,
            x if F else None, x.stride(0) if x is not None and F else 0, take,
            offsets, into[0], dw_stride, into[1], db_stride, K,
        )  # fmt: skip
        constants = {
            "IN": max(F, 1), "OUT": O, "PIECE": piece, "SLOPE": slope, "PRECISION": precision, "SEARCH": search(K),
            "BLOCK_OUT": tile.rows, "BLOCK_IN": tile.columns, "BLOCK_N": tile.depth,
        }  # fmt: skip
        tiles = cdiv(O, tile.rows) * (cdiv(F, tile.columns) + (db is not None))
        return cls(_Call(pieces * tiles, args, constants, tile), partial)

    def finish(self, offsets: Tensor, dw: Tensor | None, db: Tensor | None) -> None:
        """Add up the pieces."""
        if self.partial is None:
            return
        width, O, block = self.partial.shape[1], self.call.constants["OUT"], 1024
        start.launch(
            reduce_kernel, (offsets.shape[0] - 1, cdiv(width, block)), self.partial, width, offsets,
            dw if dw is not None and dw.numel() else None, db, width - (0 if db is None else O),
            OUT=O, PIECE=self.call.constants["PIECE"], BLOCK=block, warps=4, stages=2,
        )  # fmt: skip
