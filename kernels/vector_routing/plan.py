"""Which kernels one routing iteration takes, in which tiles: a pure function of shapes and dtypes.

Axes: B batch, n input rows, m outputs, d width of an input row, G operands: [m, d] matrices that multiply x in the row
kernel (pred when scored; use and ign when linear in x; dM in the backward pass).

The rule
--------
Every iteration runs over chunks of rows, each a few launches: a *row kernel* makes what belongs to an input row (R,
phi, and in the backward pass every gradient of a row) and writes ``coefficient``, the stacked phi, dL, duse and dign of
the chunk, once, in the dtype of the products; then ``aggregate`` (coefficient^T x, split over rows) and ``spread``
(coefficient times the stacked operands, into dx).

* **one pass**: the row kernel makes its own products with x, all m logits of a row tile on chip, in 16 pairs per thread
  (8 where the gradients of four parameters add up over the batch beside them; more would spill). Taken where that is a
  tile of 64 rows or more, so m <= 64 (32); and up to m = 256 where all tiles run at once, so launches are what costs.
  With fewer rows to a tile, reading the operands again for each tile would cost more than a float32 detour of the
  logits through L2. Where there is no product at all (G = 0) it is taken at any m.
* **two phase**: else ``score`` makes the products, a plain matrix product into float32 scratch of the chunk, and the
  row kernel reads whole rows from there: no row statistics to reconcile, and no product is made twice.

A chunk's coefficient and score take at most SCRATCH bytes (but it has at least 16 rows of one sample), and so do the
stacked operands of its samples; partial sums over rows take at most PARTIAL bytes, or one buffer of the result's size.
Tiles shrink while there are fewer programs than multiprocessors. The buffers of a product's operands, all stages of
them, stay within a block's shared memory: a product takes a smaller tile, which holds its sums without spilling where
products are not asynchronous, and the row kernel, whose outputs are all on chip, goes in shallower steps, or in two
phases.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import SHARED, SMS, Tile, cdiv, power_of_2

# Bytes, chosen without a GPU: "To tune" of bench/GPU.md has SCRATCH, for which bench/gpu_first/tables.py times others.
SCRATCH = 64 << 20
PARTIAL = 24 << 20
MAX_OUTPUTS = 16384  #: a whole row of outputs is on chip: 16 per thread in the widest program


class Plan(NamedTuple):
    """Everything that shapes decide."""

    one_pass: bool
    batch: int  #: samples of a chunk
    rows: int  #: input rows of a chunk
    groups: int  #: programs that share out the samples of a row tile in the row kernel
    row: Tile  #: the row kernel: (input rows, outputs, d)
    score: Tile  #: (input rows, stacked outputs, d)
    aggregate: Tile  #: (stacked outputs, d, input rows)
    spread: Tile  #: (input rows, d, stacked outputs)
    splits: int  #: of the rows of a chunk in aggregate
    shared_splits: int  #: likewise, where the sum is over the batch too


def padded(m: int) -> int:
    """Rows of an operand in the stack: whole 16s, so that every row of scratch is aligned."""
    return cdiv(m, 16) * 16


def product_dtype(dtype: torch.dtype, precision: str) -> torch.dtype:
    """What the operands of the products are cast to."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, dtype)


# Largest first: a wide tile reads its operands less often; a pass over fewer tiles than multiprocessors wastes some.
_TENSOR_CORE_TILES = (
    (256, 128),
    (128, 256),
    (128, 128),
    (128, 64),
    (64, 128),
    (64, 64),
    (32, 64),
    (32, 32),
    (16, 32),
    (16, 16),
)
_PLAIN_TILES = ((128, 64), (64, 64), (32, 64), (32, 32), (16, 32), (16, 16))


def _product_tile(
    rows: int, columns: int, depth: int, copies: int, itemsize: int, cores: bool, sms: int, shared: int,
    largest: int = 256 * 128,
) -> Tile:  # fmt: skip
    """Tile of a matrix product of [rows, depth] by [depth, columns], ``copies`` of them in one launch."""
    step, stages = min(64 if itemsize == 2 else 32, power_of_2(depth)), 3 if cores else 2
    for high, wide in _TENSOR_CORE_TILES if cores else _PLAIN_TILES:
        if high * wide > largest or high > 2 * rows or wide > 2 * columns:
            continue
        if (high + wide) * step * itemsize * stages > shared:
            continue
        if 4 * cdiv(rows, high) * cdiv(columns, wide) * copies >= 3 * sms:
            break
    high, wide = min(high, power_of_2(rows)), min(wide, power_of_2(columns))
    return Tile(high, wide, step, 8 if high * wide >= 64 * 128 else 4, stages)


def _pairs(loops: bool) -> int:
    """Pairs (input row, output) of the one-pass row kernel's tile: what 8 warps hold without spilling."""
    return 256 * (8 if loops else 16)


