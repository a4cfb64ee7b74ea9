"""``python -m bench run [SUITE ...]`` times suites and rewrites docs/benchmarks.md; ``report`` only rewrites."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import instruction_sets, report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


#: Most valuable first, for a run that is cut off.
ORDER = ("vector_routing", "experts", "dispatch", "networks", "task_mask", "tasks", "matrix_routing", "soft_assignment",
         "multitask", "stream")  # fmt: skip


def suites() -> list[Path]:
    """In that order, and what it does not name behind."""
    rank = {name: k for k, name in enumerate(ORDER)}
    return sorted(HERE.glob("bench_*.py"), key=lambda p: (rank.get(p.stem.removeprefix("bench_"), len(rank)), p.stem))


#: Suites whose grid has results of its own, so that what cuts it off leaves the rows.
APART = ("vector_routing",)


def runs(args: argparse.Namespace) -> list[tuple[Path, str, str | None]]:
    """(suite, name of its results, pytest's -k) of each run."""
    found: list[tuple[Path, str, str | None]] = []
    device = "cuda" if args.gpu else instruction_sets.kind()
    for suite in suites():
        name = suite.stem.removeprefix("bench_")
        if args.suites and name not in args.suites:
            continue
        also = f" and ({args.k})" if args.k else ""
        if name in APART and not args.gpu:
            found += [(suite, f"{name}-{device}", f"not grid{also}"), (suite, f"{name}-{device}-grid", f"grid{also}")]
        else:
            found.append((suite, f"{name}-{device}", args.k))
    return found


def run(args: argparse.Namespace) -> int:
    partial = args.quick or bool(args.k)
    if args.out is None:
        args.out = Path(tempfile.mkdtemp(prefix="fastroute-bench-")) if partial else RESULTS
    args.out.mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTROUTE_BACKEND", "FASTROUTE_GEMM")}
    env |= {"OMP_WAIT_POLICY": "PASSIVE"}  # a suite is a process of its own, so torch is not imported before this
    env.setdefault("FASTROUTE_BENCH_BEGAN", repr(time.monotonic()))  # all suites share the run's clock
    status, written = 0, []
    for suite, name, selected in runs(args):
        path = args.out / f"{name}.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=line",
            "--show-capture=no",
            "-p",
            "no:cacheprovider",
            str(suite),
        ]
        part = path.with_suffix(".part")  # what there was stays until there is something in its place
        command += ["--benchmark-only", "--benchmark-disable-gc", f"--benchmark-json={part}"]
        command += ["--benchmark-columns=median,min,max,rounds", "--benchmark-sort=fullname"]
        command += [f"--bench-{flag}" for flag in ("gpu", "quick", "whole") if getattr(args, flag)]
        command += ["-k", selected] if selected else []
        command += [] if args.gpu else ["--benchmark-timer=time.process_time"]
        try:
            code = subprocess.run(command, cwd=HERE.parent, env=env).returncode
            if code == 5:  # no test selected
                continue
            status = status or code
            if part.exists() and json.loads(part.read_text() or "{}").get("benchmarks"):
                part.replace(path)
                written.append(path)
            elif code == 0:  # a suite without rows for this device
                path.unlink(missing_ok=True)
        finally:
            part.unlink(missing_ok=True)
    if args.k and not written and not status:
        print(f"-k {args.k}: no row of these suites has it", file=sys.stderr)
        status = 2
    for path in written:
        print(f"\n{path}\n\n{report.tables(path)}")
    print(f"{time.monotonic() - float(env['FASTROUTE_BENCH_BEGAN']):.0f} s in all")
    if args.out.resolve() == RESULTS and not partial:
        report.rewrite(RESULTS)
        print(f"rewrote {' and '.join(str(page.relative_to(HERE.parent)) for page in report.PAGES.values())}")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="time every suite, or those that are named")
    names = [p.stem.removeprefix("bench_") for p in suites()]
    runs.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(names)}; none: all of them")
    runs.add_argument(
        "--gpu", action="store_true", help="the GPU's rows (with --quick and no GPU: a dry run on the CPU)"
    )
    runs.add_argument("--out", type=Path, help="where the JSON goes: bench/results, or a new folder with -k or --quick")
    runs.add_argument("-k", help="pytest's -k: only these rows; docs/benchmarks.md is left alone")
    runs.add_argument("--quick", action="store_true", help="small sizes, to see that it works; the docs are left alone")
    runs.add_argument("--whole", action="store_true", help="every compiled rival in every cell of a grid: slow")
    commands.add_parser("report", help="rewrite docs/benchmarks.md from bench/results")
    args = parser.parse_args()
    if unknown := set(getattr(args, "suites", ())) - set(names):
        parser.error(f"no suite is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if args.command == "run":
        try:
            return run(args)
        except KeyboardInterrupt:
            print("interrupted; finished suites are in the folder of --out", file=sys.stderr)
            return 130
    report.rewrite(RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
