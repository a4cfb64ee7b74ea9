"""Handwritten digits as eight tasks of one model: nine ways to divide a network among them, each a list of dicts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from .. import data, plots
from ..multitask import (
    CGC,
    PLE,
    CrossStitch,
    EachTask,
    MMoE,
    MTLModel,
    SimpleSelect,
    ToTasks,
    Unpack,
    relative_improvement,
)
from ..networks import WPL, CollaborationReward, Initialization, Loss, NegLossReward, PerTaskAssignment, Selection
from ..tasks import TaskRouter
from . import Options, on_digits
from .attributes import attributes
from .training import compare, console_for, training, verdict

#: The tasks, and how many classes each has.
TASKS = {
    "digit": 10,
    "odd": 2,
    "at least 5": 2,
    "has a loop": 2,
    "much ink": 2,
    "ink at the top": 2,
    "like its mirror image": 2,
    "wide": 2,
}
NAMES = tuple(TASKS)
T = len(TASKS)
WIDTH, WIDE, EXPERTS, MODULES = 48, 172, 4, 4
SIGMA = 0.25  #: of the routed network: the share of its units that a task does without
COLLABORATION = 0.3  #: how much agents of the routing network are paid for agreeing, as in its paper
BATCH, LEARNING_RATE = 64, 3e-3
ACCURACY_BAR = 0.85  #: mean over tasks on held-out images, of the first network; below it the demo has failed

Nodes = list[dict[str, Any]]


def node(name: str, layers: Any, *anchors: str) -> dict[str, Any]:
    """A dict of a model."""
    return {"name": name, "layers": layers, **({"anchor_layer": list(anchors)} if anchors else {})}


def trunk(pixels: int, width: int = WIDTH) -> nn.Sequential:
    """[B, pixels] -> [B, width]."""
    return nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


def heads(anchors: Sequence[str], width: int = WIDTH) -> Nodes:
    """A linear layer and a loss per task."""
    made = zip(TASKS.items(), anchors, strict=True)
    return [{**node(name, nn.Linear(width, n), of), "loss": nn.CrossEntropyLoss()} for (name, n), of in made]


def picked(anchor: str, keys: Sequence[Any] = NAMES, what: str = "for") -> Nodes:
    """A node per task, for its part of what a layer gives."""
    return [node(f"{what} {name}", SimpleSelect(key), anchor) for name, key in zip(NAMES, keys, strict=True)]


def divided(layer: nn.Module) -> Nodes:
    """A layer with an output per task, and heads."""
    return [node("experts", layer), *picked("experts"), *heads([f"for {name}" for name in NAMES])]


def single(pixels: int) -> Nodes:
    """A network per task."""
    alone = [node(f"{name} alone", trunk(pixels)) for name in NAMES]
    return [*alone, *heads([f"{name} alone" for name in NAMES])]


def shared(pixels: int) -> Nodes:
    """One trunk for all."""
    return [node("trunk", trunk(pixels)), *heads(["trunk"] * T)]


def wide(pixels: int) -> Nodes:
    """One trunk for all, with about as many parameters as a network per task has."""
    return [node("trunk", trunk(pixels, WIDE)), *heads(["trunk"] * T, WIDE)]


def mmoe(pixels: int) -> Nodes:
    """Experts for all, in proportions of its own for each task."""
    return divided(MMoE(pixels, EXPERTS, NAMES, hidden_features=WIDTH, out_features=WIDTH))


def cgc(pixels: int) -> Nodes:
    """An expert of its own for each task, and shared ones."""
    return divided(CGC(pixels, 1, EXPERTS // 2, NAMES, hidden_features=WIDTH, out_features=WIDTH))


def ple(pixels: int) -> Nodes:
    """The same twice, of experts with one layer."""
    return divided(PLE(pixels, 1, EXPERTS // 2, NAMES, levels=2, out_features=WIDTH))


def cross_stitch(pixels: int) -> Nodes:
    """A network per task, which mix what they have after each layer."""
    made, before = [], ["root"] * T
    for level, width in enumerate((pixels, WIDTH)):
        columns = [f"{name} {level}" for name in NAMES]
        layers = [nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU()) for _ in NAMES]
        made += [node(c, layer, b) for c, layer, b in zip(columns, layers, before, strict=True)]
        made.append(node(f"stitch {level}", CrossStitch(NAMES), *columns))
        made += picked(f"stitch {level}", what=f"stitched {level}")
        before = [f"stitched {level} {name}" for name in NAMES]
    return [*made, *heads(before)]


def task_routing(pixels: int) -> Nodes:
    """One network, of whose units each task has a random part; an image goes through it once for each task."""
    made = [
        node("every", EachTask(T)),
        node("images", SimpleSelect(0), "every"),
        node("task", SimpleSelect(1), "every"),
    ]
    before = "images"
    for level, width in enumerate((pixels, WIDTH)):
        generator = torch.Generator().manual_seed(level)
        made += [
            node(f"layer {level}", nn.Linear(width, WIDTH), before),
            node(f"routed {level}", TaskRouter(WIDTH, T, SIGMA, generator=generator), f"layer {level}", "task"),
            node(f"relu {level}", nn.ReLU(), f"routed {level}"),
        ]
        before = f"relu {level}"
    made += [node("apart", ToTasks(T), before), *picked("apart", range(T))]
    return [*made, *heads([f"for {name}" for name in NAMES])]


def routing_network(pixels: int) -> Nodes:
    """Layers of modules, among which an agent per task chooses; it learns by reinforcement."""
    made = [
        node("every", EachTask(T)),
        node("start", Unpack(Initialization()), "every"),
        node("task", Unpack(PerTaskAssignment(), take=2), "start"),
        node("choice 0", Unpack(PerTaskAssignment()), "start"),
    ]
    before = "choice 0"
    for level, width in enumerate((pixels, WIDTH)):
        reward = CollaborationReward(COLLABORATION, MODULES)
        decision = WPL(MODULES, width, num_agents=T, policy_storage_type="tabular", additional_reward_func=reward)
        modules = [nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU()) for _ in range(MODULES)]
        made += [
            node(f"decision {level}", Unpack(decision), before),
            node(f"selection {level}", Unpack(Selection(*modules)), f"decision {level}"),
        ]
        if level == 0:
            made += [
                node("carried", lambda triple: triple[:2], "selection 0"),
                node("choice 1", lambda pair, task: (*pair, task), "carried", "task"),
            ]
            before = "choice 1"
    made += [
        node("record", SimpleSelect(1), "selection 1"),
        node("features", SimpleSelect(0), "selection 1"),
        node("apart", ToTasks(T), "features"),
        *picked("apart", range(T)),
    ]
    return [*made, *heads([f"for {name}" for name in NAMES])]


#: The first is what the others are measured against; the second has to learn.
NETWORKS: dict[str, Callable[[int], Nodes]] = {
    "single-task networks": single,
    "shared trunk": shared,
    "shared trunk, wide": wide,
    "MMoE": mmoe,
    "CGC": cgc,
    "PLE": ple,
    "cross-stitch": cross_stitch,
    "task routing": task_routing,
    "routing network": routing_network,
}


def model_of(name: str, pixels: int) -> MTLModel:
    """The model with that name; a routing network has its record as a last output."""
    outputs = [*NAMES, "record"] if name == "routing network" else list(NAMES)
    return MTLModel(NETWORKS[name](pixels), outputs)


class Objective:
    """The sum of the tasks' losses, and what a routing network's agents learn from."""

    def __init__(self) -> None:
        self.routing = Loss(nn.CrossEntropyLoss(), NegLossReward())

    def __call__(self, model: MTLModel, x: Tensor, labels: Sequence[Tensor]) -> Tensor:
        made = model(x)
        total, _ = model.loss(made, dict(zip(NAMES, labels, strict=True)))
        outputs = made[0]
        if len(outputs) == T:
            return total
        each = [nn.functional.cross_entropy(y, t, reduction="none") for y, t in zip(outputs, labels, strict=False)]
        per_sample = torch.cat(each).detach()  # in EachTask's order
        routing: Tensor = self.routing(per_sample, outputs[T], external_losses=per_sample)[1]
        return total + T * routing


@dataclass(frozen=True)
class Tasks:
    """Images [N, pixels] and a label per task [N]."""

    images: Tensor
    labels: tuple[Tensor, ...]
    test_images: Tensor
    test_labels: tuple[Tensor, ...]


def tasks_of(found: data.Digits, images: int | None = None) -> Tasks:
    """The digits' tasks, the first ``images`` of them to learn from."""
    asked = attributes(found)
    columns = [asked.names.index(name) for name in NAMES[1:]]
    n = len(found.train_images) if images is None else images

    def labels(digits: Tensor, answers: Tensor, n: int) -> tuple[Tensor, ...]:
        return (digits[:n], *(answers[:n, c].long() for c in columns))

    return Tasks(
        found.train_images[:n].flatten(1),
        labels(found.train_labels, asked.train_answers, n),
        found.test_images.flatten(1),
        labels(found.test_labels, asked.test_answers, len(found.test_labels)),
    )


