"""A bowtie of routings: a sequence of vectors to a few, and back.

Handwritten digits are sequences of 16 vectors, one per 2 x 2 patch. Routings take them to 8 vectors and then to 4 of
width 2, all that is known of an image in between; two more take these to 8 and to 16. What comes back is compared with
the best that any linear code of the same 8 numbers can do, principal components, on digits that neither has seen.

    python examples/sequence_autoencoder.py --picture digits.png
    python examples/sequence_autoencoder.py --quick
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

PATCH, MIDDLE, WIDTH = 2, 8, 32
CODE, CODE_WIDTH = 4, 2
BATCH, PEAK_LEARNING_RATE = 32, 1e-2


class Bowtie(nn.Module):
    """Images [B, H, W] to a code [B, CODE, CODE_WIDTH] and back."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = (height, width)
        n = (height // PATCH) * (width // PATCH)
        self.look = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(2 * torch.randn(n, WIDTH))
        self.encode = nn.Sequential(
            EfficientVectorRouting(n, MIDDLE, WIDTH, WIDTH),
            # a layer norm would leave nothing of a vector of width 2 but a sign
            EfficientVectorRouting(MIDDLE, CODE, WIDTH, CODE_WIDTH, normalize=False),
        )
        self.decode = nn.Sequential(
            EfficientVectorRouting(CODE, MIDDLE, CODE_WIDTH, WIDTH), EfficientVectorRouting(MIDDLE, n, WIDTH, WIDTH)
        )
        self.draw = nn.Linear(WIDTH, PATCH * PATCH)

    def code(self, images: Tensor) -> Tensor:
        """[B, CODE, CODE_WIDTH]"""
        patches = F.unfold(images[:, None], PATCH, stride=PATCH).mT
        code: Tensor = self.encode(self.look(patches) * self.position)
        return code

    def forward(self, images: Tensor) -> Tensor:
        """The images as the code has them."""
        patches = self.draw(self.decode(self.code(images)))
        return F.fold(patches.mT, self.size, PATCH, stride=PATCH)[:, 0]


def principal(train: Tensor, test: Tensor, count: int) -> Tensor:
    """The test images by the training images' mean and first ``count`` principal components."""
    x, y = train.flatten(1), test.flatten(1)
    mean = x.mean(0)
    axes = torch.linalg.svd(x - mean, full_matrices=False).Vh[:count]
    return ((y - mean) @ axes.mT @ axes + mean).view_as(test)


def fit(model: Bowtie, images: Tensor, epochs: int) -> None:
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.Adam(model.parameters(), PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.mse_loss(model(images[batch]), images[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def unexplained(images: Tensor, made: Tensor, mean: Tensor) -> float:
    """The share of the images' variance about the training images' mean that is lost."""
    return float((images - made).square().sum() / (images - mean).square().sum())


def picture(rows: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """Rows of images [K, H, W], each with a name."""
    from matplotlib.figure import Figure

    K = len(rows[0][1])
    figure = Figure(figsize=(0.75 * K + 1.2, 0.8 * len(rows)), dpi=130, layout="constrained")
    axes = figure.subplots(len(rows), K, squeeze=False)
    for row, (name, images) in zip(axes, rows, strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv, __doc__, 150, "autoencoder")
    torch.manual_seed(args.seed)
    train, _, test, labels = data.digits()
    model = Bowtie(*train.shape[1:])
    began = time.process_time()
    fit(model, train[:320] if args.quick else train, args.epochs)
    seconds = time.process_time() - began
    model.eval()
    with torch.no_grad():
        made = model(test)
    numbers, mean = CODE * CODE_WIDTH, train.mean(0)
    linear = principal(train, test, numbers)
    rows = [
        ["bowtie of routings", str(numbers), f"{unexplained(test, made, mean):.3f}", f"{seconds:.0f}"],
        ["principal components", str(numbers), f"{unexplained(test, linear, mean):.3f}", "0"],
    ]
    for more in (2 * numbers, 3 * numbers):
        lost = unexplained(test, principal(train, test, more), mean)
        rows.append(["principal components", str(more), f"{lost:.3f}", "0"])
    text = table(["code", "numbers per image", "variance lost, held-out", "CPU seconds"], rows)
    text += f"\n\n{args.epochs} epochs, seed {args.seed}. {machine()}"
    write(args.out, "autoencoder", text)
    if args.picture is not None:
        chosen = torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()])
        pictures = [("held-out", test), ("bowtie", made), ("principal", linear)]
        picture([(name, images[chosen]) for name, images in pictures], args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
