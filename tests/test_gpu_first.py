"""The run on a bare GPU machine: what hangs, crashes or prints garbage loses itself alone, and the clock is kept."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as bench
from bench import bench_vector_routing, harness
from bench.gpu_first import cache, driver, plugin, predicted, processes, records, tables, tools, verdict, waves
from tests.helpers import seeds
from tests.helpers.budget import Yardstick

ROOT = waves.ROOT


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> driver.Run:
    for variable in (records.FILE, records.BEGAN, plugin.IDS, plugin.DONE, plugin.WAVE, plugin.ITEM_SECONDS):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(driver, "LEAST", 1.0)
    monkeypatch.setenv(records.FILE, "")  # what a run sets is undone after the test
    monkeypatch.setenv(records.BEGAN, "0")
    return driver.Run(tmp_path / "out", dry=True, total=120)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# ---------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("import time; time.sleep(60)", "time"),
        ("import subprocess; subprocess.run(['sleep', '61.25'])", "time"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import os; os.write(1, bytes(range(256)) * 9); os._exit(3)", "exit 3"),
    ],
    ids=["hangs", "waits-for-a-child", "crashes", "prints-garbage"],
)
def test_a_stage_loses_itself_alone(run: driver.Run, code: str, ended: str) -> None:
    assert run.stage("bad", driver.LEAST if ended == "time" else 20, python(code)) == ended
    if code.count("61.25"):
        assert "61.25" not in subprocess.run(["ps", "ax"], capture_output=True, text=True, check=True).stdout
    path = run.out / records.NAME
    path.write_bytes(path.read_bytes() + b'\xff\x00 not JSON\n{"kind": "fact", "name": "cut off\n[1]\n')
    assert (
        run.stage("good", 20, python("from bench.gpu_first import records; records.write('fact', name='a', value=1)"))
        == "ok"
    )
    assert [r["ended"] for r in run.read() if r["kind"] == "stage"] == [ended, "ok"]
    assert [r["value"] for r in run.read() if r["kind"] == "fact"] == [1]
    assert "| bad | " + ended in (run.out / verdict.NAME).read_text()


def test_the_clock_is_the_runs(tmp_path: Path, run: driver.Run) -> None:
    """A stage gets what the run has left, and one without time is not started."""
    run.end = time.monotonic() + driver.LEAST + 1
    began = time.monotonic()
    assert run.stage("long", 1000, python("import time; time.sleep(60)")) == "time"
    assert time.monotonic() - began < driver.LEAST + 4
    assert run.stage("late", 1000, python(f"open({str(tmp_path / 'late')!r}, 'w')")) == "no time left"
    assert not (tmp_path / "late").exists()


def test_the_log_has_an_end(run: driver.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES", 1 << 20)
    assert run.stage("loud", 30, python("while True: print('x' * 1000)")) == "output"
    assert (run.out / processes.LOG).stat().st_size <= 1 << 20


TESTS = """
import os, signal, sys, time
import pytest