@dataclass(frozen=True)
class Result:
    """What came of a network."""

    accuracies: tuple[float, ...]  #: of each task, on the held-out images
    ms: float  #: of a training step, process CPU time, the median
    parameters: int

    @property
    def accuracy(self) -> float:
        """Their mean."""
        return statistics.fmean(self.accuracies)


def improvement(result: Result, baseline: Result) -> float:
    """Delta m: the mean over tasks of the relative gain in accuracy over the baseline; NaN over one of 0."""
    mine, theirs = (dict(zip(NAMES, r.accuracies, strict=False)) for r in (result, baseline))
    return relative_improvement(mine, theirs) if all(theirs.values()) else math.nan


@torch.no_grad()
def test(model: MTLModel, found: Tasks) -> tuple[float, ...]:
    """Held-out accuracy of each task."""
    model.eval()
    outputs = model(found.test_images)[0]
    model.train()
    return tuple(float((y.argmax(1) == t).float().mean()) for y, t in zip(outputs[:T], found.test_labels, strict=True))


def train(name: str, model: MTLModel, found: Tasks, epochs: int, console: Console) -> Result:
    """Train a network, with a bar."""
    objective = Objective()
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, LEARNING_RATE / 20)
    label, parts = f"{name:<{max(map(len, NETWORKS))}}", {"model": model, "optimizer": optimizer, "schedule": schedule}
    times: list[float] = []
    device = found.images.device
    with training(label, epochs, console, "loss {task.fields[loss]:.3f}", **parts) as epoch:
        for _ in range(epochs):
            losses = []
            for batch in torch.randperm(len(found.images), device=device).split(BATCH):
                began = time.process_time()
                loss = objective(model, found.images[batch], [t[batch] for t in found.labels])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                times.append(time.process_time() - began)
                losses.append(loss.detach())
            schedule.step()
            epoch(loss=float(torch.stack(losses).mean()))
    parameters = sum(p.numel() for p in model.parameters())
    return Result(test(model, found), statistics.median(times) * 1e3, parameters)


