"""The papers' networks (``fastroute.models``) on handwritten digits: several seeds, a table, a learning curve."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from .. import data
from ..loggers import RunLog
from ..models import CapsuleHead, RoutedCNN, SmallNORB, routed_vgg
from ..monitor import RoutingMonitor
from ..networks import Loss, NegLossReward
from ..ops import files
from . import CannotRun, Options, on_digits
from .attributes import attributes

TASKS, CLASSES = 5, 2  #: of the routed network: digit // 2, which is known, and digit % 2, which is asked for
QUESTIONS = 20  #: of the task-routed one: the first of ``attributes``
POSITIONS, FEATURES, LAYERS = 4, 32, 2  #: patches along a side, width and depth of the encoders below capsule heads


class Encoder(nn.Module):
    """A small transformer that returns the hidden states of all depths, as those of Hugging Face do.

    Args:
        embed: what makes [B, n, FEATURES] of a batch.
    """

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(FEATURES, 4, 2 * FEATURES, 0.1, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        states = [self.embed(x)]
        for layer in self.layers:
            states.append(layer(states[-1], src_key_padding_mask=padding))
        return states


class Patches(nn.Module):
    """Images [B, H, W] to [B, POSITIONS^2, FEATURES], with what stands for their places."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, FEATURES, side // POSITIONS, side // POSITIONS)
        self.places = nn.Parameter(0.02 * torch.randn(POSITIONS**2, FEATURES))

    def forward(self, images: Tensor) -> Tensor:
        cut: Tensor = self.cut(images[:, None]).flatten(2).mT
        return cut + self.places