def test_first(): pass
def test_fails(): assert [1, 2] == [1, 3], "shape [2]"
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def test_after_a_crash(): pass
def test_hangs(): time.sleep(60)
def test_leaves(): os._exit(70)
def test_last(): pass
"""


@pytest.mark.long
@pytest.mark.parametrize("side_by_side", [[], ["-n", "2", "--max-worker-restart", "9"]], ids=["one", "xdist"])
def test_a_test_loses_itself_alone(run: driver.Run, tmp_path: Path, side_by_side: list[str]) -> None:
    """Its process is replaced, and every other test has a record."""
    file = tmp_path / "test_them.py"
    file.write_text(TESTS)
    asked = ["-p", "no:benchmark", "-c", os.devnull, f"--rootdir={tmp_path}", *side_by_side, str(file)]
    driver.again(run, "tests: them", 100, run.pytest(*asked), {plugin.ITEM_SECONDS: "4"})
    found = {r["id"].split("::")[1]: r for r in run.read() if r["kind"] == "test"}
    outcomes = {name: r["outcome"] for name, r in found.items()}
    lost = "failed" if side_by_side else "lost"
    assert outcomes == {
        "test_first": "passed", "test_fails": "failed", "test_crashes": lost, "test_after_a_crash": "passed",
        "test_hangs": lost, "test_leaves": lost, "test_last": "passed",
    }  # fmt: skip
    assert "shape [2]" in found["test_fails"]["message"]
    assert verdict.is_bad(run.read())


def test_what_comes_back_fits(run: driver.Run) -> None:
    """At most 8 files of 16 MiB, whatever happens: names of letters, digits and dots, in one folder."""
    run.stage("one", 20, python("print('hello')"))
    verdict.make(run.out)
    made = list(run.out.rglob("*"))
    assert {p.name for p in made} == {records.NAME, processes.LOG, verdict.NAME}
    assert processes.LOG_BYTES < 16 << 20
    assert all(re.fullmatch(r"[\w.-]+", p.name) for p in made)


# ---------------------------------------------------------------------------------------------- the verdict


def some_records() -> list[records.Record]:
    row = predicted.PREDICTIONS[0].row
    figures = {"fastroute": {"ms": 9.0}, "eager": {"ms": 27.0, "ratio": [2.9, 3.0, 3.1]}}
    return [
        {"kind": "run", "dry": False},
        {"kind": "fact", "name": "copy, GB/s", "value": 4300.0},
        {"kind": "test", "id": "t::passes", "outcome": "passed", "seconds": 1.0},
        {"kind": "test", "id": "t::fails", "outcome": "failed", "seconds": 1.0, "message": "off | at [3, 0]"},
        {"kind": "test", "id": "t::fails", "outcome": "passed", "seconds": 1.0},
        {"kind": "row", "id": row, "subject": "fastroute", "rivals": figures, "outcome": "passed"},
        {"kind": "tool", "name": "memcheck", "ended": "absent"},
        {"kind": "stage", "name": "timings", "ended": "time", "seconds": 200.0},
    ]


def test_a_half_finished_run_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / records.NAME
    lines = [json.dumps(r) for r in some_records()]
    for keep in range(len(lines) + 1):
        path.write_text("\n".join(lines[:keep]) + '\n{"kind": "te')
        ran = subprocess.run(
            [sys.executable, "-m", "bench.gpu_first", "verdict", str(tmp_path)], cwd=ROOT, check=True, text=True,
            capture_output=True,
        ) if keep == 4 else None  # fmt: skip
        page = verdict.make(tmp_path).read_text() if ran is None else Path(ran.stdout.strip()).read_text()
        assert page.startswith("# ")
    assert "1 passed, 1 failed" in page
    assert "Mend `t::fails`: off" in page and "off \\| at [3, 0]" in page
    expected = predicted.PREDICTIONS[0].ms(predicted.ASSUMED._replace(copy=4300.0))
    assert f"| {expected:.3g} | 9 | {9 / expected:.3g} | **missed: 5 ms** |" in page
    assert (
        "vector_routing.force_narrow" in page
        and "eager 27 (3.00x)" in page
        and "Rerun what had no time: timings" in page
    )
    assert verdict.is_bad(some_records()) and not verdict.is_bad([r for r in some_records() if r["kind"] != "test"])


def test_want_of_memory_is_tried_again(run: driver.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and only that: what it then says counts."""
    asked: list[str] = []
    monkeypatch.setattr(driver, "again", lambda run, name, seconds, command, env: asked.extend(
        Path(env[plugin.IDS]).read_text().splitlines()))  # fmt: skip
    records.write("test", id="a.py::wrong", outcome="failed", message="AssertionError: off")
    driver.without_neighbours(run)
    assert asked == []
    records.write("test", id="a.py::large", outcome="failed", message="torch.OutOfMemoryError: CUDA out of memory")
    driver.without_neighbours(run)
    assert asked == ["a.py::large"]
    records.write("test", id="a.py::large", outcome="passed")
    assert (
        verdict.page(run.read()).count("1 passed, 1 failed") + verdict.page(run.read()).count("1 failed, 1 passed") == 1
    )


def test_the_slowest_kernels_of_a_profile() -> None:
    head = '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    lines = [
        ("a", "gpu__time_duration.sum", "nsecond", "1,500"), ("a", "gpu__time_duration.sum", "usecond", "2.5"),
        ("a", "dram__bytes.sum", "Gbyte", "2"), ("b", "gpu__time_duration.sum", "msecond", "1"),
        ("c", "gpu__time_duration.sum", "nsecond", "1"), ("d", "gpu__time_duration.sum", "nsecond", "2"),
        ("b", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", "%", "40"),
    ]  # fmt: skip
    text = head + "\n".join(",".join(f'"{v}"' for v in ("0", *line)) for line in lines)
    found = tools.kernels_of(text)
    assert [(k["kernel"], k["us"]) for k in found] == [("b", 1000.0), ("a", 4.0), ("d", 0.002)]
    assert found[1]["MB"] == 2000 and found[1]["launches"] == 2 and found[0]["tensor pipe, %"] == 40
    assert tools.kernels_of("no table") == []


