"""Every kind of picture that ``fastroute.plots`` draws, on handwritten digits, in about two minutes.

    python examples/gallery.py --folder pictures
    python examples/gallery.py --only weights masks

A function per picture; docs/gallery.md shows their code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
from torch import Tensor, nn

import fastroute
from fastroute import data, plots

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


def batches(*tensors: Tensor, epochs: int, size: int = 64) -> Iterator[tuple[Tensor, ...]]:
    for _ in range(epochs):
        for batch in torch.randperm(len(tensors[0])).split(size):
            yield tuple(t[batch] for t in tensors)


def train(step: Callable[..., Tensor], model: nn.Module, *tensors: Tensor, epochs: int, lr: float = 3e-3) -> None:
    """``step(*batch)`` is the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for batch in batches(*tensors, epochs=epochs):
        optimizer.zero_grad()
        step(*batch).backward()
        optimizer.step()


# --8<-- [start:credit]
class Capsules(nn.Module):
    """A vector per pixel, 16 hidden capsules, one number per class."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Linear(9, 32, bias=False)
        self.place = nn.Parameter(2 * torch.randn(64, 32))
        self.route = nn.Sequential(
            fastroute.EfficientVectorRouting(-1, 16, 32, 32), fastroute.EfficientVectorRouting(16, 10, 32, 1)
        )

    def vectors(self, images: Tensor) -> Tensor:  # what a pixel and its neighbours look like, times where it is
        patches = nn.functional.unfold(images[:, None], 3, padding=1).mT
        return self.look(patches) * self.place

    def forward(self, images: Tensor) -> Tensor:
        return self.route(self.vectors(images)).squeeze(-1)


def credit(found: data.Digits, epochs: int, path: Path) -> None:
    model = Capsules()
    train(lambda x, y: nn.functional.cross_entropy(model(x), y), model, *found[:2], epochs=epochs, lr=1e-2)
    x, y = found.test_images[:8], found.test_labels[:8]
    with torch.no_grad():
        predicted, vectors = model(x).argmax(1), model.vectors(x)
        of_predicted = nn.functional.one_hot(predicted, 10).float()
        maps = fastroute.capsules.credit(model.route, vectors, of_predicted, normalize=True)
    plots.credit(x, maps.unflatten(1, (8, 8)), labels=y, predictions=predicted, path=path)


# --8<-- [end:credit]


# --8<-- [start:routing]
class Routed(nn.Module):
    """Five tasks (which of two digits is it?), two routed layers of five modules, an agent per task."""

    def __init__(self) -> None:
        super().__init__()
        reward = fastroute.CollaborationReward(0.3, 5)
        self.decisions = nn.ModuleList(
            fastroute.WPL(5, num_agents=5, policy_storage_type="tabular", additional_reward_func=reward)
            for _ in range(2)
        )
        layers = [(64, 48, nn.ReLU()), (48, 2, nn.Identity())]
        self.selections = nn.ModuleList(
            fastroute.Selection(*(nn.Sequential(nn.Linear(i, o), act) for _ in range(5))) for i, o, act in layers
        )

    def forward(self, images: Tensor, tasks: Tensor) -> tuple[Tensor, fastroute.Trajectory]:
        h, meta, _ = fastroute.Initialization()(images.flatten(1), tasks=tasks)
        for decide, select in zip(self.decisions, self.selections, strict=True):
            h, meta, actions = decide(h, meta, tasks)
            h, meta, actions = select(h, meta, actions)
        return h, meta


def routing(found: data.Digits, epochs: int, path: Path) -> None:
    model, objective = Routed(), fastroute.Loss(nn.CrossEntropyLoss(), fastroute.NegLossReward())

    def step(images: Tensor, labels: Tensor) -> Tensor:
        y, meta = model(images, labels // 2)
        return sum(objective(y, meta, labels % 2))

    train(step, model, *found[:2], epochs=epochs, lr=1e-2)
    _, meta = model.eval()(found.test_images, found.test_labels // 2)
    plots.routing(meta, path=path)


# --8<-- [end:routing]


# --8<-- [start:routing_over_time]
def routing_over_time(found: data.Digits, epochs: int, path: Path) -> None:
    """Which of six modules the samples take, while a policy network learns with the modules."""
    net = fastroute.Sequential(
        nn.Flatten(),
        fastroute.REINFORCE(6, 64),
        fastroute.Selection(*(nn.Sequential(nn.Linear(64, 32), nn.ReLU()) for _ in range(6))),
        fastroute.REINFORCE(6, 32),
        fastroute.Selection(*(nn.Linear(32, 10) for _ in range(6))),
    )
    objective, seen = fastroute.Loss(nn.CrossEntropyLoss(), fastroute.NegLossReward()), []

    def step(images: Tensor, labels: Tensor) -> Tensor:
        y, meta = net(images)
        seen.append(meta.summary())
        return sum(objective(y, meta, labels))

    train(step, net, *found[:2], epochs=epochs)
    every = max(1, len(seen) // 60)
    plots.routing_over_time(seen[::every], steps=range(0, len(seen), every), path=path)


# --8<-- [end:routing_over_time]


# --8<-- [start:actions]
def actions(found: data.Digits, epochs: int, path: Path) -> None:
    """A recurrent cell reads an image row by row, and takes one of four modules at every row."""
    cell = fastroute.RoutingGRUCell(8, 32, 4, 1, fastroute.REINFORCE, detach=False)
    head = nn.Linear(32, 10)
    objective = fastroute.Loss(nn.CrossEntropyLoss(), fastroute.NegLossReward())

    def read(images: Tensor) -> tuple[Tensor, fastroute.Trajectory]:
        h = meta = None
        for row in images.unbind(1):
            h, meta = cell(row, h, meta)
        return head(h), meta

    model = nn.ModuleList([cell, head])
    train(lambda x, y: sum(objective(*read(x), y)), model, *found[:2], epochs=epochs, lr=1e-2)
    _, meta = read(found.test_images[:30])
    plots.actions(meta, labels=found.test_labels[:30], path=path)


# --8<-- [end:actions]


# --8<-- [start:masks]
def masks(found: data.Digits, epochs: int, path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU())
    generator = torch.Generator().manual_seed(0)
    plots.masks(fastroute.route(net, task_count=8, sigma=0.5, generator=generator), path=path)


# --8<-- [end:masks]


# --8<-- [start:graph]
def digits_model(weighting: str | None = None) -> fastroute.MTLModel:
    trunk = [nn.Flatten(), nn.Linear(64, 48), nn.ReLU()]
    return fastroute.MTLModel(
        [
            {"name": "trunk", "layers": trunk},
            {"name": "digit", "layers": nn.Linear(48, 10), "anchor_layer": "trunk", "loss": nn.CrossEntropyLoss()},
            {"name": "both", "layers": fastroute.Concat(dim=1), "anchor_layer": ["trunk", "digit"]},
            {"name": "odd", "layers": nn.Linear(58, 1), "anchor_layer": "both", "loss": nn.BCEWithLogitsLoss()},
            {"name": "ink", "layers": nn.Linear(48, 1), "anchor_layer": "trunk", "loss": nn.MSELoss()},
        ],
        ["digit", "odd", "ink"],
        weighting=weighting,
    )


def graph(found: data.Digits, epochs: int, path: Path) -> None:
    plots.graph(digits_model(), path=path)


# --8<-- [end:graph]


# --8<-- [start:weights]
def weights(found: data.Digits, epochs: int, path: Path) -> None:
    model, history = digits_model("uncertainty"), []

    def step(images: Tensor, labels: Tensor) -> Tensor:
        targets = {"digit": labels, "odd": (labels % 2)[:, None].float(), "ink": images.mean((1, 2))[:, None]}
        history.append(0.5 * torch.exp(-model.weighting.log_variance.detach()))
        return model.loss(model(images), targets)[0]

    train(step, model, *found[:2], epochs=epochs, lr=1e-2)
    plots.weights(torch.stack(history), tasks=model.output_tasks, path=path)


# --8<-- [end:weights]


# --8<-- [start:roofline]
def roofline(found: data.Digits, epochs: int, path: Path) -> None:
    suites = ("networks", "dispatch", "tasks", "multitask", "soft_assignment", "matrix_routing", "task_mask")
    results = [json.loads((RESULTS / f"{suite}-cpu.json").read_text()) for suite in suites]
    one = results[0]["machine"]["cpu"]  # a roof is one machine's
    plots.roofline([result for result in results if result["machine"]["cpu"] == one], path=path)


# --8<-- [end:roofline]


#: By the function of ``fastroute.plots``: what makes the picture, and epochs enough.
PICTURES = {
    "credit": (credit, 30), "routing": (routing, 30), "routing_over_time": (routing_over_time, 30),
    "actions": (actions, 20), "masks": (masks, 0), "graph": (graph, 0), "weights": (weights, 30),
    "roofline": (roofline, 0),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("."), help="for the pictures, gallery_<name>.png")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="an epoch for each, to see that it runs")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error("--threads: expected at least 1")
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    found = data.digits()
    for name in args.only:
        make, epochs = PICTURES[name]
        torch.manual_seed(args.seed)
        path = args.folder / f"gallery_{name}.png"
        make(found, 1 if args.quick else epochs, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
