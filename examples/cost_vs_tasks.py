"""What a training step costs as tasks are added: routing, cross-stitch and separate networks.

A sample of a routing network passes one module per layer, however many tasks there are; of a cross-stitch network
(Misra et al. 2016) it passes every task's column. The batch has the same size throughout, its samples' tasks are drawn
at random.

    python examples/cost_vs_tasks.py
    python examples/cost_vs_tasks.py --tasks 2 20 --widths 48 --rounds 5
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
from _pages import interruptible, machine, table, write
from torch import Tensor, nn

from fastroute.networks import WPL, CollaborationReward, Initialization, Loss, NegLossReward, Selection, Trajectory
from fastroute.plots.figures import LINES

FEATURES, CLASSES, FIXED = 128, 5, 10


class Routed(nn.Module):
    """Three layers of ``modules`` modules; tabular WPL agents, one per task, choose among them (the paper's set-up)."""

    def __init__(self, tasks: int, width: int, modules: int | None = None) -> None:
        super().__init__()
        K, widths = modules or tasks, (FEATURES, width, width, CLASSES)
        self.start = Initialization()
        self.decisions, self.selections = nn.ModuleList(), nn.ModuleList()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            reward = CollaborationReward(0.3, K)
            self.decisions.append(
                WPL(K, a, num_agents=tasks, policy_storage_type="tabular", additional_reward_func=reward)
            )
            parts = [[nn.Linear(a, b), nn.ReLU()] if i < 2 else [nn.Linear(a, b)] for _ in range(K)]
            self.selections.append(Selection(*(nn.Sequential(*p) for p in parts)))

    def forward(self, x: Tensor, tasks: Tensor) -> tuple[Tensor, Trajectory]:
        x, meta, _ = self.start(x, tasks)
        for decision, selection in zip(self.decisions, self.selections, strict=True):
            x, meta, actions = decision(x, meta, tasks)
            x, meta, _ = selection(x, meta, actions)
        return x, meta


class Separate(nn.Module):
    """A network per task, each sample through its own."""

    def __init__(self, tasks: int, width: int) -> None:
        super().__init__()
        self.start = Initialization()
        self.networks = Selection(
            *(
                nn.Sequential(
                    nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
                )
                for _ in range(tasks)
            )
        )

    def forward(self, x: Tensor, tasks: Tensor) -> tuple[Tensor, Trajectory]:
        x, meta, _ = self.start(x, tasks)
        x, meta, _ = self.networks(x, meta, tasks)
        return x, meta


class CrossStitch(nn.Module):
    """A column per task and, after each hidden layer, every column a mixture of all: x_t <- sum_s alpha_ts x_s.

    Written to be fast: all columns of a layer are one matrix product, a mixture is another, and of the last mixture
    only the column of the sample's own task is computed.
    """

    def __init__(self, tasks: int, width: int) -> None:
        super().__init__()
        self.start = Initialization()
        self.first = nn.Linear(FEATURES, tasks * width)  # every column sees the same input
        self.weight = nn.Parameter(torch.stack([nn.Linear(width, width).weight.detach().T for _ in range(tasks)]))
        self.bias = nn.Parameter(torch.zeros(tasks, 1, width))
        alpha = torch.full((tasks, tasks), 0.1 / max(tasks - 1, 1)).fill_diagonal_(0.9)  # mostly one's own, as there
        self.stitches = nn.ParameterList([alpha.clone(), alpha.clone()])
        self.heads = Selection(*(nn.Linear(width, CLASSES) for _ in range(tasks)))

    def forward(self, x: Tensor, tasks: Tensor) -> tuple[Tensor, Trajectory]:
        x, meta, _ = self.start(x, tasks)
        T, _, width = self.weight.shape
        B = len(x)
        columns = self.first(x).relu().reshape(B, T, width).transpose(0, 1)  # [T, B, width]
        columns = (self.stitches[0] @ columns.reshape(T, -1)).reshape(T, B, width)
        columns = torch.baddbmm(self.bias, columns, self.weight).relu()
        own = (self.stitches[1][tasks][:, None] @ columns.transpose(0, 1))[:, 0]  # [B, width]
        own, meta, _ = self.heads(own, meta, tasks)
        return own, meta


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "routing, K = T": Routed,
    f"routing, K = {FIXED}": lambda tasks, width: Routed(tasks, width, FIXED),
    "cross-stitch": CrossStitch,
    "separate": Separate,
}
ROUTING, RIVAL = "routing, K = T", "cross-stitch"


@dataclass
class Cost:
    """Of one network at one number of tasks."""

    parameters: int
    held: int  #: bytes that the forward pass keeps for the backward pass
    wall: list[float] = field(default_factory=list)  #: seconds of each step
    cpu: list[float] = field(default_factory=list)

    @property
    def wall_ms(self) -> float:
        return statistics.median(self.wall) * 1e3

    @property
    def cpu_ms(self) -> float:
        return statistics.median(self.cpu) * 1e3


