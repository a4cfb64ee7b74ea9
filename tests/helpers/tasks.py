"""Small routed networks, a layer's call as a case, and upstream's files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastroute.tasks import VGG, TaskRouter, set_task, vgg
from tests.helpers import golden
from tests.helpers.cases import Case

from . import seeds

T = 5
CFG: list[Any] = [8, "M", 16, 12, "M"]


def generator(seed: int = 0) -> torch.Generator:
    return seeds.generator(seed)


def router(C: int = 8, tasks: int = T, sigma: float = 0.5, seed: int = 0, **options: Any) -> TaskRouter:
    return TaskRouter(C, tasks, sigma, generator=generator(seed), **options)


def small_vgg(batch_norm: bool = False, seed: int = 0, tasks: int = T, family: Any = vgg, **options: Any) -> Any:
    """A VGG of three convolutions for images of 16 by 16."""
    seeds.manual_seed(seed)
    features = family.make_layers(CFG, tasks, 0.5, batch_norm)
    return family.VGG(features, tasks, bottleneck_spatial=[2, 2], **options)


def images(B: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(B, 3, 16, 16, generator=generator(seed))


def tasks_of(B: int, tasks: int = T, seed: int = 0) -> Tensor:
    return torch.randint(tasks, (B,), generator=generator(seed))


def case(shape: tuple[int, ...] = (4, 8, 3, 2), seed: int = 0) -> Case:
    """A router's call, with a task for each sample."""
    drawn = generator(seed)
    x, g = (torch.randn(shape, generator=drawn, dtype=torch.float64) for _ in range(2))
    axes = "bchwdt"[: len(shape)]
    inputs: dict[str, Tensor | None] = {"x": x, "task": torch.randint(T, shape[:1], generator=drawn)}
    return Case(inputs, {"y": g}, {"x": axes, "y": axes, "task": "b"}, ("x",))


def masked(x: Tensor, mapping: Tensor, task: Any) -> Tensor:
    """The formula, in plain PyTorch."""
    rows = mapping[task]
    rows = rows.expand(x.shape[0], -1) if rows.dim() == 1 else rows
    return x * rows.to(x.dtype).reshape(*rows.shape, *[1] * (x.dim() - 2))


def load(name: str) -> Any:
    return golden.load("tasks", name)


def from_file(name: str, family: Any = vgg) -> tuple[Any, VGG]:
    """A file with a small VGG's numbers, and the VGG."""
    g = load(name)
    layers = [entry if entry == "M" else int(entry) for entry in g.get("cfg", CFG)]
    features = family.make_layers(layers, g.get("task_count", T), g.get("sigma", 0.5), "_bn" in name)
    model = family.VGG(features, g.get("task_count", T), bottleneck_spatial=[2, 2])
    model.load_state_dict(g["state"] if "state" in g else g["init"], strict=True)
    return g, model


def step(model: nn.Module, x: Tensor, y: Tensor, task: int) -> dict[str, Tensor | None]:
    """What upstream's files hold of a training step: logits, loss, gradients."""
    set_task(model, task)
    model.zero_grad()
    out = model(x.to(next(model.parameters()).dtype))
    loss = nn.functional.cross_entropy(out, y)
    loss.backward()
    return {"out_train": out.detach(), "loss": loss.detach(), **{k: p.grad for k, p in model.named_parameters()}}
