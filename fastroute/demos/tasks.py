"""Handwritten digits as more than forty tasks of one network; each task has a random half of its channels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn

from .. import data, plots
from ..tasks import live, mask_overlap, route, set_task
from . import Options, on_digits
from .attributes import Attributes, attributes
from .training import compare, console_for, training, verdict

SIGMA = 0.5  #: the share of the channels that a task does without
ACCURACY_BAR = 0.9  #: mean over tasks on held-out images, of the routed network; below it the demo has failed
BATCH, LEARNING_RATE, PER_IMAGE = 256, 1e-2, 4
WIDTHS, SIDE = (16, 32, 32), 2


def trunk() -> nn.Sequential:
    """Images [B, 1, H, W] to features [B, F]. No BatchNorm: its statistics would mix a batch's tasks."""
    a, b, c = WIDTHS
    return nn.Sequential(
        nn.Conv2d(1, a, 3, padding=1), nn.ReLU(),
        nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(SIDE), nn.Flatten(),
    )  # fmt: skip


class ManyTasks(nn.Module):
    """A trunk and, for every task, a row of one linear layer.

    Args:
        tasks: T.
        sigma: of the routers; None for none.
        compute: "live" or "masked" channels.
        seed: of the masks.
    """

    def __init__(self, tasks: int, sigma: float | None, compute: str = "live", seed: int = 0) -> None:
        super().__init__()
        made: nn.Module = trunk()
        self.routed = sigma is not None
        if sigma is not None:
            made = route(made, tasks, sigma, generator=torch.Generator().manual_seed(seed))
            made = live(made) if compute == "live" else made
        self.trunk = made
        self.heads = nn.Linear(WIDTHS[-1] * SIDE**2, tasks)

    def forward(self, x: Tensor, tasks: Tensor) -> Tensor:
        """Images [B, 1, H, W] and a task for each [B] -> logits [B]."""
        if self.routed:
            set_task(self, tasks)
        features: Tensor = self.trunk(x)
        return (features * self.heads.weight[tasks]).sum(1) + self.heads.bias[tasks]


class AtOnce(ManyTasks):
    """The shared trunk as it is cheapest: an image goes through it once, for all tasks."""

    def __init__(self, tasks: int) -> None:
        super().__init__(tasks, None)

    def all(self, x: Tensor) -> Tensor:
        """Images [B, 1, H, W] -> logits [B, T]."""
        return self.heads(self.trunk(x))