class OnImages(nn.Module):
    """A vision encoder with a capsule head."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.encoder = Encoder(Patches(side))
        self.head = CapsuleHead(10, FEATURES, LAYERS + 1, parts=16, return_credit=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))[0]


class OnText(nn.Module):
    """A text encoder with a capsule head; the text of an image is a word for every pixel with ink, where and how much.

    So texts have different lengths, and a batch of them is padded.
    """

    INKS = 4

    def __init__(self, side: int) -> None:
        super().__init__()
        self.encoder = Encoder(nn.Embedding(side * side * self.INKS, FEATURES))
        self.head = CapsuleHead(10, FEATURES, LAYERS + 1, parts=16, return_credit=True)

    def forward(self, images: Tensor) -> Tensor:
        ink = (images.flatten(1) * self.INKS).ceil().long().clamp(max=self.INKS)
        there, order = (ink > 0).long().sort(dim=1, descending=True, stable=True)
        there = there[:, : int(there.sum(1).max())].bool()
        order = order[:, : there.shape[1]]
        words = order * self.INKS + (ink.gather(1, order) - 1).clamp(min=0)
        return self.head(self.encoder(words, ~there), there)[0]


class Step(NamedTuple):
    """One batch: what is minimised, and what is shown of it."""

    loss: Tensor
    shown: Tensor


class Learner:
    """A network with its data: batches of the training images to losses, and the held-out accuracy."""

    model: nn.Module

    def __init__(self, found: data.Digits) -> None:
        self.found = found

    def step(self, rows: Tensor) -> Step:
        raise NotImplementedError

    @torch.no_grad()
    def accuracy(self) -> float:
        raise NotImplementedError


class Classifier(Learner):
    """Ten classes by cross-entropy."""

    def __init__(self, found: data.Digits, make: Callable[[int], nn.Module], side: int | None = None) -> None:
        super().__init__(found)
        self.side = side
        self.model = make(found.train_images.shape[-1])

    def scores(self, images: Tensor) -> Tensor:
        if self.side is not None:
            images = F.interpolate(images[:, None], (self.side, self.side), mode="bilinear")
        return self.model(images)

    def step(self, rows: Tensor) -> Step:
        loss = F.cross_entropy(self.scores(self.found.train_images[rows]), self.found.train_labels[rows])
        return Step(loss, loss.detach())

    @torch.no_grad()
    def accuracy(self) -> float:
        made = [self.scores(part).argmax(1) for part in self.found.test_images.split(256)]
        return float((torch.cat(made) == self.found.test_labels).float().mean())


class RoutedLearner(Learner):
    """Five tasks of two classes, an agent per task."""

    def __init__(self, found: data.Digits) -> None:
        super().__init__(found)
        side = found.train_images.shape[-1]
        self.model = RoutedCNN(TASKS, CLASSES, 1, side, blocks=min(4, side.bit_length() - 1))
        self.loss = Loss(nn.CrossEntropyLoss(), NegLossReward())

    def step(self, rows: Tensor) -> Step:
        digit = self.found.train_labels[rows]
        scores, meta = self.model(self.found.train_images[rows][:, None], digit // CLASSES)
        module_loss, routing_loss = self.loss(scores, meta, digit % CLASSES)
        return Step(module_loss + routing_loss, module_loss.detach())

    @torch.no_grad()
    def accuracy(self) -> float:
        digit = self.found.test_labels
        scores, _ = self.model(self.found.test_images[:, None], digit // CLASSES)
        return float((scores.argmax(1) == digit % CLASSES).float().mean())


class ManyTasksLearner(Learner):
    """Questions about a digit, each a task of its own; every sample of a batch is asked one."""

    SIDE, WIDTH = 32, 0.25

    def __init__(self, found: data.Digits) -> None:
        super().__init__(found)
        self.asked = attributes(found, QUESTIONS)
        self.model = routed_vgg(QUESTIONS, width=self.WIDTH, bottleneck_spatial=(1, 1), unused_grad="zeros")

    def _images(self, images: Tensor) -> Tensor:
        return F.interpolate(images, (self.SIDE, self.SIDE), mode="bilinear").expand(-1, 3, -1, -1)

    def step(self, rows: Tensor) -> Step:
        tasks = torch.randint(QUESTIONS, rows.shape, device=rows.device)
        scores = self.model(self._images(self.asked.train_images[rows]), tasks)
        loss = F.cross_entropy(scores, self.asked.train_answers[rows, tasks].long())
        return Step(loss, loss.detach())

    @torch.no_grad()
    def accuracy(self) -> float:
        """The mean over tasks, each on every fourth held-out image, another quarter for each."""
        right = []
        for task in range(QUESTIONS):
            images, answers = self.asked.test_images[task % 4 :: 4], self.asked.test_answers[task % 4 :: 4, task]
            right.append((self.model(self._images(images), task).argmax(1) == answers).float().mean())
        return float(torch.stack(right).mean())


@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""

    make: Callable[[data.Digits], Learner]
    epochs: int  #: on scikit-learn's digits
    batch: int
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    warm_up: float  #: share of the steps of the one-cycle schedule
    bar: float  #: held-out accuracy below which training has failed


def _adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, rate)


def _radam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.RAdam(parameters, rate)


RECIPES = {
    "routed-cnn": Recipe(RoutedLearner, 20, 64, _adam(3e-3), 0.3, 0.9),
    "capsule-vision": Recipe(lambda found: Classifier(found, OnImages), 20, 32, _radam(3e-3), 0.3, 0.9),
    "capsule-text": Recipe(lambda found: Classifier(found, OnText), 20, 32, _radam(3e-3), 0.3, 0.8),
    "small-norb": Recipe(
        lambda found: Classifier(found, lambda side: SmallNORB(10, 1), side=29), 16, 20, _adam(2e-3), 0.3, 0.9
    ),
    "task-vgg": Recipe(ManyTasksLearner, 16, 64, _adam(2e-3), 0.3, 0.8),
}


@dataclass(frozen=True)
class TrainOptions(Options):
    """What training is told beside what demos are."""

    out: Path = Path("fastroute-runs")
    seeds: int = 3


@dataclass(frozen=True)
class Result:
    """One seed."""

    losses: list[float]  #: of the epochs
    accuracies: list[float]  #: on the held-out images, before the first epoch and after each
    seconds: float
    parameters: int


def train(name: str, found: data.Digits, options: TrainOptions, seed: int, console: Console) -> Result:
    """Train a network from a seed; its run is logged in ``OUT/NAME/seed-N``."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    learner = recipe.make(found)
    model = learner.model.to(found.train_images.device)
    twice = 2 * recipe.epochs * 1442 / len(found.train_images)  # of other digits, which are larger
    epochs = options.epochs or min(recipe.epochs, math.ceil(twice))
    optimizer = recipe.optimizer(model.parameters())
    steps = epochs * -(-len(found.train_images) // recipe.batch)
    rate = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=recipe.warm_up)
    log = RunLog(options.out / name / f"seed-{seed}")
    began, losses, accuracies = time.perf_counter(), [], [_accuracy(learner)]
    monitor = RoutingMonitor(model, when="training")
    for epoch in range(1, epochs + 1):
        shown = []
        for rows in torch.randperm(len(found.train_images), device=found.train_images.device).split(recipe.batch):
            step = learner.step(rows)
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            schedule.step()
            shown.append(step.shown)
        losses.append(float(torch.stack(shown).mean()))
        accuracies.append(_accuracy(learner))
        monitor.write(log, step=epoch, loss=losses[-1], accuracy=accuracies[-1])
        if options.quiet:
            continue
        console.print(
            f"{name}, seed {seed}, epoch {epoch} of {epochs}: loss {losses[-1]:.3f}, held out {accuracies[-1]:.1%}, "
            f"{time.perf_counter() - began:.0f} s",
            highlight=False,
        )
    monitor.remove()
    count = sum(p.numel() for p in model.parameters())
    return Result(losses, accuracies, time.perf_counter() - began, count)


