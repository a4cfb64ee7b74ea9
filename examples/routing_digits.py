"""Handwritten digits as five tasks: does every way of learning to route learn?

The tasks are {0, 1}, {2, 3}, ..., {8, 9}; a sample's task is known and the two digits have to be told apart. Three
routed layers choose among five modules each, and an agent per task makes the choices. The table compares all algorithms
with the accuracy that Pytorch-Routing reached in the same check, and with two networks that need no router.

    python examples/routing_digits.py
    python examples/routing_digits.py --algorithms WPL REINFORCE --epochs 4 --seeds 1
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
from _pages import interruptible, machine, table, write
from torch import Tensor, nn

from fastroute import data, networks
from fastroute.networks import (
    CollaborationReward,
    CorrectClassifiedReward,
    Initialization,
    Loss,
    NegLossReward,
    PerTaskAssignment,
    Selection,
    Trajectory,
)

TASKS, MODULES, WIDTH = 5, 5, 48
BATCH, LEARNING_RATE = 64, 3e-3
COLLABORATION = 0.3  #: the collaboration reward's share of the final one, as in the paper


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    algorithm: str  #: a class of fastroute.networks, or one of BASELINES
    storage: str = "-"
    reward: str = "-"  #: final: minus the loss, or correct or not
    collaboration: bool = False
    upstream: float | None = None  #: Pytorch-Routing's accuracy, one seed
    decisions_rate: float = LEARNING_RATE  #: the decisions' learning rate


ROWS = (
    Row("static per-task modules", upstream=0.994),
    Row("shared trunk, a head per task"),
    Row("WPL", "tabular", "neg", True, 0.972),
    Row("WPL", "tabular", "correct", True, 0.978),
    # p is linear in the scores, so a policy that decides needs large ones: at 3e-3 it reaches 0.967 and is still spread
    Row("WPL", "approx", "neg", upstream=0.994, decisions_rate=3e-2),
    Row("REINFORCE", "approx", "neg", upstream=0.978),
    Row("REINFORCE", "tabular", "correct", upstream=0.892),
    Row("QLearning", "tabular", "correct", upstream=0.983),
    Row("QLearning", "approx", "neg", upstream=0.919),
    # Adam moves a table's entry by at most the rate in each of the 184 steps. At 3e-3 the values do not come down from
    # 1 / K, where they begin, to the rewards of all five modules: the best one is the one that was tried least.
    Row("SARSA", "tabular", "neg", upstream=0.947, decisions_rate=3e-2),
    Row("ActorCritic", "approx", "neg", upstream=0.986),
    Row("AAC", "approx", "neg", upstream=0.975),
    Row("AAC", "tabular", "correct", upstream=0.886),
    Row("AdvantageLearning", "approx", "neg", upstream=0.986),
    Row("EGreedyREINFORCE", "approx", "neg", upstream=0.944),
    Row("EGreedyAAC", "approx", "neg", upstream=0.994),
    Row("REINFORCEBl1", "approx", "neg", upstream=0.981),
    Row("REINFORCEBl2", "approx", "neg", upstream=0.986),
    Row("GumbelSoftmax", "approx", "neg", upstream=0.978),
    Row("RELAX", "approx", "neg", upstream=0.944),
)


def layer(a: int, b: int, last: bool) -> nn.Module:
    """A module of a routed layer."""
    return nn.Linear(a, b) if last else nn.Sequential(nn.Linear(a, b), nn.ReLU())


class Routed(nn.Module):
    """[B, features] and tasks [B] to logits [B, 2]: in each of three layers a sample takes one of five modules."""

    def __init__(self, row: Row, features: int, formula: str = "intended") -> None:
        super().__init__()
        widths = (features, WIDTH, WIDTH, 2)
        self.start = Initialization()
        self.decisions, self.selections = nn.ModuleList(), nn.ModuleList()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            self.decisions.append(self._decision(row, a, formula))
            self.selections.append(Selection(*(layer(a, b, i == 2) for _ in range(MODULES))))

    @staticmethod
    def _decision(row: Row, features: int, formula: str) -> nn.Module:
        if row.storage == "-":
            return PerTaskAssignment()
        reward = CollaborationReward(COLLABORATION, MODULES, formula=formula) if row.collaboration else None  # type: ignore[arg-type]
        made: nn.Module = getattr(networks, row.algorithm)(
            MODULES,
            features,
            num_agents=TASKS,
            policy_storage_type=row.storage,
            additional_reward_func=reward,
            formula=formula,
        )
        return made

    def forward(self, x: Tensor, tasks: Tensor) -> tuple[Tensor, Trajectory]:
        x, meta, _ = self.start(x, tasks)
        for decision, selection in zip(self.decisions, self.selections, strict=True):
            x, meta, actions = decision(x, meta, tasks)
            x, meta, _ = selection(x, meta, actions)
        return x, meta


class Shared(nn.Module):
    """The same depth, one trunk for all tasks, a head for each."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.start = Initialization()
        self.trunk = nn.Sequential(layer(features, WIDTH, False), layer(WIDTH, WIDTH, False))
        self.heads = Selection(*(layer(WIDTH, 2, True) for _ in range(TASKS)))

    def forward(self, x: Tensor, tasks: Tensor) -> tuple[Tensor, Trajectory]:
        x, meta, _ = self.start(x, tasks)
        x, meta, _ = self.heads(self.trunk(x), meta, tasks)
        return x, meta


