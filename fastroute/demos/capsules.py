"""Handwritten digits as sequences of capsules, one per pixel or patch, routed to ten classes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .. import data, plots
from ..capsules import EfficientVectorRouting, credit_assignment
from ..ops.backends import BACKENDS, BackendUnavailable, explain, missing, use_backend
from . import Options, on_digits
from .training import console_for, training, verdict

CLASSES = 10
ACCURACY_BAR = 0.95  #: on held-out images; below it the demo has failed
BATCH = 64
PEAK_LEARNING_RATE = 1e-2
TIMING_SECONDS = 0.25  #: at least, for each measurement of each round
TIMING_ROUNDS = 3  #: backends in turns, so that a busy moment does not fall on one of them


class DigitRouter(nn.Module):
    """Images [B, H, W] to logits [B, 10]: a capsule per pixel (or patch) -> hidden capsules -> a scalar per class.

    A capsule sees its cell of the image and one pixel around it. What it sees is multiplied by where it is, so blank
    paper is a vector of zeros, which has no vote.
    """

    def __init__(
        self, height: int, width: int, *, cell: int, d: int = 32, hidden: int = 32, d_hidden: int = 16
    ) -> None:
        super().__init__()
        if height % cell or width % cell:
            raise ValueError(f"images: expected sides that {cell} divides, got {height} x {width}")
        self.cell, self.grid = cell, (height // cell, width // cell)
        self.look = nn.Linear((cell + 2) ** 2, d, bias=False)
        self.position = nn.Parameter(2 * torch.randn(self.grid[0] * self.grid[1], d))
        self.to_hidden = EfficientVectorRouting(-1, hidden, d, d_hidden)
        self.to_classes = EfficientVectorRouting(-1, CLASSES, d_hidden, 1)

    def capsules(self, images: Tensor) -> Tensor:
        """[B, cells, d]"""
        seen = F.unfold(images[:, None], self.cell + 2, padding=1, stride=self.cell).mT
        return self.look(seen) * self.position

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.to_classes(self.to_hidden(self.capsules(images)))
        return logits.squeeze(-1)

    @torch.no_grad()
    def credit(self, images: Tensor) -> Tensor:
        """End-to-end credit of every cell of the images in every class, [B, h, w, 10]."""
        x, phis = self.capsules(images), []
        for routing in (self.to_hidden, self.to_classes):
            routing.return_dict = True
            try:
                found = routing(x)
            finally:
                routing.return_dict = False
            x = found["x_out"]
            phis.append(found["phi"])
        return credit_assignment(phis).unflatten(1, self.grid)


def jittered(images: Tensor) -> Tensor:
    """Slightly turned, stretched and moved, with a little noise: a small data set goes further."""
    B, H, W = images.shape
    affine = torch.eye(2, 3, device=images.device) + 0.05 * torch.randn(B, 2, 3, device=images.device)
    grid = F.affine_grid(affine, [B, 1, H, W], align_corners=False)
    moved = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
    return moved + 0.1 * torch.randn_like(moved)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    right = [model(x).argmax(-1) == y for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return float(torch.cat(right).float().mean())


def train(model: nn.Module, found: data.Digits, epochs: int, console: Console) -> float:
    """The accuracy on the test images after the last epoch."""
    images, labels, test_images, test_labels = found
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    shown = "epochs · loss {task.fields[loss]:.3f} · held-out accuracy {task.fields[accuracy]:.1%}"
    held_out = 0.0
    with training("", epochs, console, shown, model=model, optimizer=optimizer, schedule=schedule) as epoch:
        for _ in range(epochs):
            losses = []
            for batch in torch.randperm(len(images), device=images.device).split(BATCH):
                loss = F.cross_entropy(model(jittered(images[batch])), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            held_out = accuracy(model, test_images, test_labels)
            epoch(loss=float(torch.stack(losses).mean()), accuracy=held_out)
    return held_out


def backends_of(model: DigitRouter, images: Tensor) -> tuple[list[str], dict[str, str]]:
    """(the backends that run the model on these images, reference first; and why each other one does not)."""
    able: list[str] = []
    unable: dict[str, str] = {}
    for name in reversed(BACKENDS):
        why = missing(name, images.device.type)
        if why is None and name == "triton" and images.device.type == "cpu":
            why = "interpreted kernels are for checking, not for timing"
        if why is None:
            try:
                with use_backend(name):
                    explain(model, images)
            except BackendUnavailable as error:
                why = str(error)
        if why is None:
            able.append(name)
        else:
            unable[name] = why
    return able, unable


def time_backends(model: DigitRouter, images: Tensor, labels: Tensor, console: Console) -> None:
    """The model's forward pass, and a training step without the optimizer, on every backend of the images' device."""
    able, unable = backends_of(model, images)
    device, threads = images.device.type, torch.get_num_threads()

    @torch.no_grad()
    def forward() -> Tensor:
        return model(images)

    def forward_and_backward() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    def timed(fn: Callable[[], object]) -> list[float]:
        timer = Timer("fn()", globals={"fn": fn}, num_threads=threads)
        return timer.blocked_autorange(min_run_time=TIMING_SECONDS).times

    logits: dict[str, Tensor] = {}
    for name in able:
        with use_backend(name):
            logits[name] = forward()
    seconds: dict[tuple[str, Callable[[], object]], list[float]] = {}
    for _ in range(TIMING_ROUNDS):
        for name in able:
            for fn in (forward, forward_and_backward):
                with use_backend(name):
                    seconds.setdefault((name, fn), []).extend(timed(fn))

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    table = Table(title=f"the trained model on {len(images)} held-out images, {where}", title_justify="left")
    table.add_column("backend")
    for heading in ("forward", "speedup", "fwd + bwd", "speedup", "max |Δ logit|"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in able:
        cells = [name]
        for fn in (forward, forward_and_backward):
            ours, reference = statistics.median(seconds[name, fn]), statistics.median(seconds["reference", fn])
            cells += [f"{ours * 1e3:.2f} ms", f"{reference / ours:.2f}×"]
        difference = float((logits[name] - logits["reference"]).abs().max())
        table.add_row(*cells, "–" if name == "reference" else f"{difference:.0e}")
    console.print(table)
    for name, why in unable.items():
        console.print(f"not timed: {name}: {why}", style="dim", highlight=False, markup=False)


def draw(model: DigitRouter, images: Tensor, labels: Tensor, out: Path) -> None:
    """The first image of every class, and the credit of its cells in the class it was taken for."""
    chosen = torch.cat([(labels == label).nonzero()[:1, 0] for label in labels.unique()])
    images, labels = images[chosen], labels[chosen]
    with torch.no_grad():
        predictions = model(images).argmax(-1)
    credit = model.credit(images)[torch.arange(len(images)), :, :, predictions.cpu()]
    part = "pixel" if model.cell == 1 else f"{model.cell} × {model.cell} patch"
    title = f"Held-out digits, and the end-to-end credit of each {part} in the predicted class"
    plots.credit(images, credit, labels=labels, predictions=predictions, title=title, path=out)


def run(options: Options) -> int:
    """0, or 1 if the model has not learnt enough."""
    return on_digits(options, _run)


def _run(found: data.Digits, options: Options, began: float) -> int:
    console = console_for(options.quiet)
    n, H, W = found.train_images.shape
    model = DigitRouter(H, W, cell=1 if H * W <= 256 else 4).to(found.train_images.device)
    backend = explain(model, found.train_images[:BATCH])[0].backend
    console.print(
        f"{n} handwritten digits of {H} × {W} pixels to learn from, {len(found.test_images)} held out\n"
        f"{len(model.position)} capsules, one per {'pixel' if model.cell == 1 else 'patch'} → "
        f"{model.to_hidden.n_out} hidden capsules → {CLASSES} classes; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"on {options.device}, backend {backend}, seed {options.seed}",
        highlight=False,
    )
    reached = train(model, found, options.epochs or max(5, min(40, 160_000 // n)), console)
    for device in dict.fromkeys((options.device, "cpu")):
        time_backends(model.to(device), found.test_images.to(device), found.test_labels.to(device), console)
    console.print("speedup: over reference, fastroute's own plain PyTorch; medians", style="dim")
    draw(model, found.test_images.cpu(), found.test_labels.cpu(), options.out)
    console.print(f"what it looked at: {options.out}", highlight=False, markup=False, soft_wrap=True)
    return verdict(console, reached, ACCURACY_BAR, began)