def held_bytes(step: Callable[[], Tensor], model: nn.Module) -> int:
    """The storages that autograd keeps during a forward pass, each once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = step()
    del loss
    return sum(found.values())


def measure(tasks: int, width: int, batch: int, rounds: int) -> dict[str, Cost]:
    """All networks in turn, round after round, so that a busy moment does not fall on one of them."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, FEATURES), torch.randint(CLASSES, (batch,))
    whose = torch.randint(tasks, (batch,))
    objective = Loss(nn.CrossEntropyLoss(), NegLossReward())
    steps: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {}
    costs: dict[str, Cost] = {}
    for name, make in NETWORKS.items():
        model = make(tasks, width)

        def step(model: nn.Module = model) -> Tensor:
            scores, meta = model(x, whose)
            module_loss, routing_loss = objective(scores, meta, y)
            return module_loss + routing_loss  # type: ignore[no-any-return]

        steps[name] = model, step
        step().backward()
        costs[name] = Cost(sum(p.numel() for p in model.parameters()), held_bytes(step, model))
    gc.collect()
    gc.disable()  # a collection falls on whoever happens to run
    try:
        for _ in range(rounds):
            for name, (model, step) in steps.items():
                for p in model.parameters():
                    p.grad = None
                wall, cpu = time.perf_counter(), time.process_time()
                step().backward()
                costs[name].cpu.append(time.process_time() - cpu)
                costs[name].wall.append(time.perf_counter() - wall)
            gc.collect()
    finally:
        gc.enable()
    return costs


def report(found: dict[tuple[int, int], dict[str, Cost]]) -> str:
    """Two tables per width: time, and memory."""
    parts = []
    for width in dict.fromkeys(w for w, _ in found):
        times, memory = [], []
        for (w, tasks), costs in found.items():
            if w == width:
                saved = 1 - costs[ROUTING].cpu_ms / costs[RIVAL].cpu_ms
                times.append(
                    [str(tasks), *(f"{c.cpu_ms:.2f} ({c.wall_ms:.2f})" for c in costs.values()), f"{saved:.0%}"]
                )
                memory.append(
                    [str(tasks), *(f"{c.held / 1e6:.1f} ({c.parameters / 1e3:,.0f})" for c in costs.values())]
                )
        parts.append(f"**Width {width}: CPU time of a step (and wall time), ms**")
        parts.append(table(["tasks", *NETWORKS, "CPU time saved over cross-stitch"], times))
        parts.append(f"**Width {width}: MB held for the backward pass (and thousands of parameters)**")
        parts.append(table(["tasks", *NETWORKS], memory))
    return "\n\n".join(parts)


def draw(found: dict[tuple[int, int], dict[str, Cost]], path: Path) -> None:
    """CPU time and memory against the number of tasks, a column per width."""
    from matplotlib.figure import Figure

    widths = list(dict.fromkeys(w for w, _ in found))
    figure = Figure(figsize=(3.6 * len(widths), 5.4), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(widths), squeeze=False, sharex=True)
    for column, width in enumerate(widths):
        tasks = [t for w, t in found if w == width]
        for name, style in zip(NETWORKS, LINES, strict=False):
            costs = [found[width, t][name] for t in tasks]
            axes[0, column].plot(tasks, [c.cpu_ms for c in costs], **style, markersize=4, label=name)
            axes[1, column].plot(tasks, [c.held / 1e6 for c in costs], **style, markersize=4)
        axes[0, column].set_title(f"width {width}", fontsize=10)
        axes[1, column].set_xlabel("tasks")
        for ax in axes[:, column]:
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(tasks, [str(t) for t in tasks])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("CPU time of a training step, ms")
    axes[1, 0].set_ylabel("held for the backward pass, MB")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False
    )
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 5, 10, 20, 50, 100])
    parser.add_argument("--widths", type=int, nargs="+", default=[48, 256])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a markdown file to write, or whose part 'cost' to rewrite")
    parser.add_argument("--picture", type=Path, help="a picture to write")
    args = parser.parse_args(argv)
    if min(*args.tasks, *args.widths, args.batch, args.rounds, args.threads) < 1:
        parser.error("--tasks, --widths, --batch, --rounds, --threads: expected at least 1")
    torch.set_num_threads(args.threads)
    found: dict[tuple[int, int], dict[str, Cost]] = {}
    for width in args.widths:
        for tasks in args.tasks:
            found[width, tasks] = measure(tasks, width, args.batch, args.rounds)
            line = ", ".join(f"{name} {c.cpu_ms:.2f}" for name, c in found[width, tasks].items())
            print(f"width {width}, {tasks} tasks: CPU ms: {line}", file=sys.stderr, flush=True)
    text = f"{report(found)}\n\n{machine()} Batch {args.batch}, median of {args.rounds} steps."
    write(args.out, "cost", text)
    if args.picture is not None:
        draw(found, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