def _row_tile(
    n: int, groups: int, m: int, d: int, pairs: int, operands: int, itemsize: int, cores: bool, sms: int, shared: int
) -> Tile:
    """Tile of the row kernel that makes its own products."""
    wide = power_of_2(m)
    high = min(128, max(16, pairs // wide), power_of_2(n))
    while high > 16 and cdiv(n, high) * groups < sms:
        high //= 2
    depth, stages = min(64 if itemsize == 2 else 32, power_of_2(d)), 3 if cores else 2
    while depth > 16 and (high + operands * wide) * depth * itemsize * stages > shared:
        depth //= 2
    return Tile(high, wide, depth, 8 if 2 * high * wide > pairs else 4, stages)


def _whole_row_tile(n: int, m: int, d: int, sms: int) -> Tile:
    """Tile of the row kernel that makes no products: some 2048 pairs, or one row."""
    wide = power_of_2(m)
    high = max(1, min(32, 2048 // wide, power_of_2(n, at_least=1)))
    while high > 1 and cdiv(n, high) < sms:
        high //= 2
    warps = min(32, max(4, high * wide // 512 if wide > 4096 else high * wide // 256))
    return Tile(high, wide, min(max(32, 2048 // high), power_of_2(d), 1024), warps, 2)


def leaves(n: int, m: int, d: int, operands: int, passes: int, dtype: torch.dtype, precision: str = "ieee") -> bool:
    """Whether passes of the backward leave their part of dx to the last: coefficients and operands are kept till then.

    A pass that adds to dx reads and writes it, 2 d numbers a row; one that leaves it keeps ``operands`` padded(m).
    Taken where all that is kept is at most a quarter of x.
    """
    kept = passes * operands * padded(m) * (n + d) * product_dtype(dtype, precision).itemsize
    return 4 * kept <= n * d * dtype.itemsize


def plan(
    B: int,
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    precision: str = "ieee",
    *,
    operands: int,
    backward: bool = False,
    own_rows: bool = False,
    made_gate: bool = False,
    one_pass: bool | None = None,
    sms: int = SMS,
    shared: int = SHARED,
) -> Plan:
    """Blocks and path for one iteration.

    Args:
        operands: G, the [m, d] matrices that multiply x in the row kernel.
        backward: the backward pass, whose coefficients are as many as its operands (forward: phi alone).
        own_rows: gradients of parameters with a row per input row are wanted, so one program sees every sample.
        made_gate: the backward pass of an iteration that made its gates.
        one_pass: force the path; None chooses.
        sms: multiprocessors to fill.
        shared: bytes of shared memory that a block may use.
    """
    kind = product_dtype(dtype, precision)
    cores = kind != torch.float32 or precision == "tf32"
    size = kind.itemsize
    outputs = padded(m)
    wide = power_of_2(m)
    pairs = _pairs(backward and own_rows and B > 1)
    if one_pass is None:
        high = pairs // wide
        fits = (high + operands * wide) * 16 * size * (3 if cores else 2) <= shared
        one_pass = fits and (high >= 64 or (high >= 16 and B * cdiv(n, high) <= 2 * sms))
    one_pass = one_pass or operands == 0
    coefficients = operands if backward else 1

    stack = operands * outputs * d * size
    row_bytes = outputs * (coefficients * size + (0 if one_pass else operands * 4))
    batch = max(1, min(B, 32768, SCRATCH // max(stack, 1), SCRATCH // (min(n, 64) * row_bytes)))
    rows = max(16, SCRATCH // (batch * row_bytes))
    wave = cdiv(256 * sms, 256 * batch) * 256  # rows that give every multiprocessor one tile of 256
    if rows >= n:
        rows = n
    elif rows >= wave:
        rows = rows // wave * wave
    else:
        rows = max(16, min(rows // 128 * 128, cdiv(cdiv(n, cdiv(n, rows)), 128) * 128))

    groups = max(1, min(batch, cdiv(4 * sms, cdiv(rows, 64))))
    if backward:
        groups = 1 if own_rows else batch
    if one_pass and operands:
        row = _row_tile(rows, groups, m, d, pairs, operands, size, cores, sms, shared)
    else:
        row = _whole_row_tile(rows, m, d, sms)
        if not backward:
            groups = min(batch, cdiv(2 * sms, cdiv(rows, row.rows)))

    K = coefficients * outputs
    score = _product_tile(rows, operands * outputs, d, batch, size, cores, sms, shared)
    spread = _product_tile(rows, d, K, batch, size, cores, sms, shared, largest=(64 if made_gate else 128) * 128)
    aggregate = _product_tile(outputs, d, rows, batch * cdiv(rows, 256), size, cores, sms, shared)
    tiles = cdiv(outputs, aggregate.rows) * cdiv(d, aggregate.columns)
    programs = sms if aggregate.rows * aggregate.columns > 128 * 128 else 2 * sms
    most = cdiv(rows, 4 * aggregate.depth)
    splits = max(1, min(programs // (tiles * batch), most, PARTIAL // (4 * B * m * d)))
    shared_splits = max(1, min(programs // tiles, most, PARTIAL // (8 * m * d)))
    return Plan(one_pass, batch, rows, groups, row, score, aggregate, spread, splits, shared_splits)
