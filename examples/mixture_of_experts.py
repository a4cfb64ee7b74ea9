"""Handwritten digits by a mixture of experts: what keeps the experts' load even, and what it costs in accuracy.

A classifier of 8 x 8 images with one mixture-of-experts layer on overlapping 4 x 4 patches, every patch through k of E
experts. The rows differ in what balances the load: nothing, the balance loss of Switch Transformers, or a bias that is
moved against the load. Two networks with a feed-forward layer instead of experts are beside it: one as wide as the k
experts that a patch takes (as many active parameters), one as wide as all of them.

    python examples/mixture_of_experts.py
    python examples/mixture_of_experts.py --experts 4 --k 1 --epochs 5 --seeds 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
from _pages import interruptible, machine, table
from torch import Tensor, nn

from fastroute import data
from fastroute.networks import MoE, rebalance

WIDTH, HIDDEN, PATCHES, CLASSES = 32, 16, 9, 10

#: What balances the load, as options of the gating.
BALANCES: dict[str, dict[str, float]] = {
    "no balancing": {"balance_loss": 0.0},
    "balance loss 0.01": {"balance_loss": 0.01, "z_loss": 1e-3},
    "moving bias 0.01": {"balance_loss": 0.0, "bias_balancing": 0.01},
}
ACTIVE, ALL = "dense, as wide as k experts", "dense, as wide as all experts"


class Classifier(nn.Module):
    """Patches [B, 9, 16] -> a residual layer of experts (or a dense one) -> their mean -> 10 classes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(16, WIDTH), nn.Parameter(0.1 * torch.randn(PATCHES, WIDTH))
        self.norm, self.layer, self.head = nn.LayerNorm(WIDTH), layer, nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logits, the loss of the gating, how many patches chose each expert)."""
        patches = images.unfold(1, 4, 2).unfold(2, 4, 2).reshape(len(images), PATCHES, 16)
        x = self.embed(patches) + self.place
        h, loss, counts = self.norm(x), x.new_zeros(()), None
        if isinstance(self.layer, MoE):
            h, aux = self.layer(h, return_aux=True)
            loss, counts = aux.loss, aux.counts
        else:
            h = self.layer(h)
        return self.head((x + h).mean(1)), loss, counts


class Dense(nn.Module):
    """A gated feed-forward layer: an expert without a choice."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * hidden, bias=False), nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        g, v = self.up(x).chunk(2, -1)
        y: Tensor = self.down(nn.functional.silu(g) * v)
        return y


@dataclass
class Run:
    """One training run."""

    accuracy: float
    ms_per_step: float
    load: list[float] = field(default_factory=list)  #: each expert's share of the test set's entries


def train(layer: nn.Module, digits: data.Digits, epochs: int, batch: int = 64) -> Run:
    """Train a classifier with that layer and test it."""
    net = Classifier(layer)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    optimizer.register_step_post_hook(lambda *_: rebalance(net))
    times = []
    for _ in range(epochs):
        for rows in torch.randperm(len(digits.train_labels)).split(batch):
            start = time.perf_counter()
            logits, aux, _ = net(digits.train_images[rows])
            loss = nn.functional.cross_entropy(logits, digits.train_labels[rows]) + aux
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
    with torch.no_grad():
        logits, _, counts = net.eval()(digits.test_images)
    accuracy = float((logits.argmax(1) == digits.test_labels).double().mean())
    load = [] if counts is None else (counts.double() / counts.sum()).tolist()
    return Run(accuracy, 1000 * statistics.median(times), load)


def made(name: str, experts: int, k: int) -> nn.Module:
    """The layer of a row."""
    if name in BALANCES:
        options: dict[str, Any] = {**BALANCES[name], "normalize": k > 1}  # one weight alone would always be 1
        return MoE(WIDTH, HIDDEN, experts, k, **options)
    return Dense(HIDDEN * (k if name == ACTIVE else experts))


def compare(names: Sequence[str], experts: int, k: int, epochs: int, seeds: int) -> str:
    """The table."""
    digits, rows = data.digits(), []
    for name in names:
        runs = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            runs.append(train(made(name, experts, k), digits, epochs))
        layer = made(name, experts, k)
        total = sum(p.numel() for p in layer.parameters())
        experts_own = 3 * WIDTH * HIDDEN * experts if name in BALANCES else 0
        active = total - experts_own + experts_own * k // experts
        reached = [run.accuracy for run in runs]
        accuracy = f"{statistics.mean(reached):.3f} ({min(reached):.3f} to {max(reached):.3f})"
        load = " ".join(f"{100 * share:.0f}" for share in sorted(runs[0].load, reverse=True)) or "—"
        ms = statistics.median(run.ms_per_step for run in runs)
        rows.append([name, f"{active}", f"{total}", accuracy, load, f"{ms:.2f}"])
    head = ["layer", "active parameters", "all", "accuracy (range)", "load per expert, %", "ms per step"]
    return table(head, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8, metavar="E")
    parser.add_argument("--k", type=int, default=2, help="experts that a patch takes")
    parser.add_argument("--epochs", type=int, default=15, metavar="N")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    given = parser.parse_args(argv)
    if min(given.experts, given.k, given.epochs, given.seeds, given.threads) < 1:
        parser.error("--experts, --k, --epochs, --seeds, --threads: expected at least 1")
    if given.k > given.experts:
        parser.error(f"--k: expected at most --experts, {given.experts}, got {given.k}")
    torch.set_num_threads(given.threads)
    print(f"{given.experts} experts of {HIDDEN} hidden features, {given.k} for a patch; {given.epochs} epochs.")
    print(f"{machine()}\n")
    print(compare([*BALANCES, ACTIVE, ALL], given.experts, given.k, given.epochs, given.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
