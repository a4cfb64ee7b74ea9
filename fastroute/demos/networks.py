"""Handwritten digits as five tasks, in a network that learns which of its modules each task goes through."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn

from .. import data, plots
from ..networks import (
    WPL,
    CollaborationReward,
    GumbelSoftmax,
    Initialization,
    Loss,
    NegLossReward,
    PerTaskAssignment,
    Selection,
    Summary,
    Trajectory,
)
from ..ops.backends import explain
from . import Options, on_digits
from .training import compare, console_for, training, verdict

TASKS, CLASSES = 5, 2  #: digit // 2, which is known, and digit % 2, which is asked for
MODULES, WIDTH, LAYERS = 5, 48, 3
ACCURACY_BAR = 0.95  #: on held-out images, of the routed network; below it the demo has failed
BATCH, LEARNING_RATE = 64, 3e-3
COLLABORATION = 0.3  #: what agents get for agreeing, as a share of the final reward (the paper's value)


def _layers(features: int) -> list[nn.Module]:
    widths = (features, *[WIDTH] * (LAYERS - 1))
    hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return [*hidden, nn.Linear(WIDTH, CLASSES)]


class Routed(nn.Module):
    """Images [B, H, W] and tasks [B] to logits [B, 2]: a sample takes one of five modules in each of three layers.

    Args:
        features: H W.
        decide: makes the decision of a layer from the width of its input.
    """

    def __init__(self, features: int, decide: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.start = Initialization()
        self.decisions = nn.ModuleList(decide(width) for width in (features, *[WIDTH] * (LAYERS - 1)))
        columns = zip(*(_layers(features) for _ in range(MODULES)), strict=True)
        self.selections = nn.ModuleList(Selection(*modules) for modules in columns)

    def forward(self, images: Tensor, tasks: Tensor) -> tuple[Tensor, Trajectory]:
        x, meta, _ = self.start(images.flatten(1), tasks)
        for decision, selection in zip(self.decisions, self.selections, strict=True):
            x, meta, actions = decision(x, meta, tasks)
            x, meta, _ = selection(x, meta, actions)
        return x, meta


class Shared(nn.Module):
    """The same depth with one trunk for all tasks and a head for each."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.start = Initialization()
        *trunk, _ = _layers(features)
        self.trunk = nn.Sequential(*trunk)
        self.heads = Selection(*(nn.Linear(WIDTH, CLASSES) for _ in range(TASKS)))

    def forward(self, images: Tensor, tasks: Tensor) -> tuple[Tensor, Trajectory]:
        x, meta, _ = self.start(images.flatten(1), tasks)
        x, meta, _ = self.heads(self.trunk(x), meta, tasks)
        return x, meta


def wpl(width: int) -> nn.Module:
    """The paper's choice: a table per task, and a reward for agents that agree."""
    reward = CollaborationReward(COLLABORATION, MODULES)
    return WPL(MODULES, width, num_agents=TASKS, policy_storage_type="tabular", additional_reward_func=reward)


def gumbel(width: int) -> nn.Module:
    """Every task's policy sees the sample, and learns from the modules' loss."""
    return GumbelSoftmax(MODULES, width, num_agents=TASKS)


#: The first one has to learn; the others are to compare it with.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "WPL, a table per task": lambda features: Routed(features, wpl),
    "Gumbel-softmax": lambda features: Routed(features, gumbel),
    "a module per task": lambda features: Routed(features, lambda width: PerTaskAssignment()),
    "one trunk, task heads": Shared,
}


@dataclass(frozen=True)
class Result:
    """What came of a network."""

    accuracy: float  #: on the held-out images
    ms: float  #: of a training step, the median over epochs
    summary: Summary  #: of the held-out images' routing
    parameters: int


@torch.no_grad()
def test(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, Summary]:
    """The accuracy, and where the samples went."""
    model.eval()
    logits, meta = model(images, labels // CLASSES)
    model.train()
    return float((logits.argmax(-1) == labels % CLASSES).float().mean()), meta.summary()


def train(name: str, model: nn.Module, found: data.Digits, epochs: int, console: Console) -> Result:
    """Train a network, with a bar."""
    images, labels, test_images, test_labels = found
    objective = Loss(nn.CrossEntropyLoss(), NegLossReward())
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    shown = "loss {task.fields[loss]:.3f}, held out {task.fields[accuracy]:.1%}"
    times: list[float] = []
    accuracy, summary = test(model, test_images, test_labels)
    with training(
        f"{name:<{max(map(len, NETWORKS))}}", epochs, console, shown, model=model, optimizer=optimizer
    ) as epoch:
        for _ in range(epochs):
            began, losses = time.perf_counter(), []
            for batch in torch.randperm(len(images), device=images.device).split(BATCH):
                digit = labels[batch]
                logits, meta = model(images[batch], digit // CLASSES)
                module_loss, routing_loss = objective(logits, meta, digit % CLASSES)
                optimizer.zero_grad()
                (module_loss + routing_loss).backward()
                optimizer.step()
                losses.append(module_loss.detach())
            loss = float(torch.stack(losses).mean())
            times.append((time.perf_counter() - began) / len(losses))
            accuracy, summary = test(model, test_images, test_labels)
            epoch(loss=loss, accuracy=accuracy)
    parameters = sum(p.numel() for p in model.parameters())
    return Result(accuracy, statistics.median(times) * 1e3, summary, parameters)


def rows(results: dict[str, Result]) -> Iterator[Sequence[str]]:
    """The networks' table."""
    for name, r in results.items():
        routes = str(r.summary.routes) if r.summary.layers else "fixed"
        yield name, f"{r.accuracy:.4f}", f"{r.ms:.2f} ms", routes, f"{r.parameters:,}"


def run(options: Options) -> int:
    """0, or 1 if the routed network has not learnt enough."""
    return on_digits(options, _run)


def _run(found: data.Digits, options: Options, began: float) -> int:
    console = console_for(options.quiet)
    images, labels = found.train_images, found.train_labels
    n, H, W = images.shape
    epochs = options.epochs or max(2, min(30, 60_000 // n))
    results: dict[str, Result] = {}
    for name, make in NETWORKS.items():
        model = make(H * W).to(images.device)
        if not results:
            backend = explain(model, images[:BATCH], labels[:BATCH] // CLASSES)[0].backend
            console.print(
                f"{n} handwritten digits of {H} × {W} pixels to learn from, {len(found.test_images)} held out\n"
                f"{TASKS} tasks, to tell {{0, 1}}, {{2, 3}}, ..., {{8, 9}} apart; {LAYERS} layers, in each of which a "
                f"sample passes one of {MODULES} modules\n"
                f"on {options.device}, backend {backend}, seed {options.seed}",
                highlight=False,
            )
        results[name] = train(name, model, found, epochs, console)
    headings = "accuracy", "step", "routes", "parameters"
    compare(console, "the networks on held-out digits", headings, rows(results))
    name, result = next(iter(results.items()))
    console.print(f"{name}, where the held-out digits went:\n{result.summary}", highlight=False, markup=False)
    title = "Held-out digits of each task, by the module that they went through in each layer"
    plots.routing(result.summary, title=title, path=options.out)
    console.print(f"the same as a picture: {options.out}", highlight=False, markup=False, soft_wrap=True)
    return verdict(console, result.accuracy, ACCURACY_BAR, began)
