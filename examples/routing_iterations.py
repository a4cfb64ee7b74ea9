"""What the iterations of a routing do: a picture of how inputs are shared out, one iteration after another.

A single routing learns to take a handwritten digit, 16 vectors of 2 x 2 pixels, to ten outputs, one per class, in four
iterations. The picture has R, how each patch is divided among the classes, in every iteration for a few digits that it
has not seen, and the credit of each patch in the true class.

    python examples/routing_iterations.py --picture iterations.png
    python examples/routing_iterations.py --quick
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

PATCH, WIDTH, CLASSES, ITERATIONS = 2, 32, 10, 4
BATCH, PEAK_LEARNING_RATE = 64, 1e-2


class OneRouting(nn.Module):
    """Images [B, H, W] to logits [B, CLASSES]."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        n = (height // PATCH) * (width // PATCH)
        self.look = nn.Linear((PATCH + 2) ** 2, WIDTH)
        self.position = nn.Parameter(2 * torch.randn(n, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.route = EfficientVectorRouting(n, CLASSES, WIDTH, 8, n_iters=ITERATIONS)
        self.read = nn.Linear(8, 1)

    def vectors(self, images: Tensor) -> Tensor:
        """[B, n, WIDTH]"""
        seen = F.unfold(images[:, None], PATCH + 2, padding=1, stride=PATCH).mT
        vectors: Tensor = self.norm(self.look(seen) * self.position)
        return vectors

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.read(self.route(self.vectors(images)))[..., 0]
        return logits

    @torch.no_grad()
    def iterations(self, images: Tensor) -> list[dict[str, Tensor]]:
        """R and phi [B, n, CLASSES] of each iteration: those of a routing that ends with it."""
        x, found = self.vectors(images), []
        self.route.return_dict = True
        try:
            for t in range(ITERATIONS):
                self.route.n_iters = t + 1
                found.append({k: v for k, v in self.route(x).items() if k in ("R", "phi")})
        finally:
            self.route.return_dict, self.route.n_iters = False, ITERATIONS
        return found


def fit(model: OneRouting, images: Tensor, labels: Tensor, epochs: int) -> None:
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def picture(images: Tensor, labels: Tensor, found: list[dict[str, Tensor]], path: Path) -> None:
    """A row per image: the image, R of each iteration, and the patches' credit in the true class at the end."""
    from matplotlib.figure import Figure

    K, side = len(images), math.isqrt(found[0]["R"].shape[1])
    figure = Figure(figsize=(1.5 * (ITERATIONS + 2), 1.7 * K), dpi=120, layout="constrained")
    axes = figure.subplots(K, ITERATIONS + 2, squeeze=False)
    most = max(float(step["R"].max()) for step in found)
    for k in range(K):
        axes[k, 0].imshow(images[k].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes[k, 0].set_title(f"a {int(labels[k])}", fontsize=8)
        for t, step in enumerate(found):
            axes[k, t + 1].imshow(step["R"][k].numpy(), cmap="Blues", vmin=0, vmax=most, aspect="auto")
            axes[k, t + 1].set_title(f"R, iteration {t + 1}", fontsize=8)
        credit = found[-1]["phi"][k, :, int(labels[k])].view(side, side)
        axes[k, -1].imshow(credit.numpy(), cmap="RdBu_r", vmin=-credit.abs().max(), vmax=credit.abs().max())
        down, across = (credit < 0).nonzero().T.numpy()  # in grey red and blue look alike
        axes[k, -1].scatter(across, down, marker="_", color="#1a1a1a")
        axes[k, -1].set_title(f"φ in class {int(labels[k])}", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    axes[-1, 1].set_xlabel("classes", fontsize=8)
    axes[-1, 1].set_ylabel("patches", fontsize=8)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv, __doc__, 30, "iterations")
    torch.manual_seed(args.seed)
    train, labels, test, test_labels = data.digits()
    if args.quick:
        train, labels = train[:320], labels[:320]
    model = OneRouting(*train.shape[1:])
    began = time.process_time()
    fit(model, train, labels, args.epochs)
    seconds = time.process_time() - began
    with torch.no_grad():
        accuracy = float((model(test).argmax(-1) == test_labels).float().mean())
    found = model.iterations(test)
    rows = []
    for t, step in enumerate(found):
        R = step["R"]
        entropy = float(-(R * R.clamp_min(1e-30).log()).sum(-1).mean()) / math.log(CLASSES)
        true = R[torch.arange(len(R)), :, test_labels]
        rows.append([str(t + 1), f"{entropy:.3f}", f"{float(true.mean()):.3f}", f"{float(R.amax(-1).mean()):.3f}"])
    head = ["iteration", "entropy of R, of the most there can be", "R of the true class", "largest R of a patch"]
    text = (
        table(head, rows) + f"\n\nMeans over the patches of {len(test)} held-out digits, {accuracy:.1%} of which are "
    )
    text += f"taken for what they are; learnt in {seconds:.0f} s of CPU time. {machine()}"
    write(args.out, "iterations", text)
    if args.picture is not None:
        chosen = torch.stack([(test_labels == label).nonzero()[0, 0] for label in (0, 3, 4)])
        chosen_found = [{k: v[chosen] for k, v in step.items()} for step in found]
        picture(test[chosen], test_labels[chosen], chosen_found, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
