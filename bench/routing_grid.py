"""EfficientVectorRouting over a grid of sizes: a process of its own, a printed line a cell.

``python -m bench.routing_grid [--quick]``.
The rivals are upstream's operators, eager and compiled. A cell is a size in one pass on so many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor

from bench import bench_vector_routing as suite
from bench import harness
from bench.bench_vector_routing import Case
from bench.instruction_sets import HELD_TO

#: From 10 to a million input vectors.
GRID = (
    Case(1, 10, 4, 16, 16), Case(1, 30, 2, 8, 8), Case(4, 10, 4, 16, 16), Case(1, 50, 10, 64, 64),
    Case(4, 50, 10, 64, 64), Case(1, 196, 10, 192, 192), Case(1, 1000, 100, 256, 256), Case(32, 49, 10, 64, 64),
    Case(8, 196, 10, 192, 192), Case(16, 128, 32, 128, 1), Case(32, 64, 16, 32, 32), Case(4, 512, 64, 256, 256),
    Case(1, 2000, 10, 1024, 1024), Case(2, 2000, 1000, 256, 256), Case(128, 64, 16, 32, 32),
    Case(1, 10_000, 64, 64, 64), Case(64, 196, 10, 192, 192), Case(1, 20_000, 100, 256, 256),
    Case(256, 128, 8, 16, 16), Case(100, 1000, 16, 64, 64), Case(1, 100_000, 10, 32, 32),
    Case(1, 1_000_000, 10, 16, 16),
)  # fmt: skip
#: torch.compile's modes, and the sizes at which each is a rival: tuning takes the compiler a minute a size.
MODES = {"default": range(len(GRID)), "max-autotune-no-cudagraphs": (4,)}


#: Seconds that the rivals may take to compile in all.
COMPILING = 50.0


def run(quick: bool, whole: bool = False) -> list[dict[str, Any]]:
    """The cells; ``whole``: with compiled rivals in all of them."""
    command = [sys.executable, "-m", "bench.routing_grid", *["--quick"] * quick, *["--seconds=inf"] * whole]
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"size"')]


def _race(subject: harness.Here, rivals: Sequence[harness.Here], seconds: float) -> dict[str, Any]:
    turns = harness.Turns(subject, rivals)
    rounds = turns.rounds(seconds, 3, 200)
    ms = {name: 1e3 * statistics.median(s.time for s in found) for name, found in turns.samples.items()}
    return {
        "ms": ms,
        "ratios": {one.name: harness._quartiles(turns.ratios(one.name)) for one in rivals},
        "rounds": rounds,
    }


def _compiled(mode: str) -> Callable[..., Tensor]:
    made: Callable[..., Tensor] = torch.compile(suite.upstream, mode=mode, fullgraph=True)
    return made


def _running(rivals: Sequence[harness.Here]) -> tuple[list[harness.Here], dict[str, str]]:
    """The rivals that run, compiled where they are to be, and why the others do not."""
    running, left_out = [], {}
    for one in rivals:
        try:
            one.results()
            running.append(one)
        except (RuntimeError, AssertionError) as error:  # of the compiler
            left_out[one.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return running, left_out


def cells(quick: bool, seconds: float = COMPILING) -> Iterator[dict[str, Any]]:
    inductor.cpp.dynamic_threads = True  # compiled once for any number of threads
    compiling = 0.0
    for k, whole in enumerate(GRID[:3] if quick else GRID):
        case = whole.smaller() if quick else whole
        p = suite.problem(case, "cpu")
        gate = suite.truth(case, "cpu")
        torch._dynamo.reset()
        functions: dict[str, Callable[[Tensor], Tensor]] = {"eager": lambda x, p=p: suite.upstream(x, p.w)}  # type: ignore[misc]
        for mode, sizes in MODES.items():
            if k in sizes and compiling < seconds:
                call = _compiled(mode)
                functions[f"torch.compile, {mode}"] = lambda x, p=p, call=call: call(x, p.w)  # type: ignore[misc]
        for what in ("forward", "training"):
            subject = harness.Here("fastroute", *suite._pass(what, p.layer, p.w, p.x, p.dy)[:1])
            off, times = gate.excess(subject.results())
            rivals = [harness.Here(name, suite._pass(what, f, p.w, p.x, p.dy)[0]) for name, f in functions.items()]
            for count in (1, 2):
                began = time.perf_counter()
                with harness.threads(count):  # for each number Dynamo compiles again
                    running, left_out = _running(rivals)
                compiling += time.perf_counter() - began
                cell = {
                    "size": case._asdict(), "inputs": case.B * case.n, "pass": what, "threads": count,
                    "load": round(os.getloadavg()[0], 1), "left out": left_out, "isa": HELD_TO,
                }  # fmt: skip
                if times > 1:
                    yield {**cell, "off": off, "times_the_budget": times}
                    continue
                with harness.threads(count):
                    yield {**cell, **_race(subject, running, 0.1 if quick else 0.25)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.routing_grid", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small sizes")
    parser.add_argument("--seconds", type=float, default=COMPILING, help="that rivals may take to compile in all")
    args = parser.parse_args()
    for cell in cells(args.quick, args.seconds):
        print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    main()