def _accuracy(learner: Learner) -> float:
    learner.model.eval()
    made = learner.accuracy()
    learner.model.train()
    return made


def table(results: dict[str, list[Result]]) -> Table:
    """The mean and the range over seeds."""
    made = Table(title=f"held-out accuracy, {len(next(iter(results.values())))} seeds", title_justify="left")
    made.add_column("model", no_wrap=True)
    for heading in ("parameters", "epochs", "mean", "range", "s per seed"):
        made.add_column(heading, justify="right", no_wrap=True)
    for name, runs in results.items():
        last = [run.accuracies[-1] for run in runs]
        made.add_row(
            name, f"{runs[0].parameters:,}", str(len(runs[0].losses)), f"{statistics.fmean(last):.4f}",
            f"{min(last):.3f} to {max(last):.3f}", f"{statistics.fmean(run.seconds for run in runs):.0f}",
        )  # fmt: skip
    return made


def curves(results: dict[str, list[Result]], path: Path) -> None:
    """Held-out accuracy by epoch: a panel per model, a line per seed and one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(results) + 0.4, 3.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (name, runs) in zip(panels, results.items(), strict=True):
        epochs = range(len(runs[0].accuracies))
        for run in runs:
            panel.plot(epochs, run.accuracies, color="0.65", linewidth=1)
        mean = [statistics.fmean(at) for at in zip(*(run.accuracies for run in runs), strict=True)]
        panel.plot(epochs, mean, color="#1f4e9c", linewidth=2)
        panel.set_title(f"{name}\n{mean[-1]:.3f} after {len(mean) - 1} epochs", fontsize=9)
        panel.set_xlabel("epoch", fontsize=9)
        panel.set_ylim(0, 1.02)
        panel.grid(True, color="0.9", linewidth=0.6)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", integer=True)
    panels[0].set_ylabel("held-out accuracy", fontsize=9)
    with files.whole(path) as part:
        figure.savefig(part, dpi=150, format="png")


def run(names: list[str], options: TrainOptions) -> int:
    """0, or 1 if a network's mean accuracy stays below its bar."""
    return on_digits(options, lambda found, _, began: _run(names, found, options))


def _run(names: list[str], found: data.Digits, options: TrainOptions) -> int:
    console, results = Console(), dict[str, list[Result]]()
    height, width = found.train_images.shape[1:]
    if height != width:
        raise CannotRun(f"{options.data}: expected square images, got {height} x {width}")
    for name in names:
        seeds = range(options.seed, options.seed + options.seeds)
        results[name] = [train(name, found, options, seed, console) for seed in seeds]
        path = options.out / name / "results.json"
        with files.whole(path) as part:
            part.write_text(json.dumps([vars(r) for r in results[name]], indent=1))
    console.print(table(results))
    picture = options.out / "curves.png"
    curves(results, picture)
    console.print(f"curves: {picture}", highlight=False, markup=False, soft_wrap=True)
    first = options.out / names[0] / f"seed-{options.seed}"
    console.print(
        f"what a router did: python -m fastroute report {first}", highlight=False, markup=False, soft_wrap=True
    )
    low = [n for n in names if statistics.fmean(r.accuracies[-1] for r in results[n]) < RECIPES[n].bar]
    for name in low:
        mean = statistics.fmean(r.accuracies[-1] for r in results[name])
        console.print(f"failed: {name}: expected a mean of at least {RECIPES[name].bar}, got {mean:.4f}", style="red")
    return 1 if low else 0
