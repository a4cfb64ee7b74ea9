"""Accuracy and time as tasks are added, to hundreds: a routed network and a shared trunk.

The tasks after the 42 with names are random ones: sets of digits, boxes of ink, combinations of two. A batch has the
same size throughout, its images are each of a random task, so every task sees fewer images of a batch as tasks are
added; there are more epochs, then, one for every two tasks and at least 8.

    python examples/hundreds_of_tasks.py
    python examples/hundreds_of_tasks.py --tasks 300 --epochs 200 --networks "routed, masked"
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
from _pages import interruptible, machine, table, write
from rich.console import Console
from torch import nn

from fastroute import data
from fastroute.demos.attributes import attributes
from fastroute.demos.tasks import SIGMA, ManyTasks, train

NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "routed, masked": lambda tasks, seed: ManyTasks(tasks, SIGMA, "masked", seed),
    "routed, live channels": lambda tasks, seed: ManyTasks(tasks, SIGMA, "live", seed),
    "shared trunk": lambda tasks, seed: ManyTasks(tasks, None),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="MNIST's IDX files (default: scikit-learn's digits)")
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 40, 100, 300])
    parser.add_argument("--epochs", type=int, help="for all numbers of tasks (default: half that number, at least 8)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--seed", type=int, default=0, help="of the random tasks, the masks and the training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a markdown file to write, or whose part 'hundreds' to rewrite")
    args = parser.parse_args(argv)
    if min(*args.tasks, 1 if args.epochs is None else args.epochs, args.threads) < 1:
        parser.error("--tasks, --epochs, --threads: expected at least 1")
    torch.set_num_threads(args.threads)
    digits = data.digits() if args.data is None else data.mnist(args.data)
    rows = []
    for tasks in args.tasks:
        found = attributes(digits, tasks, args.seed)
        epochs = args.epochs or max(8, tasks // 2)
        share = found.test_answers.mean(0)
        constant = float(torch.maximum(share, 1 - share).mean())  # of always the more frequent answer
        for name in args.networks:
            torch.manual_seed(args.seed)
            r = train(f"{tasks}: {name}", NETWORKS[name](tasks, args.seed), found, epochs, Console(stderr=True))
            figures = f"{r.accuracy:.4f}", f"{constant:.4f}", f"{r.balanced:.4f}", f"{r.f1:.3f}", f"{r.seconds:.2f}"
            rows.append([str(tasks), str(epochs), name, *figures, f"{r.parameters:,}"])
    head = ["tasks", "epochs", "network", "accuracy", "constant answer", "balanced accuracy", "F1"]
    head += ["s per epoch", "parameters"]
    text = f"{table(head, rows)}\n\n{machine()} Seed {args.seed}."
    write(args.out, "hundreds", text)
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
