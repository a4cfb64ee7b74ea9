"""The model and the training loop of torchMTL's README, as they are meant.

Two inputs' embeddings, a regression on one, a classification on the other, and a regression on both whose loss has a
learned weight. There the loop ends with an error: what a weight of shape (1,) makes of a loss cannot be added in place
to one without axes. Here ``model.loss`` is all of it; on ``fastroute.compat.torchmtl`` the loop over tasks runs, too.

    python examples/torchmtl_readme.py
    python examples/torchmtl_readme.py --compat      # on the classes of fastroute.compat.torchmtl
    python examples/torchmtl_readme.py --compile
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

FEATURES, SAMPLES = 16, 512
OUTPUTS = ("Task1", "Task2", "Task3")


def layers(*widths: int) -> nn.Sequential:
    """Linear layers, as the README has them."""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def task_layers(Concat: Any) -> list[dict[str, Any]]:
    """The list of dicts."""
    return [
        {"name": "Embed1", "layers": layers(FEATURES, 32, 8)},  # no anchor: it takes the model's input
        {"name": "Embed2", "layers": layers(FEATURES, 32, 8)},
        {"name": "CatTask", "layers": Concat(dim=1), "loss_weight": 1.0, "anchor_layer": ["Embed1", "Embed2"]},
        {
            "name": "Task1",
            "layers": layers(8, 32, 1),
            "loss": nn.MSELoss(),
            "loss_weight": 1.0,
            "anchor_layer": "Embed1",
        },
        {
            "name": "Task2",
            "layers": layers(8, 64, 1),
            "loss": nn.BCEWithLogitsLoss(),
            "loss_weight": 1.0,
            "anchor_layer": "Embed2",
        },
        {"name": "FNN", "layers": layers(16, 32, 32), "anchor_layer": "CatTask"},
        {
            "name": "Task3",
            "layers": layers(32, 16, 1),
            "loss": nn.MSELoss(),
            "loss_weight": "auto",
            "loss_init_val": 1.0,
            "anchor_layer": "FNN",
        },
    ]


def samples(count: int, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Inputs and the three tasks' targets: two that a linear model can learn, and noise's share in all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    truth = torch.randn(FEATURES, 3, generator=torch.Generator().manual_seed(7)) / FEATURES**0.5
    y = x @ truth + 0.3 * torch.randn(count, 3, generator=generator)
    return x, (y[:, :1], (y[:, 1:2] > 0).float(), y[:, 2:])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compat", action="store_true", help="use fastroute.compat.torchmtl")
    parser.add_argument("--compile", action="store_true", help="run the model through torch.compile")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error("--epochs: expected at least 1")
    if args.compat:
        from fastroute.compat.torchmtl import MTLModel
        from fastroute.compat.torchmtl.wrapping_layers import Concat
    else:
        from fastroute.multitask import Concat, MTLModel
    torch.manual_seed(0)
    model = MTLModel(task_layers(Concat), output_tasks=list(OUTPUTS))
    run = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, targets = samples(SAMPLES, 1)
    for epoch in range(args.epochs):
        means = torch.zeros(len(OUTPUTS))
        for batch in torch.randperm(SAMPLES).split(64):
            y_hat, l_funcs, l_weights = made = run(x[batch])
            y = [target[batch] for target in targets]
            loss: Any = None
            if args.compat:  # the README's loop
                for i in range(len(y_hat)):
                    if loss is None:
                        loss = l_weights[i] * l_funcs[i](y_hat[i], y[i])
                    else:
                        loss += l_weights[i] * l_funcs[i](y_hat[i], y[i])
            else:
                loss, _ = model.loss(made, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                means += torch.stack([f(a, b) for f, a, b in zip(l_funcs, y_hat, y, strict=True)]) * 64 / SAMPLES
        shown = ", ".join(f"{name} {value:.4f}" for name, value in zip(OUTPUTS, means.tolist(), strict=True))
        print(f"epoch {epoch}: {shown}; weight of Task3 {float(model.Task3_loss.detach()):.3f}")
    x, targets = samples(SAMPLES, 2)
    with torch.no_grad():
        y_hat, l_funcs, _ = model(x)
        held_out = [float(f(y, t)) for f, y, t in zip(l_funcs, y_hat, targets, strict=True)]
    print("held out: " + ", ".join(f"{name} {value:.4f}" for name, value in zip(OUTPUTS, held_out, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
