"""Layers over several processes, on gloo, each pinned to a core: ``python -m bench.distributed [--quick]``.

Every row's processes are copies of this one. In each round the contestants take turns, so that what disturbs the
machine disturbs all; a ratio is the median over rounds. Results are compared before anything is timed. Writes
bench/results/distributed/cpu.json and the measured table of docs/distributed.md (not with ``--quick``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import fastroute
from bench.distributed_experts import step
from bench.distributed_model import ROOT, Routing, put, table
from bench.harness import machine
from fastroute.distributed import RowShardedCapsules
from tests.distributed.ranks import fork
from tests.helpers.traffic import Traffic

RESULTS = ROOT / "bench" / "results" / "distributed" / "cpu.json"
Found = dict[str, Any]


class Row(NamedTuple):
    """What so many processes do together, and what is asked of a figure that rank 0 returns."""

    ranks: int
    run: Callable[[int, bool], Found]  # (rank, quick)
    goal: tuple[str, str, float] | None = None  # (figure, "at least" or "at most", value)


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds until all ranks have done it, CPU seconds of the busiest one)"""
    dist.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    run()
    busiest = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
    dist.all_reduce(busiest, dist.ReduceOp.MAX)
    return time.perf_counter() - began, busiest.item()


def ratio(ones: list[tuple[float, float]], others: list[tuple[float, float]], which: int) -> float:
    """Of wall (0) or CPU time (1), the median over rounds."""
    return statistics.median(a[which] / b[which] for a, b in zip(ones, others, strict=True))


def loopback() -> int:
    """Bytes that this machine has sent to itself."""
    path = Path("/sys/class/net/lo/statistics/tx_bytes")
    return int(path.read_text()) if path.exists() else 0


def capsules(case: Routing, ranks: int, rounds: int) -> Callable[[int, bool], Found]:
    """A training step of one process against the same over all ranks. One process has no group, and no DTensors."""

    def run(rank: int, quick: bool) -> Found:
        shape = case._replace(n=case.n // 20) if quick else case
        torch.manual_seed(0)
        plain = fastroute.EfficientVectorRouting(
            -1 if shape.any_length else shape.n, shape.m, shape.d, shape.h, shape.T
        )
        x = torch.randn(shape.B, shape.n, shape.d)
        sharded = parallelize_module(deepcopy(plain), init_device_mesh("cpu", (ranks,)), RowShardedCapsules())
        alone = step(plain, x.clone().requires_grad_())
        together = step(sharded, x.chunk(ranks, 1)[rank].clone().requires_grad_())
        expected = alone()
        torch.testing.assert_close(together(), expected, rtol=1e-3, atol=1e-4)
        with Traffic() as traffic:
            together()
        ones, all_, wire = [], [], []
        for _ in range(3 if quick else rounds):
            ones.append(timed(alone if rank == 0 else lambda: None))
            before = loopback()
            all_.append(timed(together))
            wire.append(loopback() - before)
        formula = 0 if ranks == 1 else 4 * sum(shape.all_reduces())
        return {
            "case": f"n = {shape.n:,}, {shape.m} x {shape.h} outputs, d = {shape.d}, batch {shape.B}"
            + (", any length" if shape.any_length else ""),
            "one process, ms": 1e3 * statistics.median(wall for wall, _ in ones),
            "sharded, ms": 1e3 * statistics.median(wall for wall, _ in all_),
            "speedup": ratio(ones, all_, 0),
            "by CPU time": ratio(ones, all_, 1),
            "bytes by formula": formula,
            "bytes measured": traffic.bytes["all_reduce"],
            "bytes over loopback": min(wire),
        }

    return run


ROWS = {
    "world size 1": Row(1, capsules(Routing(1, 200_000, 100, 64, 64), 1, 15), ("speedup", "at least", 1 / 1.03)),
    "world size 1, small": Row(1, capsules(Routing(1, 5_000, 100, 256, 256), 1, 60)),
    "two processes": Row(2, capsules(Routing(1, 200_000, 100, 64, 64), 2, 9), ("speedup", "at least", 1.7)),
    "two processes, wide": Row(2, capsules(Routing(1, 200_000, 100, 256, 256), 2, 5), ("speedup", "at least", 1.7)),
    "two processes, any length": Row(
        2, capsules(Routing(1, 200_000, 100, 64, 64, any_length=True), 2, 9), ("speedup", "at least", 1.7)
    ),
}


def of(name: str, quick: bool) -> Found:
    """A row's figures, from rank 0 of its processes."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory(prefix="fastroute-bench-") as folder:
        out, store = Path(folder) / "found.json", f"file://{folder}/store"

        def work(rank: int) -> None:
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[rank % len(cores)]})
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=row.ranks)
            found = row.run(rank, quick)
            if rank == 0:
                out.write_text(json.dumps(found))
            dist.barrier()

        if any(fork(row.ranks, work, 900)):
            raise SystemExit(f"{name}: a process failed")
        found: Found = json.loads(out.read_text())
    if row.goal is not None:
        figure, sense, value = row.goal
        met = found[figure] >= value if sense == "at least" else found[figure] <= value
        found |= {"goal": f"{figure} {sense} {value:.2f}", "met": met}
    return found


def text(found: dict[str, Found], facts: dict[str, Any], date: str) -> str:
    """A table for each set of figures that rows have in common."""
    by_head: dict[tuple[str, ...], list[list[str]]] = {}
    for name, row in found.items():
        row.setdefault("goal", "–")
        cells = {k: f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v
                 for k, v in row.items() if k != "met"}  # fmt: skip
        if "met" in row:
            cells["goal"] += ": met" if row["met"] else ": **not met**"
        by_head.setdefault(tuple(cells), []).append([name, *cells.values()])
    tables = [table(["row", *head], rows) for head, rows in by_head.items()]
    where = ", ".join(f"{k} {v}" for k, v in facts.items())
    return "\n\n".join([*tables, f"Measured {date}: {where}; gloo, each process pinned to a core."])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds; nothing is written")
    parser.add_argument("-k", default="", help="only rows whose names have this in them")
    args = parser.parse_args()
    found, load = {}, f"{os.getloadavg()[0]:.1f}"
    for name in ROWS:
        if args.k in name:
            found[name] = of(name, args.quick)
            print(name, found[name], flush=True)
    facts, date = machine() | {"load average before": load}, time.strftime("%Y-%m-%d")
    print(f"\n{text(found, facts, date)}")
    if not args.quick and not args.k:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({"date": date, "machine": facts, "rows": found}, indent=1) + "\n")
        put("measured", text(found, facts, date))
    return 0


if __name__ == "__main__":
    sys.exit(main())