# ---------------------------------------------------------------------------------------------- what runs


def test_every_gpu_test_is_in_a_wave() -> None:
    """And no test that is compiled ahead of time or interpreted."""
    marked = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if "mark." + "gpu" in p.read_text()}
    assert set(waves.files()) == marked
    assert not [f for f in waves.files() if "aot" in f or "interpreted" in f]
    assert waves.place("tests/ops/vector_routing/test_gpu.py::test_real_sizes[x]") == (0, 0)
    assert (
        waves.WAVES[waves.place("tests/ops/vector_routing/test_gpu.py::test_same_input_same_bits[x]")[0]].name
        == "behaviour"
    )
    assert (
        waves.WAVES[waves.place("tests/ops/vector_routing/test_gpu.py::test_more_than_2_31_elements")[0]].name
        == "large"
    )
    assert waves.WAVES[waves.place("tests/networks/test_gpu.py::test_agrees_with_float64[x]")[0]].name == "ops"


def test_every_timed_row_is_one_of_the_suites() -> None:
    options = harness.Options(gpu=True, quick=False)
    for row in {*predicted.ROWS, *predicted.DRY_ROWS, *(p.row for p in predicted.PREDICTIONS)}:
        path, _, name = row.partition("::")
        rows = importlib.import_module(path.removesuffix(".py").replace("/", ".")).rows(options)
        assert name.partition("[")[2].removesuffix("]") in [str(r) for r in rows], row
    assert len(set(predicted.ROWS)) == len(predicted.ROWS)
    assert {p.row for p in predicted.PREDICTIONS} <= set(predicted.ROWS)


def test_settings_that_are_tuned_exist() -> None:
    for table in tables.TABLES:
        module = importlib.import_module(f"fastroute.kernels.{table.module}")
        before = getattr(module, table.name)
        for value in table.values:
            with pytest.raises(KeyError), tables.setting(table, value) as made:
                assert getattr(module, table.name) is made and made is (before if value is None else value)
                raise KeyError
            assert getattr(module, table.name) is before


def test_suites_run_in_order_of_worth() -> None:
    assert [p.stem for p in bench.suites()][:2] == ["bench_vector_routing", "bench_experts"]
    assert {p.stem for p in bench.suites()} == {f"bench_{name}" for name in bench.ORDER}


@pytest.mark.long
def test_a_suite_sees_the_runs_clock() -> None:
    """In a process of its own: without a clock given, harness counts from its import."""
    env = os.environ | {harness.BEGAN: str(time.monotonic() - 400)}
    code = f"""
import importlib, os, time
from bench import harness
print(harness.Options(gpu=True, quick=True).is_late())
for began in (str(time.monotonic()), None):
    os.environ.pop({harness.BEGAN!r})
    os.environ |= {{{harness.BEGAN!r}: began}} if began else {{}}
    print(importlib.reload(harness).Options(gpu=True, quick=True).is_late())
"""
    ran = subprocess.run(python(code), cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "False", "False"]


