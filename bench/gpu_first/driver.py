"""The run: stages in order of worth, each in processes of its own, under one clock. Imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from bench.gpu_first import cache, plugin, predicted, processes, records, verdict, waves

ROOT = waves.ROOT
#: Seconds of a whole run, and what is kept of them for the verdict.
TOTAL, VERDICT_SECONDS = 540.0, 5.0
#: A stage that has less time left than this is not started.
LEAST = 3.0


class Run:
    """A run's folder, clock and environment."""

    def __init__(self, out: Path, *, dry: bool = False, total: float = TOTAL, python: str = sys.executable) -> None:
        self.out, self.dry, self.python = out.resolve(), dry, python
        self.slack = 5 if dry else 1  #: times the stages' limits: interpreted kernels are slow on a busy machine
        self.out.mkdir(parents=True, exist_ok=True)
        for name in (records.NAME, processes.LOG, verdict.NAME):
            (self.out / name).unlink(missing_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu-first-"))
        self.began = time.monotonic()
        self.end = self.began + total - VERDICT_SECONDS
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        mine = {records.FILE: str(self.out / records.NAME), records.BEGAN: repr(self.began), "PYTHONPATH": path}
        mine |= {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        os.environ.update({k: mine[k] for k in (records.FILE, records.BEGAN)})
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTROUTE_") and k != "TRITON_INTERPRET"}
        self.env = inherited | mine
        self.env["TRITON_CACHE_DIR"] = str(self.scratch / "triton")
        records.write(
            "cached", kernels=0 if dry or not cache.ARCHIVE.exists() else cache.unpack(self.scratch / "triton")
        )

    def left(self) -> float:
        return self.end - time.monotonic()

    def read(self) -> list[records.Record]:
        return list(records.read(self.out / records.NAME))

    def stage(self, name: str, seconds: float, command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        """Run a command as a stage, for at most what the run has left; how it ended."""
        limit = min(seconds, self.left())
        if limit < LEAST:
            records.write("stage", name=name, ended="no time left", seconds=0.0)
            return "no time left"
        before = time.monotonic()
        ended = processes.run(command, limit, self.out, self.env | dict(env or {}), ROOT)
        records.write("stage", name=name, ended=ended, seconds=round(time.monotonic() - before, 1))
        verdict.make(self.out)  # so that a run that is cut off has a page, too
        return ended

    def module(self, name: str, seconds: float, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """A command of this package as a stage."""
        command = [self.python, "-m", "bench.gpu_first", *arguments, *["--dry"] * self.dry]
        return self.stage(name, seconds, command, env)

    def pytest(self, *arguments: str) -> list[str]:
        quiet = ["-q", "--tb=short", "--no-header", "-p", "no:cacheprovider", "-p", "bench.gpu_first.plugin"]
        return [self.python, "-m", "pytest", *quiet, *arguments]


# ---------------------------------------------------------------------------------------------- stages


def facts(run: Run) -> None:
    run.module("facts", 40 * run.slack, "facts")


def build(run: Run) -> subprocess.Popen[bytes] | None:
    """Build the extension for this GPU beside the other stages, where the one that came along does not load."""
    loads = [r["value"] for r in run.read() if r["kind"] == "fact" and r["name"] == "extension loads"]
    if run.dry or not loads or loads[-1] is True or shutil.which("nvcc") is None:
        return None
    with (run.out / processes.LOG).open("ab") as log:
        command = [run.python, "-m", "bench.gpu_first", "build"]
        return subprocess.Popen(command, cwd=ROOT, env=run.env, stdout=log, stderr=log, start_new_session=True)


def wave(run: Run, of: waves.Wave) -> None:
    env = {plugin.ITEM_SECONDS: str(of.item_seconds * run.slack), "OMP_NUM_THREADS": "1"}
    side_by_side = ["-n", str(min(of.workers, os.cpu_count() or 1)), "--maxschedchunk=2", "--max-worker-restart=99"]
    asked = ["-p", "no:benchmark", *(side_by_side if of.workers > 1 else [])]
    if run.dry:
        chosen, env = list(of.dry), env | {"TRITON_INTERPRET": "1"}
    else:
        chosen, env = ["-m", "gpu", *waves.files()], env | {plugin.WAVE: of.name}
    again(run, f"tests: {of.name}", of.seconds * run.slack, run.pytest(*asked, *chosen), env)


def without_neighbours(run: Run) -> None:
    """Once more, one after the other: tests for which the others beside them left no memory."""
    ids = sorted({r["id"] for r in run.read() if r["kind"] == "test" and verdict.lacked_memory(r)})
    if ids:
        listed = run.scratch / "lacked-memory"
        listed.write_text("\n".join(ids), encoding="utf-8")
        command = run.pytest("-p", "no:benchmark", *dict.fromkeys(i.split("::")[0] for i in ids))
        again(run, "tests: without neighbours", 20, command, {plugin.ITEM_SECONDS: "20", plugin.IDS: str(listed)})


def again(run: Run, name: str, seconds: float, command: Sequence[str], env: Mapping[str, str]) -> None:
    """A stage of tests. If its process is lost, a new one runs the tests that were not started yet."""
    end = time.monotonic() + seconds
    while end - time.monotonic() > LEAST:
        begun = len(run.read())
        ended = run.stage(name, end - time.monotonic(), command, env)
        mine = run.read()[begun:]
        started, finished = ({r["id"] for r in mine if r["kind"] == kind} for kind in ("start", "test"))
        if any(r["kind"] == "session" for r in mine):
            return
        for lost in sorted(started - finished):
            outcome = "cut off" if ended == "time" else "lost"  # a test that hangs meets its own limit first
            records.write("test", id=lost, outcome=outcome, message=f"its process ended: {ended}")
        if ended == "time" or not started:
            return
        done = run.scratch / "done"
        done.write_text("\n".join({r["id"] for r in run.read() if r["kind"] == "start"}), encoding="utf-8")
        env = {**env, plugin.DONE: str(done)}


def time_rows(run: Run) -> None:
    env = {plugin.ITEM_SECONDS: "45", "OMP_NUM_THREADS": "1"}
    quick = ["--bench-quick"] if run.dry else []
    asked = ["--bench-gpu", "--bench-seconds=1", "--bench-uncompiled", *quick]
    asked += ["--benchmark-only", "--benchmark-disable-gc", "--benchmark-columns=median"]
    ids = predicted.DRY_ROWS if run.dry else predicted.ROWS
    listed = run.scratch / "rows"
    listed.write_text("\n".join(ids), encoding="utf-8")
    files = list(dict.fromkeys(i.split("::")[0] for i in ids))
    env[plugin.IDS] = str(listed)
    again(run, "timings", 200, run.pytest(*asked, *files), env)


def tools(run: Run) -> None:
    run.module("tools", 60, "tools")


def tables(run: Run) -> None:
    run.module("tables", run.left(), "tables")


def everything(run: Run) -> int:
    """All stages; what comes later gets what is left. The status is 0 if nothing that was looked at is wrong."""
    steps: list[Callable[[Run], object]] = [partial(wave, of=of) for of in waves.WAVES]
    steps += [without_neighbours, time_rows, tools, tables]
    records.write("run", dry=run.dry, seconds=run.end - run.began)
    facts(run)
    builder = build(run)
    try:
        for step in steps:
            try:
                step(run)
            except Exception as error:  # a full disk, say: what comes after may still do
                records.write("stage", name=str(step), ended=f"driver: {type(error).__name__}: {error}", seconds=0.0)
    finally:
        if builder is not None:
            processes.kill(builder)
        shutil.rmtree(run.scratch)
    page = verdict.make(run.out)
    print(page)
    return 1 if verdict.is_bad(run.read()) else 0