def show(model: MTLModel, console: Console) -> None:
    """The graph, a line per node."""
    width = max(map(len, model.layer_names))
    for name in model.layer_names:
        kind = type(getattr(model, name)).__name__
        anchors = ", ".join(model.g.predecessors(name))
        console.print(f"  {name:<{width}}  {kind:<12} <- {anchors}", highlight=False, markup=False, soft_wrap=True)


def rows(results: dict[str, Result]) -> Iterator[Sequence[str]]:
    """The networks' table."""
    baseline = next(iter(results.values()))
    for name, r in results.items():
        gain = f"{improvement(r, baseline):+.2%}"
        yield name, f"{r.accuracy:.4f}", f"{min(r.accuracies):.3f}", gain, f"{r.ms:.2f} ms", f"{r.parameters:,}"


def run(options: Options) -> int:
    """0, or 1 if the shared trunk has not learnt enough."""
    return on_digits(options, _run)


def _run(digits: data.Digits, options: Options, began: float) -> int:
    console = console_for(options.quiet)
    found = tasks_of(digits)
    n, pixels = found.images.shape
    epochs = options.epochs or max(1, min(40, 60_000 // n))
    console.print(
        f"{n} handwritten digits of {pixels} pixels to learn from, {len(found.test_images)} held out\n"
        f"{T} tasks: {', '.join(NAMES)}\non {options.device}, seed {options.seed}",
        highlight=False,
        markup=False,
    )
    drawn = MTLModel(cgc(pixels), NAMES)
    console.print("CGC as a graph: node, layer, anchors", highlight=False)
    show(drawn, console)
    plots.graph(
        drawn, title=f"{T} tasks, an expert of each task's own and {EXPERTS // 2} shared ones", path=options.out
    )
    results: dict[str, Result] = {}
    for name in NETWORKS:
        torch.manual_seed(options.seed)
        results[name] = train(name, model_of(name, pixels).to(found.images.device), found, epochs, console)
    headings = "accuracy", "worst", "Δm", "step", "parameters"
    compare(console, "the networks on held-out digits, mean over tasks", headings, rows(results))
    console.print(f"the graph as a picture: {options.out}", highlight=False, markup=False, soft_wrap=True)
    return verdict(console, results["shared trunk"].accuracy, ACCURACY_BAR, began)
