"""``python -m bench.gpu_first run --out FOLDER`` is the run; ``verdict FOLDER`` makes its page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench.gpu_first import driver, verdict


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_first", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="every stage")
    runs.add_argument("--out", type=Path, required=True, help="where the results go")
    runs.add_argument("--total", type=float, default=driver.TOTAL, help="seconds of the whole run")
    shown = commands.add_parser("verdict", help="make gpu-first.md of a folder, also of a run that was cut off")
    shown.add_argument("out", type=Path)
    kept = commands.add_parser("cache", help="compile the kernels of tests and rows for a GPU that is not here")
    kept.add_argument("--arch", type=int, default=90, help="compute capability")
    kept.add_argument("--seconds", type=float, default=1800, help="after which nothing more is compiled")
    parts = [commands.add_parser(name) for name in ("facts", "build", "tools", "tables", "small", "large")]
    for part in (runs, *parts):
        part.add_argument("--dry", action="store_true", help="without a GPU: small sizes, on the CPU")
    for part in parts[-2:]:
        part.add_argument("what")
    args = parser.parse_args()
    if args.command == "run":
        return driver.everything(driver.Run(args.out, dry=args.dry, total=args.total))
    if args.command == "verdict":
        print(verdict.make(args.out))
        return 0
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from bench.gpu_first import cache, facts, tables, tools, workloads

    if args.command == "cache":
        return cache.make(args.arch, args.seconds)
    if args.command == "build":
        return facts.build()
    steps = {
        "facts": lambda: facts.gather(args.dry),
        "tools": lambda: tools.use(args.dry),
        "tables": lambda: tables.make(args.dry),
        "small": lambda: workloads.small("cpu" if args.dry else "cuda", args.what),
        "large": lambda: tools.large(args.what),
    }
    steps[args.command]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
