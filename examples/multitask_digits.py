"""Eight tasks about handwritten digits, and nine ways to divide a network among them, over several seeds.

Networks per task, one trunk for all (as narrow as one of those, and with as many parameters as all of them), MMoE, CGC,
PLE, cross-stitch networks, task routing and a routing network; each is a list of dicts in fastroute/demos/multitask.py.
Delta m is the mean over tasks of the relative gain in accuracy over the networks per task with the same seed.

    python examples/multitask_digits.py
    python examples/multitask_digits.py --images 300 --epochs 80 --picture digits.png
    python examples/multitask_digits.py --networks MMoE CGC --seeds 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
from _pages import interruptible, machine, table, write
from rich.console import Console

from fastroute import data
from fastroute.demos.multitask import NETWORKS, Result, T, improvement, model_of, tasks_of, train

BASELINE = next(iter(NETWORKS))
HEAD = ("accuracy", "worst task", "Δm, %", "ms per step", "parameters")


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """The mean, and the standard deviation if there are several."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def gains(results: Sequence[Result], baseline: Sequence[Result]) -> list[float]:
    """Delta m of each seed, in percent."""
    return [100 * improvement(mine, theirs) for mine, theirs in zip(results, baseline, strict=True)]


def cells(results: Sequence[Result], baseline: Sequence[Result]) -> list[str]:
    """A network's row."""
    return [
        spread([r.accuracy for r in results], 4),
        spread([min(r.accuracies) for r in results], 3),
        "–" if results is baseline else spread(gains(results, baseline), 2, "+"),
        f"{statistics.median(r.ms for r in results):.2f}",
        f"{results[0].parameters:,}",
    ]


def draw(results: dict[str, list[Result]], path: Path) -> None:
    """Each seed's Delta m, and the time of a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 0.32 * len(results) + 1.0), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    names = list(results)[::-1]
    for row, name in enumerate(names):
        found = gains(results[name], results[BASELINE])
        left.plot(found, [row] * len(found), "o", color="tab:blue", alpha=0.5, markersize=4)
        left.plot(statistics.fmean(found), row, "|", color="black", markersize=13)
    left.axvline(0, color="#999999", linewidth=0.8)
    left.set(xlabel=f"Δm over {BASELINE}, %, a dot per seed", yticks=range(len(names)), yticklabels=names)
    times = [statistics.median(r.ms for r in results[name]) for name in names]
    right.barh(range(len(names)), times, color="tab:green", height=0.6)
    right.set(xlabel="ms per step")
    for ax in (left, right):
        ax.grid(alpha=0.3, axis="x")
        ax.tick_params(labelsize=8)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="MNIST's IDX files (default: scikit-learn's digits)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--images", type=int, help="learn from the first so many (default: all)")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a markdown file to write, or whose part 'digits' to rewrite")
    parser.add_argument("--picture", type=Path, help="a picture of Δm and step time to write")
    args = parser.parse_args(argv)
    if min(args.epochs, args.seeds, args.threads, 1 if args.images is None else args.images) < 1:
        parser.error("--images, --epochs, --seeds, --threads: expected at least 1")
    torch.set_num_threads(args.threads)
    found = tasks_of(data.digits() if args.data is None else data.mnist(args.data), args.images)
    count, pixels = found.images.shape
    results: dict[str, list[Result]] = {}
    for name in dict.fromkeys([BASELINE, *args.networks]):
        results[name] = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            model = model_of(name, pixels)
            results[name].append(train(name, model, found, args.epochs, Console(stderr=True)))
    rows = [[name, *cells(made, results[BASELINE])] for name, made in results.items()]
    text = (
        f"{table(['network', *HEAD], rows)}\n\n{machine()} {T} tasks, {count} images to learn from and "
        f"{len(found.test_images)} held out, {args.epochs} epochs, {args.seeds} seed(s): mean ± standard deviation; "
        "a step's time is process CPU time."
    )
    write(args.out, "digits", text)
    if args.picture is not None:
        draw(results, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
