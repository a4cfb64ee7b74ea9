"""Models of torchMTL's documentation, random graphs, and what evaluates a graph in the most naive way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import BCEWithLogitsLoss, Linear, MSELoss, Sequential

from fastroute import multitask
from tests.helpers import golden

Layers = list[dict[str, Any]]


def load(name: str) -> Any:
    return golden.load("multitask", name)


def mlp(*widths: int) -> Sequential:
    """Linear layers alone, as upstream's examples have them."""
    return Sequential(*[Linear(a, b) for a, b in pairwise(widths)])


def readme(wrapping: Any = multitask, init: float = 0.7) -> Layers:
    return [
        {"name": "Embed1", "layers": mlp(16, 32, 8)},
        {"name": "Embed2", "layers": mlp(16, 32, 8)},
        {
            "name": "CatTask",
            "layers": wrapping.Concat(dim=1),
            "loss_weight": 1.0,
            "anchor_layer": ["Embed1", "Embed2"],
        },
        {
            "name": "Task1",
            "layers": mlp(8, 32, 1),
            "loss": MSELoss(),
            "loss_weight": 1.0,
            "anchor_layer": "Embed1",
        },
        {
            "name": "Task2",
            "layers": mlp(8, 64, 1),
            "loss": BCEWithLogitsLoss(),
            "loss_weight": 1.0,
            "anchor_layer": "Embed2",
        },
        {"name": "FNN", "layers": mlp(16, 32, 32), "anchor_layer": "CatTask"},
        {
            "name": "Task3",
            "layers": mlp(32, 16, 1),
            "anchor_layer": "FNN",
            "loss": MSELoss(),
            "loss_weight": "auto",
            "loss_init_val": init,
        },
    ]


README_TASKS = ["Task1", "Task2", "Task3"]


def readme_by_hand(model: Any, x: Tensor) -> list[Tensor]:
    a, b = model.Embed1(x), model.Embed2(x)
    return [model.Task1(a), model.Task2(b), model.Task3(model.FNN(torch.cat((a, b), 1)))]


def triple(wrapping: Any = multitask) -> Layers:
    """Upstream's notebook of three regressions."""
    return [
        {"name": "InputTask2", "layers": mlp(16, 32, 8)},
        {"name": "InputTask1", "layers": mlp(16, 32, 8)},
        {"name": "CombTask", "layers": wrapping.Concat(dim=1), "anchor_layer": ["InputTask1", "InputTask2"]},
        {
            "name": "Task1",
            "layers": mlp(16, 32, 1),
            "loss": MSELoss(),
            "loss_weight": 1.0,
            "anchor_layer": "CombTask",
        },
        {"name": "MiddleTask1", "layers": mlp(16, 32, 8), "anchor_layer": "CombTask"},
        {
            "name": "Task2",
            "layers": mlp(8, 32, 1),
            "loss": MSELoss(),
            "loss_weight": 1.0,
            "anchor_layer": "MiddleTask1",
        },
        {"name": "MiddleTask2", "layers": mlp(8, 32, 4), "anchor_layer": "MiddleTask1"},
        {
            "name": "Task3",
            "layers": mlp(4, 32, 1),
            "loss": MSELoss(),
            "loss_weight": "auto",
            "loss_init_val": 0.5,
            "anchor_layer": "MiddleTask2",
        },
    ]


class LogVars(nn.Module):
    """Log-variances of tasks, and the predictions as they come."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.log_vars = nn.Parameter(torch.zeros(tasks))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.log_vars, inputs


def uncertainty() -> Layers:
    """Upstream's notebook of learned uncertainties: a node returns a tuple."""
    return [
        {"name": "InputTask", "layers": Sequential(Linear(1, 2), nn.ReLU())},
        {"name": "Lin1", "layers": Linear(2, 1), "anchor_layer": "InputTask"},
        {"name": "Lin2", "layers": Linear(2, 1), "anchor_layer": "InputTask"},
        {"name": "MultiLoss", "layers": LogVars(2), "anchor_layer": ["Lin1", "Lin2"]},
    ]


def select(wrapping: Any = multitask) -> Layers:
    """An input that is a list, selected and joined in another order than its nodes are listed in."""
    return [
        {"name": "s0", "layers": wrapping.SimpleSelect(0)},
        {"name": "s1", "layers": wrapping.SimpleSelect(selection_axis=1)},
        {"name": "f1", "layers": Linear(5, 3), "anchor_layer": "s1"},
        {"name": "cat_ba", "layers": wrapping.Concat(1), "anchor_layer": ["f1", "s0"]},
        {"name": "sl", "layers": wrapping.SliceSelect((slice(None), slice(1, 4))), "anchor_layer": "cat_ba"},
        {"name": "raw", "layers": wrapping.SliceSelect(slice(0, 1)), "anchor_layer": "root"},
        {"name": "t", "layers": Linear(3, 2), "anchor_layer": "sl", "loss": None, "loss_weight": None},
    ]


class Tagged:
    """A node of random graphs: its value tells its name, and those of its inputs in order."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *inputs: Any) -> Any:
        return (self.name, *inputs)


def listed(entry: dict[str, Any]) -> list[str]:
    """A dict's anchors."""
    anchors = entry.get("anchor_layer")
    return list(anchors) if isinstance(anchors, (list, tuple)) else ["root" if anchors is None else anchors]


def naive(task_layers: Sequence[dict[str, Any]], output_tasks: Sequence[str], x: Any) -> list[Any]:
    """Every output anew, its inputs first, by recursion."""
    by_name = {entry["name"]: entry for entry in task_layers}

    def value(name: str) -> Any:
        if name == "root":
            return x
        return by_name[name]["layers"](*[value(anchor) for anchor in listed(by_name[name])])

    return [value(name) for name in output_tasks]


def polled(task_layers: Sequence[dict[str, Any]]) -> list[str]:
    """Upstream's order, by its queue: a node that lacks an input goes back to the end; successors join either way."""
    predecessors = {entry["name"]: listed(entry) for entry in task_layers}
    queue, seen, done = ["root"], {"root"}, ["root"]
    while queue:
        name = queue.pop(0)
        if name != "root":
            if all(anchor in done for anchor in predecessors[name]):
                done.append(name)
            else:
                queue.append(name)
        for successor, before in predecessors.items():
            if name in before and successor not in seen:
                seen.add(successor)
                queue.append(successor)
    return done[1:]