def test_nothing_is_installed() -> None:
    """The run installs nothing at all, and the GPU's tests nothing but the checkout."""

    def made(*arguments: str) -> str:
        command = ["make", "-n", "-B", *arguments, "PYTHON=python3", "OUT=out"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "pip" not in made("gpu-first", "VENV=nowhere") and "--dry" in made("gpu-first", "DRY=1")
    offline = made("gpu-test", "NO_VENV=1", "ARGS=-n 12")
    assert [line for line in offline.splitlines() if "pip install" in line and "--no-deps -e ." not in line] == []
    assert "-m gpu -n 12" in offline


# ---------------------------------------------------------------------------------------------- rows


def test_compiled_kernels_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without intermediate code, and with the paths of the folder that they come to."""
    kernel = tmp_path / "work" / "KEY"
    kernel.mkdir(parents=True)
    for name in ("k.cubin", "k.ptx", "k.json"):
        (kernel / name).write_text(name)
    names = {name: str(kernel / name) for name in ("k.cubin", "k.ptx", "k.json")}
    (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": names}))
    monkeypatch.setattr(cache, "ARCHIVE", tmp_path / "kernels.tar.xz")
    assert cache.pack(tmp_path / "work") == 0
    assert cache.unpack(tmp_path / "there") == 1
    there = tmp_path / "there" / "KEY"
    found = json.loads((there / "__grp__k.json").read_text())["child_paths"]
    assert found == {name: str(there / name) for name in ("k.cubin", "k.json")}
    assert sorted(p.name for p in there.iterdir()) == ["__grp__k.json", "k.cubin", "k.json"]
    monkeypatch.setattr(cache, "LARGEST", 1)
    assert cache.pack(tmp_path / "work") == 1


@pytest.mark.long
def test_many_rows_have_a_gate_that_fits_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By norm, against tiles in float64: what is right passes, what is a little wrong does not."""
    monkeypatch.setattr(bench_vector_routing, "MANY", 5000)
    case = bench_vector_routing.Case(1, 5000, 6, 8, 8)
    gate = bench_vector_routing.truth.__wrapped__(case, "cpu")
    assert isinstance(gate, harness.ByNorm)
    found = bench_vector_routing.contestant(list(case), "training", "fastroute").results()
    assert gate.excess(found)[1] <= 1
    for name in found:
        wrong = {**found, name: found[name] + 1e-4 * found[name].abs().max()}
        assert gate.excess(wrong) == (name, pytest.approx(gate.excess(wrong)[1])) and gate.excess(wrong)[1] > 1
    assert gate.excess({"x_out": found["x_out"] * torch.nan})[1] == float("inf")


def test_rows_that_nearly_cancel_are_held_to_what_rounding_moves() -> None:
    """A sum of many rows that is 10^4 times smaller than sums of as many are, of which the fewer rows know nothing."""
    draw = seeds.generator()
    few, many = torch.rand(100, generator=draw), torch.randn(5000, generator=draw)
    many[0] -= float(many.double().sum())
    many[1] += 0.01
    exact = {"sum": many.double().sum(0, keepdim=True)}
    assert 0.005 < exact["sum"] < 0.02

    def moves(rows: torch.Tensor) -> dict[str, float]:
        halves = torch.rand(50, len(rows), generator=draw, dtype=torch.float64) - 0.5
        moved = (rows.double() * (1 + torch.finfo(torch.float32).eps * halves)).sum(1)
        return {"sum": float((moved / rows.double().sum() - 1).square().mean().sqrt())}

    known = harness.Truth(lambda: {"sum": few.double().sum(0, keepdim=True)}, torch.float32)
    of_few = {"sum": few.sum(0, keepdim=True)}
    off = {"sum": exact["sum"] * (1 + 1e-4)}  # some units in the last place of partial sums
    by_root = harness.ByNorm(known, of_few, exact, 50)
    gate = harness.ByNorm(known, of_few, exact, 50, lambda: (moves(many), moves(few)))
    assert by_root.excess(off)[1] > 1 >= gate.excess(off)[1]
    assert gate.excess({"sum": many[2:].sum(0, keepdim=True)})[1] > 100
    unmoved = harness.ByNorm(known, of_few, exact, 50, lambda: pytest.fail("moved for a rival's sake"))
    assert unmoved.excess(off, rival=True) == by_root.excess(off)


class Recorder:
    """As much of pytest-benchmark's fixture as a race uses."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, timed: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            timed()


def test_a_rival_that_fails_loses_itself_alone() -> None:
    def fails() -> harness.Results:
        raise RuntimeError("out of memory")

    made = {"y": torch.ones(3)}
    subject, compiled = (harness.Here(name, lambda: made) for name in ("fastroute", "x, torch.compile"))
    truth = harness.Truth(lambda: {"y": torch.ones(3, dtype=torch.float64)}, torch.float32)
    seen, options = Recorder(), harness.Options(gpu=True, quick=True, uncompiled=True)
    harness.race(seen, subject, [harness.Here("eager", fails), compiled], [], truth, options=options)
    assert list(seen.extra_info["rivals"]) == ["fastroute"] and "ms" in seen.extra_info["rivals"]["fastroute"]
    said = "eager (RuntimeError: out of memory); x, torch.compile (no time to compile)"
    assert seen.extra_info["left out"] == said


def test_a_failure_tells_the_shape_and_the_first_bad_index() -> None:
    exact = torch.zeros(4, 5, dtype=torch.float64)
    bad = torch.zeros(4, 5)
    bad[2, 3] = bad[3, 1] = 1.0
    with pytest.raises(AssertionError, match=r"y: error 1 .*shape \[4, 5\], 2 of 20 .*first at \[2, 3\]: 1 for 0"):
        Yardstick(lambda: {"y": exact}, torch.float32).check({"y": bad})
    bad[1, 0] = torch.nan
    with pytest.raises(AssertionError, match=r"shape \[4, 5\], 1 of 20 .*first at \[1, 0\]: nan for 0"):
        Yardstick(lambda: {"y": exact}, torch.float32).check({"y": bad})
