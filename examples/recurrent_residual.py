"""One routing, applied again and again with a residual: x <- x + route(norm(x)).

Handwritten digits are sequences of 16 vectors, one per 2 x 2 patch, and one more that asks what the image shows. A
routing from 17 vectors to 17 is applied six times with the same weights, each time to what it made the last time; after
every step the class is read off the vector that asks. It learns with the loss of all steps. The table says how well the
class is known after each step, on digits it has not seen, beside the same network without the residual and one that has
a routing of its own for every step.

    python examples/recurrent_residual.py --picture steps.png
    python examples/recurrent_residual.py --quick
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
import torch.nn.functional as F
from _pages import arguments, interruptible, machine, table, write
from torch import Tensor, nn

from fastroute import EfficientVectorRouting, data
from fastroute.plots.figures import LINES

PATCH, WIDTH, CLASSES, STEPS = 2, 24, 10, 6
BATCH, PEAK_LEARNING_RATE = 64, 1e-2


class Recurrent(nn.Module):
    """Images [B, H, W] to logits after every step, [STEPS, B, CLASSES]."""

    def __init__(self, height: int, width: int, *, residual: bool = True, shared: bool = True) -> None:
        super().__init__()
        n = (height // PATCH) * (width // PATCH) + 1
        self.look = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(torch.randn(n, WIDTH))  # its last row is the vector that asks
        self.norm = nn.LayerNorm(WIDTH)
        own = 1 if shared else STEPS
        self.routings = nn.ModuleList(EfficientVectorRouting(n, n, WIDTH, WIDTH) for _ in range(own))
        self.read = nn.Linear(WIDTH, CLASSES)
        self.residual = residual

    def forward(self, images: Tensor) -> Tensor:
        """After each step, what the last vector says."""
        patches = self.look(F.unfold(images[:, None], PATCH, stride=PATCH).mT)
        x = F.pad(patches, (0, 0, 0, 1)) + self.position
        logits = []
        for step in range(STEPS):
            made = self.routings[step % len(self.routings)](self.norm(x))
            x = x + made if self.residual else made
            logits.append(self.read(self.norm(x[:, -1])))
        return torch.stack(logits)


def fit(model: Recurrent, images: Tensor, labels: Tensor, epochs: int) -> None:
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            noisy = images[batch] + 0.1 * torch.randn_like(images[batch])
            loss = F.cross_entropy(model(noisy).flatten(0, 1), labels[batch].repeat(STEPS))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def picture(images: Tensor, labels: Tensor, probability: Tensor, curves: dict[str, Tensor], path: Path) -> None:
    """Left: accuracy by step. Right: some images, and below each the probability of its classes by step."""
    from matplotlib.figure import Figure

    K = len(images)
    figure = Figure(figsize=(4.2 + 1.1 * K, 3.2), dpi=130, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(4.2, 1.1 * K))
    axis = left.subplots()
    for (name, accuracy), style in zip(curves.items(), LINES, strict=False):
        axis.plot(range(1, STEPS + 1), accuracy.numpy(), **style, markersize=4, label=name)
    axis.set_xlabel("steps")
    axis.set_ylabel("held-out accuracy")
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes = right.subplots(2, K, squeeze=False, height_ratios=(1, 1.4))
    for k in range(K):
        axes[0, k].imshow(images[k].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes[0, k].set_title(f"{int(labels[k])}", fontsize=9)
        axes[0, k].axis("off")
        axes[1, k].imshow(probability[:, k].mT.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes[1, k].set_xticks(range(STEPS), [str(t + 1) for t in range(STEPS)], fontsize=6)
        axes[1, k].set_yticks(range(CLASSES), [str(c) for c in range(CLASSES)] if k == 0 else [], fontsize=6)
    axes[1, 0].set_ylabel("class", fontsize=8)
    right.supxlabel("steps", fontsize=8)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv, __doc__, 25, "recurrent")
    train, labels, test, test_labels = data.digits()
    if args.quick:
        train, labels = train[:320], labels[:320]
    networks = {
        "recurrent, residual": {},
        "recurrent, no residual": {"residual": False},
        "a routing per step, residual": {"shared": False},
    }
    rows, curves, probabilities = [], {}, {}
    for name, options in networks.items():
        torch.manual_seed(args.seed)
        model = Recurrent(*train.shape[1:], **options)
        began = time.process_time()
        fit(model, train, labels, args.epochs)
        seconds = time.process_time() - began
        model.eval()
        with torch.no_grad():
            logits = model(test)
        curves[name] = (logits.argmax(-1) == test_labels).float().mean(-1)
        probabilities[name] = logits.softmax(-1)
        count = sum(p.numel() for p in model.parameters())
        rows.append([name, f"{count:,}", *(f"{a:.3f}" for a in curves[name].tolist()), f"{seconds:.0f}"])
    head = ["network", "parameters", *(f"step {t + 1}" for t in range(STEPS)), "CPU seconds"]
    text = table(head, rows) + f"\n\n{args.epochs} epochs, seed {args.seed}. {machine()}"
    write(args.out, "recurrent", text)
    if args.picture is not None:
        found = probabilities["recurrent, residual"]
        right = found[:, torch.arange(len(test)), test_labels]
        changed = (right[-1] - right[0]).argsort(descending=True)[:6]  # those that the steps helped most
        picture(test[changed], test_labels[changed], found[:, changed], curves, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
