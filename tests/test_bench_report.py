"""The tables and pictures of docs/benchmarks.md, made of result files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench import report
from bench.__main__ import RESULTS


def test_the_page_is_rewritten_from_the_results_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "benchmarks.md"
    shutil.copy(report.PAGE, page)
    monkeypatch.setattr(report, "PAGE", page)
    report.rewrite(RESULTS)
    assert "**Targets**" in page.read_text()
    report.rewrite(RESULTS)


def cell(inputs: int, isa: str, ratio: float) -> dict[str, object]:
    size = {"B": 1, "n": inputs, "m": 2, "d": 3, "h": 4, "any_length": False}
    ratios = {"eager": [ratio / 2, ratio, 2 * ratio]}
    return {"size": size, "pass": "forward", "threads": 1, "isa": isa, "load": 0.5, "ratios": ratios}


def test_cells_of_a_grid_are_rows_by_instruction_set() -> None:
    ran = [cell(10, "avx512", 2.0), cell(1000, "avx512", 0.5), cell(10, "avx2", 3.0), {"off": "y", "isa": "avx2"}]
    rows = report._rows({"benchmarks": [{"extra_info": {"grid": ran}}, {"extra_info": {}}]})
    grids = report._grids("x-cpu", rows)
    assert [(name, len(rows)) for name, rows in grids.items()] == [("bench_x-cpu", 2), ("bench_x-cpu-avx2", 1)]
    said = report._grid("bench_x-cpu", grids["bench_x-cpu"])
    assert said[0].startswith("**A grid of 2 sizes** (") and "1 of 2 cells at 1.00× or more" in said[1]
    assert "0.50× at 1, 1000×3 → 2×4, forward" in said[1]
    assert "2 sizes under avx2" not in report._grid("p", grids["bench_x-cpu-avx2"])[0]
    assert "1 sizes under avx2" in report._grid("p", grids["bench_x-cpu-avx2"])[0]
