"""Which blocks the kernels of ``grouped_linear`` take: a pure function of sizes and dtypes, never of the counts.

Axes: N rows, K modules, IN columns read, OUT columns written.

The rule
--------
Counts stay on the device, so tiles are chosen as if rows were spread evenly, N / K to a module:

* a tile is not higher than the rows of such a module (half of it would be empty), nor wider than the columns, and
  shrinks until there are tiles for three quarters of the multiprocessors;
* with tensor cores the largest is 128 x 256 of 8 warps (128 numbers of the sum in each thread), 128 x 128 for float32;
  without them 64 x 64;
* what a step reads, in all its stages, stays within a block's shared memory: a tile is smaller where that is small,
  which also keeps the sum in registers on GPUs whose products read their operands from registers;
* rows of halves that do not lie at multiples of 4 bytes are loaded one by one, through registers: 64 x 64 at most,
  and 16 deep;
* a step is 64 halves or 32 floats deep, a cache line and no more, for every tile: deeper ones save nothing where loads
  are pipelined;
* weights' gradients are summed by one program each, unless a module with all the rows would keep the machine waiting:
  then in pieces of PIECE rows or more, as long as all pieces' sums fit PARTIAL bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..launch import SHARED, SMS, Tile, cdiv, power_of_2

# Chosen without a GPU: "To tune" of bench/GPU.md has SLOPES, bench/gpu_first/tables.py times others for PIECE.
PARTIAL = 64 << 20  #: bytes
PIECE = 512  #: rows
SLOPES = 1 << 23  #: numbers that are made again and again before a pass of their own makes them once
SEARCH = 1024  #: offsets that a tile looks at together to find its module: in registers

_TENSOR_CORE_TILES = ((128, 256), (128, 128), (64, 128), (64, 64), (32, 64), (32, 32), (16, 32), (16, 16))
_PLAIN_TILES = ((64, 64), (32, 64), (32, 32), (16, 32), (16, 16))


class Device(NamedTuple):
    """What plans ask a GPU."""

    sms: int = SMS  #: multiprocessors
    shared: int = SHARED  #: bytes of shared memory that a block may use


_HERE = Device()


def _tile(
    rows: int, columns: int, depth: int, copies: int, itemsize: int, cores: bool, words: bool, sloped: bool,
    device: Device,
) -> Tile:  # fmt: skip
    """Of a product of [rows, depth] by [depth, columns], so many times; ``words``: rows lie at multiples of 4 bytes.

    ``sloped``: the first operand is made of two tensors.
    """
    deep = 16 if not words else 64 if itemsize == 2 else 32
    step, stages = min(deep, power_of_2(depth)), 3 if cores else 2
    for high, wide in _TENSOR_CORE_TILES if cores else _PLAIN_TILES:
        if high > max(16, rows) or wide >= max(32, 2 * columns) or (high * wide > 64 * 64 and not words):
            continue
        if wide == 256 and itemsize == 4:  # its steps and its result take twice the room
            continue
        if (high * (1 + sloped) + wide) * step * itemsize * stages > device.shared:
            continue
        if 4 * copies * cdiv(rows, high) * cdiv(columns, wide) >= 3 * device.sms:
            break
    return Tile(high, wide, step, 8 if high * wide >= 128 * 128 else 4, stages)


def _cores(dtype: torch.dtype, precision: str) -> bool:
    return dtype != torch.float32 or precision == "tf32"


@lru_cache(4096)
def rows_tile(
    N: int, K: int, IN: int, OUT: int, dtype: torch.dtype, precision: str = "ieee", device: Device = _HERE,
    sloped: bool = False,
) -> Tile:  # fmt: skip
    """Of ``rows_kernel``: (rows of a module, OUT, IN)."""
    words = IN * dtype.itemsize % 4 == 0 and OUT * dtype.itemsize % 4 == 0
    return _tile(cdiv(N, K), OUT, IN, min(N, K), dtype.itemsize, _cores(dtype, precision), words, sloped, device)


class Sums(NamedTuple):
    """How gradients of parameters are summed."""

    tile: Tile  #: (OUT, IN, rows of a module)
    piece: int  #: rows that one program adds up, 0: all of a module's
    pieces: int  #: how many of them there may be, or K


@lru_cache(4096)
def sums_tile(
    N: int, K: int, IN: int, OUT: int, dtype: torch.dtype, precision: str = "ieee", device: Device = _HERE,
    sloped: bool = False,
) -> Sums:  # fmt: skip
    """Of ``sums_kernel``; IN is 0 where biases alone are summed."""
    words = IN * dtype.itemsize % 4 == 0 and OUT * dtype.itemsize % 4 == 0
    cores = _cores(dtype, precision)
    tile = _tile(OUT, max(IN, 1), cdiv(N, K), min(N, K), dtype.itemsize, cores, words, sloped, device)
    tiles = cdiv(OUT, tile.rows) * (cdiv(IN, tile.columns) + 1)
    piece = power_of_2(cdiv(N * tiles, 2 * device.sms), at_least=PIECE)
    while piece < N and (N // piece + K) * (OUT * IN + OUT) * 4 > PARTIAL:
        piece *= 2
    if 4 * piece > N:
        return Sums(tile, 0, K)
    return Sums(tile, piece, N // piece + K)


def row_tiles(N: int, K: int, height: int) -> int:
    """A bound on the tiles of N rows in K modules, and those of dropped rows."""
    return min(N // height + K + 1, N + K + 1)


def search(K: int) -> int:
    return min(SEARCH, power_of_2(K + 1))


def slope_apart(N: int, O: int, rows: Tile | None, sums: Sums | None, F: int) -> bool:
    """Whether the slope is a pass of its own: by how often it would be made in ``rows_kernel`` and ``sums_kernel``."""
    visits = cdiv(F, rows.columns) if rows else 0
    visits += cdiv(F, sums.tile.columns) + 1 if sums else 0
    return visits > 1 and visits * N * O > SLOPES
