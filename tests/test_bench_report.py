"""The tables and pictures of docs/benchmarks.md, made of result files."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from bench import instruction_sets, report
from bench.__main__ import RESULTS, runs


@pytest.mark.long
def test_pages_are_rewritten_from_the_results_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {which: tmp_path / page.name for which, page in report.PAGES.items()}
    for which, page in pages.items():
        shutil.copy(report.PAGES[which], page)
    monkeypatch.setattr(report, "PAGES", pages)
    report.rewrite(RESULTS)
    written = {page: page.read_text() for page in pages.values()}
    assert all("**Targets**" in text for text in written.values())
    monkeypatch.setattr(report, "heat_map", lambda grid, path: None)  # pictures take seconds
    report.rewrite(RESULTS)
    assert written == {page: page.read_text() for page in pages.values()}


def cell(inputs: int, ratio: float) -> dict[str, object]:
    size = {"B": 1, "n": inputs, "m": 2, "d": 3, "h": 4, "any_length": False}
    ratios = {"eager": [ratio / 2, ratio, 2 * ratio]}
    return {"size": size, "pass": "forward", "threads": 1, "load": 0.5, "ratios": ratios}


def test_cells_of_a_grid_are_rows() -> None:
    ran = [cell(10, 2.0), cell(1000, 0.5), {"off": "y"}]
    rows = report._rows({"benchmarks": [{"extra_info": {"grid": ran}}, {"extra_info": {}}]})
    said = report._grid("x-cpu", rows)
    assert said[0].startswith("**A grid of 2 sizes** (") and "1 of 2 cells at 1.00× or more" in said[1]
    assert "0.50× at 1, 1000×3 → 2×4, forward" in said[1] and said[2].endswith("(img/bench_x-cpu.png)")
    held = report._rows({"benchmarks": [{"extra_info": {"grid": [{**one, "isa": "avx2"} for one in ran[:2]]}}]})
    assert "2 sizes, held to avx2**" in report._grid("x-cpu-avx2", held)[0]


@pytest.mark.parametrize(
    ("held", "cpuinfo", "kind"),
    [
        ("avx512", "AuthenticAMD", "cpu"), ("avx2", "AuthenticAMD avx512f", "cpu-avx2"), ("default", "", "cpu-avx2"),
        ("", "AuthenticAMD avx512f", "cpu"), ("", "GenuineIntel avx512f", "cpu-intel"),
        ("", "GenuineIntel", "cpu-avx2"), ("", "", "cpu-avx2"),
    ],
)  # fmt: skip
def test_results_are_named_by_the_processor(
    held: str, cpuinfo: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instruction_sets, "HELD_TO", held)
    monkeypatch.setattr(instruction_sets, "cpuinfo", lambda: cpuinfo)
    asked = Namespace(suites=["vector_routing", "tasks"], k=None, gpu=False)
    names = {name for _, name, _ in runs(asked)}
    assert names == {f"vector_routing-{kind}", f"vector_routing-{kind}-grid", f"tasks-{kind}"}
    assert all(f"<!-- begin {name} -->" in report.PAGES[kind[4:]].read_text() for name in names)
