"""Methods that work on each task's gradient (PCGrad, UPGrad, Nash-MTL, ...): a model's hand-off to TorchJD.

Three regressions that want different things of one trunk. First what there is to gain: the angles between their
gradients. Then a training with TorchJD's UPGrad beside one with the sum of the losses.

    pip install 'fastroute[jd]'
    python examples/gradient_methods.py

Without TorchJD it says so, and shows the rest.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.multitask import MTLModel

TASKS = ["low", "high", "sum"]


def model_of(width: int) -> MTLModel:
    """A trunk that is narrow for what is asked of it, and a head per task."""
    heads = [
        {"name": task, "layers": nn.Linear(width, 1), "anchor_layer": "trunk", "loss": nn.MSELoss()} for task in TASKS
    ]
    trunk = {"name": "trunk", "layers": [nn.Linear(6, width), nn.Tanh()]}
    return MTLModel([trunk, *heads], TASKS)


def data(rows: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Tasks of very different scales; one that is not labelled in half of the samples."""
    x = torch.randn(rows, 6, generator=generator)
    a, b = x[:, :3].sum(1, keepdim=True), x[:, 3:].prod(1, keepdim=True)
    y = {"low": torch.sin(a), "high": 10 * torch.cos(a) + b, "sum": a - 3 * b}
    y["low"][torch.rand(rows, 1, generator=generator) < 0.5] = torch.nan
    return x, y


def cosines(model: MTLModel, x: Tensor, y: dict[str, Tensor]) -> dict[tuple[str, str], float]:
    """The angle between each two tasks' gradients with respect to the shared parameters."""
    _, losses = model.loss(model(x), y, apart=True)
    shared = model.shared_parameters()
    flat = {
        task: torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
        for task, loss in losses.items()
    }
    return {(s, t): float(F.cosine_similarity(flat[s], flat[t], dim=0)) for s, t in itertools.combinations(flat, 2)}


def by_sum(model: MTLModel, x: Tensor, y: dict[str, Tensor]) -> None:
    """The gradient of the sum of the losses."""
    total, _ = model.loss(model(x), y)
    total.backward()


def by_torchjd(model: MTLModel, x: Tensor, y: dict[str, Tensor]) -> None:
    """The heads' own gradients, and for the trunk what UPGrad makes of theirs."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    features, y_hat = model.with_features(x)
    _, losses = model.loss(y_hat, y, apart=True)
    shared = model.shared_parameters()
    mtl_backward(
        list(losses.values()),
        features=features,
        tasks_params=[model.task_parameters(task) for task in losses],
        shared_params=shared,
    )
    jac_to_grad(shared, UPGrad())


def train(step: Callable[[MTLModel, Tensor, dict[str, Tensor]], None], steps: int, width: int) -> dict[str, float]:
    """Losses on data that was not seen."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = model_of(width)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        step(model, *data(128, generator))
        optimizer.step()
    with torch.no_grad():
        x, y = data(2000, generator)
        return {task: float(loss) for task, loss in model.loss(model(x), y)[1].items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hand the gradients of several tasks to TorchJD.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--width", type=int, default=8)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = model_of(args.width)
    print(f"Shared: {sum(p.numel() for p in model.shared_parameters())} parameters, up to {model.feature_names}.")
    for task in TASKS:
        print(f"Of {task!r} alone: {sum(p.numel() for p in model.task_parameters(task))} parameters.")
    for (s, t), cosine in cosines(model, *data(512, torch.Generator().manual_seed(1))).items():
        print(f"Cosine of the gradients of {s!r} and {t!r}: {cosine:.2f}.")
    rows = [("sum of losses", by_sum)]
    if find_spec("torchjd") is None:
        print("TorchJD is not installed, so UPGrad is left out: pip install 'fastroute[jd]'.")
    else:
        rows.append(("TorchJD, UPGrad", by_torchjd))
    print("\n| | " + " | ".join(TASKS) + " |\n|---|" + "---:|" * len(TASKS))
    for name, step in rows:
        losses = train(step, args.steps, args.width)
        print(f"| {name} | " + " | ".join(f"{losses[task]:.3f}" for task in TASKS) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
