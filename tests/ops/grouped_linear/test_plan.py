"""What sizes decide about ``grouped_linear``'s kernels, and how a tile finds its module, without running anything."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from fastroute.kernels.grouped_linear.plan import PARTIAL, Device, row_tiles, rows_tile, search, slope_apart, sums_tile

SIZES = [
    (0, 3, 8, 8),
    (1, 1, 1, 1),
    (1024, 20, 128, 48),
    (4096, 4, 512, 512),
    (4096, 100, 64, 1),
    (262144, 128, 2048, 768),
    (300_000_000, 2, 16, 16),
    (50, 5000, 7, 9),
]
KINDS = [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")]


@given(st.lists(st.integers(0, 70), min_size=1, max_size=9), st.integers(0, 40), st.sampled_from([16, 32, 64]))
def test_every_row_has_one_tile(counts: list[int], dropped: int, R: int) -> None:
    """Module k's tiles start at offsets[k] // R + k: they never overlap, and there are no more than the bound."""
    K, offsets = len(counts), [0, *itertools.accumulate(counts)]
    N = offsets[-1] + dropped
    covered = []
    for tile in range(row_tiles(N, K, R)):
        k = sum(offsets[j] // R + j <= tile for j in range(K + 1)) - 1
        start = offsets[k] + (tile - offsets[k] // R - k) * R
        covered += range(start, min(start + R, [*offsets[1:], N][k]))
    assert covered == list(range(N))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype, precision", KINDS, ids=str)
@pytest.mark.parametrize("sms", [2, 132])
def test_tiles_are_legal(size: tuple[int, ...], dtype: torch.dtype, precision: str, sms: int) -> None:
    N, K, F, O = size
    device = Device(sms)
    for tile in (
        rows_tile(N, K, F, O, dtype, precision, device), rows_tile(N, K, O, F, dtype, precision, device),
        sums_tile(N, K, F, O, dtype, precision, device).tile, sums_tile(N, K, 0, O, dtype, precision, device).tile,
    ):  # fmt: skip
        assert all(side >= 16 and side & (side - 1) == 0 for side in tile[:3])
        staged = (tile.rows + tile.columns) * tile.depth * dtype.itemsize * tile.stages
        assert staged <= 160 << 10 and tile.rows * tile.columns <= 128 * 32 * tile.warps


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype, precision", KINDS, ids=str)
@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("sloped", [False, True])
def test_operands_fit(size: tuple[int, ...], dtype: torch.dtype, precision: str, shared: int, sloped: bool) -> None:
    """All stages of what a step reads, twice as much of the operand that is made of two tensors."""
    N, K, F, O = size
    for IN, OUT in ((F, O), (O, F)):
        rows = rows_tile(N, K, IN, OUT, dtype, precision, Device(132, shared), sloped)
        sums = sums_tile(N, K, IN, OUT, dtype, precision, Device(132, shared), sloped).tile
        for tile in (rows, sums):
            a_step = (tile.rows * (1 + sloped) + tile.columns) * tile.depth * dtype.itemsize
            assert a_step * tile.stages <= shared


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pieces(size: tuple[int, ...]) -> None:
    """They take bounded memory, and are there only where they shorten the longest sum fourfold."""
    N, K, F, O = size
    made = sums_tile(N, K, F, O, torch.float32)
    if made.piece == 0:
        assert made.pieces == K
    else:
        assert 4 * made.piece <= N and made.pieces == N // made.piece + K
        assert made.pieces * (O * F + O) * 4 <= PARTIAL


def test_regimes() -> None:
    """Few rows: small tiles, more than half as many as multiprocessors, one launch for all sums. Many: large tiles."""
    small = rows_tile(1024, 20, 128, 48, torch.float32)
    assert row_tiles(1024, 20, small.rows) * -(-48 // small.columns) >= 132
    assert sums_tile(1024, 20, 128, 48, torch.float32).piece == 0
    large = rows_tile(262144, 128, 2048, 768, torch.bfloat16)
    assert large[:3] == (128, 256, 64) and large.warps == 8
    sums = sums_tile(262144, 128, 2048, 768, torch.bfloat16)
    assert sums.tile[:2] == (128, 256) and sums.piece == 0
    assert slope_apart(262144, 768, large, sums, 2048)
    assert not slope_apart(1024, 48, small, sums_tile(1024, 20, 128, 48, torch.float32), 128)
    assert sums_tile(4096, 4, 128, 48, torch.float32).piece == 512


def test_odd_rows_of_halves_take_small_tiles() -> None:
    assert max(rows_tile(100_000, 4, 77, 129, torch.float16)[:2]) <= 64


def test_search() -> None:
    assert [search(K) for K in (1, 20, 1000, 100_000)] == [16, 32, 1024, 1024]