@dataclass(frozen=True)
class Examples:
    """Images [N, 64], their task, and which of the task's two digits they are."""

    x: Tensor
    task: Tensor
    label: Tensor

    def __getitem__(self, i: Tensor) -> Examples:
        return Examples(self.x[i], self.task[i], self.label[i])

    def __len__(self) -> int:
        return len(self.x)


def digits() -> tuple[Examples, Examples]:
    """1437 to train on and 360 to test on, the same ones every time."""
    images, labels, more_images, more_labels = data.digits()
    x, digit = torch.cat([images, more_images]).flatten(1), torch.cat([labels, more_labels])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    found = Examples(x, digit // 2, digit % 2)
    return found[order[:1437]], found[order[1437:]]


@dataclass(frozen=True)
class Result:
    """One training run."""

    accuracy: float
    routes: int  #: distinct routes on the test set
    seconds: float  #: training
    ms: float  #: a step, the median


def train(row: Row, epochs: int, seed: int, formula: str = "intended") -> Result:
    """Train a network and test it."""
    torch.manual_seed(seed)
    learn, test = digits()
    features = learn.x.shape[1]
    model = Shared(features) if row.algorithm.startswith("shared") else Routed(row, features, formula)
    reward = CorrectClassifiedReward() if row.reward == "correct" else NegLossReward()
    objective = Loss(nn.CrossEntropyLoss(), reward, formula=formula)  # type: ignore[arg-type]
    groups: list[dict[str, Any]] = [{"params": [p for n, p in model.named_parameters() if n[:9] != "decisions"]}]
    groups += [{"params": list(model.decisions.parameters()), "lr": row.decisions_rate}] if row.storage != "-" else []
    optimizer = torch.optim.Adam(groups, lr=LEARNING_RATE, fused=True)
    times: list[float] = []
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(learn)).split(BATCH):
            began, batch = time.perf_counter(), learn[i]
            scores, meta = model(batch.x, batch.task)
            module_loss, routing_loss = objective(scores, meta, batch.label)
            optimizer.zero_grad()
            (module_loss + routing_loss).backward()
            optimizer.step()
            times.append(time.perf_counter() - began)
    model.eval()
    with torch.no_grad():
        scores, meta = model(test.x, test.task)
    right = (scores.argmax(1) == test.label).float().mean()
    routes = meta.summary().routes if meta.records else (1 if isinstance(model, Shared) else TASKS)
    return Result(float(right), routes, sum(times), statistics.median(times) * 1e3)


def line(row: Row, results: Sequence[Result]) -> list[str]:
    """The row as cells: means, and the range of the accuracies."""
    found = [r.accuracy for r in results]
    mean, routes = statistics.mean(found), sorted(r.routes for r in results)
    cells = [row.algorithm, row.storage, row.reward, "collab" if row.collaboration else "-"]
    cells += [f"{mean:.3f} ({min(found):.3f} to {max(found):.3f})"]
    if row.upstream is None:
        cells += ["-", "-"]
    else:
        cells += [f"{row.upstream:.3f}", "yes" if mean >= row.upstream - 0.02 else "**no**"]
    cells += [f"{routes[0]}" if routes[0] == routes[-1] else f"{routes[0]} to {routes[-1]}"]
    cells += [f"{statistics.mean(r.seconds for r in results):.1f}", f"{statistics.median(r.ms for r in results):.1f}"]
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(dict.fromkeys(row.algorithm for row in ROWS))
    parser.add_argument("--algorithms", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
    parser.add_argument("--formula", choices=("intended", "upstream"), default="intended")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a markdown file to write, or whose part 'learning' to rewrite")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.seeds < 1 or args.threads < 1:
        parser.error("--epochs, --seeds, --threads: expected at least 1")
    torch.set_num_threads(args.threads)
    lines = []
    for row in ROWS:
        if row.algorithm in args.algorithms:
            lines.append(line(row, [train(row, args.epochs, seed, args.formula) for seed in range(args.seeds)]))
            print("  ".join(lines[-1]), file=sys.stderr, flush=True)
    head = ["class", "storage", "final reward", "per action", "accuracy (range)", "upstream", "in its band", "routes"]
    text = table([*head, "seconds", "ms/step"], lines)
    text += f"\n\n{machine()} {args.epochs} epochs, {args.seeds} seed(s), {args.formula} formulas."
    write(args.out, "learning", text)
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
