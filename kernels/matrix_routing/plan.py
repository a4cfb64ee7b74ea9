"""Blocks and launches of one iteration of matrix routing: a pure function of shapes.

Axes: B batch, n inputs, m outputs, c rows, d columns before, h columns after routing.

The rule
--------
Inputs go in chunks, so that what is kept per pair (i, j) takes at most SCRATCH bytes. A chunk is three launches in
either pass: ``pairs`` (not in an unscored forward pass), ``assign``, then ``moments`` or ``gradient``. A program of the
three kernels with votes has a tile of outputs and walks along a split of the inputs, so that what is per output is read
once; its lanes are samples, which share an input's parameters, or with shared parameters inputs. A tile has as many
pairs as registers allow: 16 numbers per thread of each of its six matrices forward, 8 of the eleven of ``gradient``,
half as many where votes are matrix products proper, whose operands take registers too.
There are some four programs to a multiprocessor, at least 16 steps to a split.
"""

from __future__ import annotations

from typing import NamedTuple

from ..launch import SMS, cdiv, power_of_2

SCRATCH = 64 << 20  #: bytes, as vector routing's; chosen without a GPU
MAX_OUTPUTS = 16384  #: a whole row of outputs is on chip in ``assign``
MAX_CAPSULE = 4096  #: c and h, padded to powers of two, multiplied
DEEP = 16  #: columns from which votes are matrix products proper


class VoteTile(NamedTuple):
    """Block of a kernel that makes votes: lanes x outputs, each a padded capsule."""

    lanes: int
    outputs: int
    rows: int  #: c, padded
    columns: int  #: h, padded
    depth: int
    deep: bool
    warps: int


class RowTile(NamedTuple):
    """Block of a kernel that takes whole rows of outputs."""

    inputs: int
    outputs: int  #: m, padded
    warps: int


class Plan(NamedTuple):
    """Everything that shapes decide."""

    batch: int  #: samples of a chunk
    rows: int  #: inputs of a chunk
    light: VoteTile  #: of ``pairs`` and ``moments``
    heavy: VoteTile  #: of ``gradient``
    row: RowTile
    light_split: int  #: inputs along which a program walks
    heavy_split: int
    row_split: int
    heavy_tiles: int  #: batch tiles of a program of ``gradient``


def capsule(c: int, h: int) -> int:
    """Numbers of a padded capsule."""
    return power_of_2(c, 1) * power_of_2(h, 1)


def _vote_tile(lanes: int, m: int, c: int, d: int, h: int, per_thread: int) -> VoteTile:
    """``lanes``: samples, or inputs, that there are to fill them."""
    deep = d >= DEEP
    rows, columns = power_of_2(c, 1), power_of_2(h, 1)
    per_thread = per_thread // 2 if deep else per_thread
    pairs = max(1, 128 * per_thread // (rows * columns))
    low = (16 // rows, 16 // columns) if deep else (1, 1)  # a product has at least 16 rows and columns
    wide = max(low[0], min(16, power_of_2(lanes, 1), pairs))
    outputs = max(1, low[1], min(pairs // wide, power_of_2(m, 1)))
    numbers = wide * outputs * rows * columns
    warps = max(4, min(16, numbers // (32 * per_thread)))
    return VoteTile(wide, outputs, rows, columns, min(32, power_of_2(d)), deep, warps)


def _row_tile(m: int, pairs: int) -> RowTile:
    """At least a pair for each thread: the kernel writes where it reads, and no two threads may have the same pair."""
    wide = power_of_2(m, 1)
    high = max(1, min(max(32, 128 // wide), pairs // wide))
    return RowTile(high, wide, max(4, min(32, high * wide // (pairs // 4))))


def _split(rows: int, step: int, others: int, sms: int) -> int:
    """Inputs per program, whole steps, where ``others`` programs share every split."""
    splits = max(1, min(cdiv(4 * sms, others), cdiv(rows, 16 * step)))
    return cdiv(cdiv(rows, splits), step) * step


def plan(
    B: int, n: int, m: int, c: int, d: int, h: int, *, shared: bool, backward: bool = False, sms: int = SMS
) -> Plan:
    """Blocks, chunks and splits for one iteration.

    Args:
        shared: one set of parameters serves every input.
        backward: the backward pass, which keeps two numbers per pair and d_mu_inp per output tile.
        sms: multiprocessors to fill.
    """
    lanes = n if shared else B
    light, heavy = _vote_tile(lanes, m, c, d, h, 16), _vote_tile(lanes, m, c, d, h, 8)
    each = 4 * (2 * m + cdiv(m, heavy.outputs) * c * d if backward else m)  # bytes per input and sample
    batch = max(1, min(B, 32768, SCRATCH // (each * min(n, 64))))
    rows = max(1, min(n, SCRATCH // (each * batch)))
    row = _row_tile(m, 1024 if backward else 2048)

    def split(tile: VoteTile, samples: int) -> int:
        return _split(rows, tile.lanes if shared else 1, cdiv(m, tile.outputs) * samples, sms)

    light_split = split(light, batch if shared else cdiv(batch, light.lanes))
    if shared:  # enough groups of samples; more would only be more sums to keep apart
        groups = min(batch, cdiv(4 * sms, cdiv(m, heavy.outputs)))
        heavy_tiles = cdiv(batch, groups)
    else:
        groups, heavy_tiles = 1, cdiv(batch, heavy.lanes)
    return Plan(
        batch, rows, light, heavy, row, light_split, split(heavy, groups),
        _split(rows, row.inputs, batch, sms), heavy_tiles,
    )  # fmt: skip