class Separate(nn.Module):
    """A network per task."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(trunk(), nn.Linear(WIDTHS[-1] * SIDE**2, 1)) for _ in range(tasks))

    def forward(self, x: Tensor, tasks: Tensor) -> Tensor:
        """Images [B, 1, H, W] and a task for each [B] -> logits [B]."""
        order = tasks.argsort(stable=True)
        counts = tasks.bincount(minlength=len(self.nets)).tolist()
        parts = [net(part) for net, part in zip(self.nets, x[order].split(counts), strict=True) if len(part)]
        return torch.cat(parts).squeeze(1)[order.argsort()]


@dataclass(frozen=True)
class Result:
    """What came of a network."""

    accuracy: float  #: mean over tasks, on the held-out images
    f1: float  #: the same of F1
    worst: float  #: the accuracy of the worst task
    balanced: float  #: mean over tasks of the mean accuracy on images whose answer is yes, and on those with no
    seconds: float  #: of an epoch, the median
    parameters: int


@torch.no_grad()
def test(model: nn.Module, found: Attributes) -> tuple[Tensor, Tensor, Tensor]:
    """Accuracy [T], F1 [T] and balanced accuracy [T] on the held-out images; always the same answer is balanced 0.5."""
    model.eval()
    x, y = found.test_images, found.test_answers > 0.5
    tasks = range(len(found.names))
    right = torch.stack([model(x, torch.full((len(x),), t, device=x.device)) > 0 for t in tasks], 1)
    model.train()
    both = (right & y).sum(0)
    yes, no = both / y.sum(0).clamp_min(1), (~right & ~y).sum(0) / (~y).sum(0).clamp_min(1)
    return (right == y).float().mean(0), 2 * both / (right.sum(0) + y.sum(0)).clamp_min(1), (yes + no) / 2


def train(name: str, model: nn.Module, found: Attributes, epochs: int, console: Console) -> Result:
    """Train a network, with a bar: a step per batch, whose images are each of a random task.

    An epoch shows every image ``PER_IMAGE`` times. (``AtOnce`` sees as many images, each with all of its tasks.)
    """
    x, y = found.train_images, found.train_answers
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, LEARNING_RATE / 20)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    times: list[float] = []
    with training(f"{name:<28}", epochs, console, "loss {task.fields[loss]:.3f}", **parts) as epoch:
        for _ in range(epochs):
            began, losses = time.perf_counter(), []
            order = torch.cat([torch.randperm(len(x), device=x.device) for _ in range(PER_IMAGE)])
            for batch in order.split(BATCH):
                tasks = torch.randint(y.shape[1], batch.shape, device=x.device)
                if isinstance(model, AtOnce):
                    logits, answers = model.all(x[batch]), y[batch]
                else:
                    logits, answers = model(x[batch], tasks), y[batch, tasks]
                loss = nn.functional.binary_cross_entropy_with_logits(logits, answers)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            schedule.step()
            shown = float(torch.stack(losses).mean())
            times.append(time.perf_counter() - began)
            epoch(loss=shown)
    accuracy, f1, balanced = test(model, found)
    return Result(
        accuracy=float(accuracy.mean()),
        f1=float(f1.mean()),
        worst=float(accuracy.min()),
        balanced=float(balanced.mean()),
        seconds=statistics.median(times),
        parameters=sum(p.numel() for p in model.parameters()),
    )


#: The first one has to learn; the others are to compare it with.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "routed, live channels": lambda tasks: ManyTasks(tasks, SIGMA),
    "shared trunk": lambda tasks: ManyTasks(tasks, None),
    "shared trunk, tasks at once": AtOnce,
}


def rows(results: dict[str, Result]) -> Iterator[Sequence[str]]:
    """The networks' table."""
    for name, r in results.items():
        yield name, f"{r.accuracy:.4f}", f"{r.f1:.3f}", f"{r.worst:.3f}", f"{r.seconds:.2f} s", f"{r.parameters:,}"


def run(options: Options) -> int:
    """0, or 1 if the routed network has not learnt enough."""
    return on_digits(options, _run)


def _run(digits: data.Digits, options: Options, began: float) -> int:
    console = console_for(options.quiet)
    found = attributes(digits)
    n, _, H, W = found.train_images.shape
    T = len(found.names)
    epochs = options.epochs or max(1, min(25, 36_000 // n))
    console.print(
        f"{n} handwritten digits of {H} × {W} pixels to learn from, {len(found.test_images)} held out\n"
        f"{T} tasks, from {found.names[0]!r} to {found.names[-1]!r}; "
        f"each has {1 - SIGMA:.0%} of every layer's channels\n"
        f"on {options.device}, seed {options.seed}",
        highlight=False,
        markup=False,
    )
    results: dict[str, Result] = {}
    for name, make in NETWORKS.items():
        model = make(T).to(found.train_images.device)
        results[name] = train(name, model, found, epochs, console)
        if len(results) == 1:
            plots.masks(model, title=f"The channels of {T} tasks, and what two tasks share", path=options.out)
            overlap = mask_overlap(model).overall
    headings = "accuracy", "F1", "worst", "epoch", "parameters"
    compare(console, "the networks on held-out digits, mean over tasks", headings, rows(results))
    shared = (float(overlap.sum()) - T) / (T * T - T)
    console.print(f"two tasks share {shared:.0%} of their channels (Jaccard index, mean)", highlight=False)
    console.print(f"masks and overlap as a picture: {options.out}", highlight=False, markup=False, soft_wrap=True)
    result = next(iter(results.values()))
    return verdict(console, result.accuracy, ACCURACY_BAR, began)
