"""The plan of ``vector_routing``: what shapes decide, without running anything."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastroute.kernels.vector_routing.plan import PARTIAL, SCRATCH, Plan, padded, plan, product_dtype

SHAPES = [
    (1, 1, 2, 1),
    (4, 2000, 1000, 1024),
    (1, 1_000_000, 100, 1024),
    (50, 4925, 64, 1024),
    (4096, 100, 10, 64),
    (2, 300, 4096, 24),
]
OPTIONS = [
    {"operands": g, "backward": b, "own_rows": o, "made_gate": b}
    for g, b, o in itertools.product((1, 2, 4), (False, True), (False, True))
]


def chunk_bytes(chosen: Plan, m: int, size: int, operands: int, backward: bool) -> int:
    """Of coefficient and score."""
    a_row = padded(m) * ((operands if backward else 1) * size + (0 if chosen.one_pass else 4 * operands))
    return chosen.batch * chosen.rows * a_row


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    B, n, m, d = shape
    for options in OPTIONS:
        chosen = plan(B, n, m, d, dtype, "tf32", **options)
        assert chunk_bytes(chosen, m, dtype.itemsize, options["operands"], options["backward"]) <= SCRATCH
        assert chosen.batch == 1 or chosen.batch * options["operands"] * padded(m) * d * dtype.itemsize <= SCRATCH
        assert chosen.splits == 1 or chosen.splits * B * m * d * 4 <= PARTIAL
        assert 1 <= chosen.batch <= B and 1 <= chosen.rows <= n


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_tiles_are_legal(shape: tuple[int, int, int, int], precision: str) -> None:
    """Powers of two, at least 16 on every side of a product, a whole row of outputs on chip."""
    B, n, m, d = shape
    for options in OPTIONS:
        chosen = plan(B, n, m, d, torch.float32, precision, **options)
        products = [chosen.aggregate, chosen.spread, *([chosen.row] if chosen.one_pass else [chosen.score])]
        for tile in products:
            assert all(side >= 16 and side & (side - 1) == 0 for side in tile[:3])
        assert chosen.row.columns >= padded(m) and chosen.row.rows & (chosen.row.rows - 1) == 0


@pytest.mark.parametrize("shape", [*SHAPES, (1, 500, 250, 256), (4, 200, 250, 1024)])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_operands_fit(shape: tuple[int, int, int, int], precision: str, shared: int) -> None:
    """All stages of the tiles that a product's step reads."""
    size = product_dtype(torch.float32, precision).itemsize
    for options in OPTIONS:
        chosen = plan(*shape, torch.float32, precision, shared=shared, **options)
        products = [(tile, tile.columns) for tile in (chosen.score, chosen.aggregate, chosen.spread)]
        if chosen.one_pass:
            products.append((chosen.row, options["operands"] * chosen.row.columns))
        for tile, columns in products:
            assert (tile.rows + columns) * tile.depth * size * tile.stages <= shared


@pytest.mark.parametrize(
    ("shape", "options", "one_pass"),
    [
        ((1, 1_000_000, 64, 1024), {"operands": 1}, True),
        ((1, 1_000_000, 100, 1024), {"operands": 1}, False),
        ((1, 1_000_000, 100, 1024), {"operands": 0}, True),
        ((1, 1_000_000, 64, 1024), {"operands": 2, "backward": True, "own_rows": True}, True),
        ((4, 100_000, 64, 1024), {"operands": 2, "backward": True, "own_rows": True}, False),
        ((4, 100_000, 32, 1024), {"operands": 2, "backward": True, "own_rows": True}, True),
        ((1, 2000, 250, 256), {"operands": 1}, True),
        ((4, 2000, 1000, 1024), {"operands": 1}, False),
    ],
)
def test_path(shape: tuple[int, int, int, int], options: dict[str, Any], one_pass: bool) -> None:
    assert plan(*shape, torch.bfloat16, **options).one_pass is one_pass


def test_parameters_are_read_once() -> None:
    """Where parameters have rows of their own and gradients, one program sees every sample of a row tile."""
    for shape in SHAPES:
        assert plan(*shape, torch.bfloat16, operands=2, backward=True, own_rows=True).groups == 1


def test_million_fits_beside_its_inputs() -> None:
    """Extra memory at 1,000,000 x 1024 to 100 x 1024 stays under 100 MB in every pass."""
    for options in (
        {"operands": 0},
        {"operands": 1},
        {"operands": 1, "backward": True},
        {"operands": 2, "backward": True},
    ):
        chosen = plan(1, 1_000_000, 100, 1024, torch.float32, "tf32", **options)
        chunk = chunk_bytes(chosen, 100, 4, options["operands"], "backward" in options)
        stack = options["operands"] * padded(100) * 1024 * 4
        assert chunk + stack + (chosen.splits + 1) * 100 * 1024 * 4 < 80 << 20
