"""One network for 42 tasks: routed, with a shared trunk, or not one but 42.

Handwritten digits as binary attributes (what digit, what kind of digit, where its ink is). A batch's images are each of
a random task. "Tasks at once" is the shared trunk where every image is asked all questions, which a shared trunk can
answer for nothing: it sees T times as many answers.

    python examples/many_tasks.py
    python examples/many_tasks.py --epochs 50 --seeds 3 --picture sigma.png
    python examples/many_tasks.py --data MNIST_FOLDER --epochs 2
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
from _pages import interruptible, machine, table, write
from rich.console import Console
from torch import nn

from fastroute import data
from fastroute.demos.attributes import BASE, Attributes, attributes
from fastroute.demos.tasks import SIGMA, AtOnce, ManyTasks, Result, Separate, train
from fastroute.plots.figures import LINES

NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "routed, masked": lambda tasks, seed: ManyTasks(tasks, SIGMA, "masked", seed),
    "routed, live channels": lambda tasks, seed: ManyTasks(tasks, SIGMA, "live", seed),
    "shared trunk": lambda tasks, seed: ManyTasks(tasks, None),
    "shared trunk, tasks at once": lambda tasks, seed: AtOnce(tasks),
    "separate networks": lambda tasks, seed: Separate(tasks),
}


def trained(
    name: str, make: Callable[[int, int], nn.Module], found: Attributes, epochs: int, seeds: int
) -> list[Result]:
    """A result per seed."""
    results = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        results.append(train(name, make(len(found.names), seed), found, epochs, Console(stderr=True)))
    return results


def mean(results: Sequence[Result], what: str) -> float:
    return statistics.fmean(getattr(r, what) for r in results)


def cells(results: Sequence[Result]) -> list[str]:
    """Accuracy (with its range if there are several seeds), F1, the worst task, time, parameters."""
    accuracies = [r.accuracy for r in results]
    span = f" ({min(accuracies):.3f} to {max(accuracies):.3f})" if len(results) > 1 else ""
    return [
        f"{mean(results, 'accuracy'):.4f}{span}", f"{mean(results, 'f1'):.3f}", f"{mean(results, 'worst'):.3f}",
        f"{mean(results, 'seconds'):.2f}", f"{results[0].parameters:,}",
    ]  # fmt: skip


HEAD = ("accuracy", "F1", "worst task", "s per epoch", "parameters")


def draw(swept: dict[float, list[Result]], path: Path) -> None:
    """Accuracy and time against sigma."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for what, style in zip(("accuracy", "f1"), LINES, strict=False):
        left.plot(list(swept), [mean(r, what) for r in swept.values()], **style, label={"f1": "F1"}.get(what, what))
    left.legend(fontsize=8, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    left.set(xlabel="share of channels off (sigma)", ylabel="mean over tasks, held out")
    right.plot(list(swept), [mean(r, "seconds") for r in swept.values()], **LINES[0])
    right.set(xlabel="share of channels off (sigma)", ylabel="seconds per epoch", ylim=(0, None))
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="MNIST's IDX files (default: scikit-learn's digits)")
    parser.add_argument("--tasks", type=int, default=BASE, help="those with names first, then random ones")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sigmas", type=float, nargs="*", default=[0, 0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a markdown file to write, or whose part 'many' to rewrite")
    parser.add_argument("--picture", type=Path, help="a picture of the sweep over sigma to write")
    args = parser.parse_args(argv)
    if min(args.tasks, args.epochs, args.seeds, args.threads) < 1:
        parser.error("--tasks, --epochs, --seeds, --threads: expected at least 1")
    if not all(0 <= sigma < 1 for sigma in args.sigmas):
        parser.error("--sigmas: expected shares from 0 to below 1")
    torch.set_num_threads(args.threads)
    found = attributes(data.digits() if args.data is None else data.mnist(args.data), args.tasks)
    rows = [[name, *cells(trained(name, make, found, args.epochs, args.seeds))] for name, make in NETWORKS.items()]
    swept: dict[float, list[Result]] = {}
    for sigma in args.sigmas:
        swept[sigma] = trained(
            f"sigma {sigma:g}", lambda t, seed, s=sigma: ManyTasks(t, float(s), "live", seed),
            found, args.epochs, args.seeds,
        )  # fmt: skip
    text = (
        f"{table(['network', *HEAD], rows)}\n\n"
        + (f"{table(['sigma, live channels', *HEAD], [[f'{s:g}', *cells(r)] for s, r in swept.items()])}\n\n")
        + f"{machine()} {len(found.names)} tasks, {args.epochs} epochs, {args.seeds} seed(s)."
    )
    write(args.out, "many", text)
    if args.picture is not None and swept:
        draw(swept, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
