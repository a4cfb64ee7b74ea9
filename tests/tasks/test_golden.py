"""Upstream's numbers: masks, the layer, routed networks with their gradients, and twenty training steps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastroute import use_backend
from fastroute.tasks import TaskRouter, set_task, vgg11
from tests.helpers import golden, seeds
from tests.helpers.budget import assert_within_budget
from tests.helpers.tasks import from_file, load, step

LAYERS = load("tr_layer.pt")["cases"]
each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])
each_layer = pytest.mark.parametrize("g", LAYERS, ids=lambda g: f"{g['unit_count']}x{g['task_count']}-{g['sigma']}")


@each_backend
@each_layer
def test_the_layer(g: dict[str, Any], backend: str) -> None:
    np.random.seed(g["numpy_seed"])
    router = TaskRouter(g["unit_count"], g["task_count"], g["sigma"])
    assert torch.equal(router.get_unit_mapping(), g["mapping"])
    assert ("_unit_mapping" in router.state_dict()) == g["in_state_dict"]
    with use_backend(backend):
        for known in g["tasks"]:
            router.set_active_task(known["task"])
            x = g["x"].clone().requires_grad_()
            y = router(x)
            assert torch.equal(y, known["out"])
            rectified = y.relu()
            assert torch.equal(rectified, known["out_relu"])
            rectified.backward(g["g"])
            assert torch.equal(x.grad, known["grad_relu"])  # type: ignore[arg-type]
        known = g["per_sample"]
        x = g["x"].clone().requires_grad_()
        y = router(x, known["ids"])
        assert torch.equal(y, known["out"])
        y.backward(g["g"])
        assert torch.equal(x.grad, known["grad_masked"])  # type: ignore[arg-type]


@pytest.mark.parametrize("file", golden.names("tasks", "tr_vgg11_masks*"))
def test_masks_of_vgg11(file: str) -> None:
    g = load(file)
    np.random.seed(g["numpy_seed"])
    model = vgg11(task_count=g["task_count"], sigma=g["sigma"], init_weights=False)
    state = model.state_dict()
    assert list(state) == g["keys"]
    for key, shape in g["shapes"].items():
        fits = (
            [2, 512 * 49] if key.startswith("classifier") and key.endswith("weight") else shape
        )  # upstream: 1024 * 49
        assert list(state[key].shape) == fits, key
    for path, mask in g["masks"].items():
        router = model.get_submodule(path)
        assert isinstance(router, TaskRouter) and router.name == g["names"][path]
        assert torch.equal(router.get_unit_mapping(), mask.float())


def orders(B: int, count: int = 4) -> list[Tensor]:
    """Orders of the samples in a batch: other orders of summation, so other roundings of the same numbers."""
    drawn = seeds.generator(0)
    return [torch.arange(B), *(torch.randperm(B, generator=drawn) for _ in range(count - 1))]


def compare(theirs: dict[str, Any], exact: dict[str, Any], ours: list[dict[str, Any]]) -> None:
    """Upstream's float32 numbers, within the budget that ours, in several orders, set; None where it has None."""
    for name, truth in exact.items():
        made, t = [o[name] for o in ours], theirs.get(name)
        assert all((t is None) == (m is None) for m in (truth, *made)), name
        if t is not None:
            assert_within_budget(torch.as_tensor(t), truth, made, name)


def everything(g: Any, model: Any, task: int, order: Tensor) -> dict[str, Tensor | None]:
    """Of a fresh model: a training step, and its logits in evaluation."""
    model, back = copy.deepcopy(model), order.argsort()
    with torch.no_grad():
        set_task(model.eval(), task)
        out_eval = model(g["x"][order].to(next(model.parameters()).dtype))[back]
    found = step(model.train(), g["x"][order], g["y"][order], task)
    assert found["out_train"] is not None
    return {**found, "out_train": found["out_train"][back], "out_eval": out_eval}


@each_backend
@pytest.mark.parametrize("file", ["tr_small_vgg.pt", "tr_small_vgg_bn.pt"])
def test_a_routed_network(file: str, backend: str) -> None:
    g, model = from_file(file)
    exact64 = copy.deepcopy(model).double()
    with use_backend(backend):
        for known in g["tasks"]:
            ours = [everything(g, model, known["task"], order) for order in orders(6)]
            exact = everything(g, exact64, known["task"], torch.arange(6))
            compare({**known, **known["grads"]}, exact, ours)


def trained(dtype: torch.dtype, order: Tensor) -> dict[str, Tensor]:
    g, model = from_file("tr_train20.pt")
    model.to(dtype)
    rates = {name: g[name] for name in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(model.parameters(), **rates)
    losses = []
    for k, task in enumerate(g["tasks"]):
        optimizer.zero_grad()
        x, y = g["X"][k % len(g["X"])][order], g["Y"][k % len(g["Y"])][order, task]
        loss = step(model, x, y, task)["loss"]
        assert loss is not None
        losses.append(loss)
        optimizer.step()
    return {"losses": torch.stack(losses), **{k: t for k, t in model.state_dict().items() if "mapping" not in k}}


def test_twenty_steps() -> None:
    g = load("tr_train20.pt")
    ours = [trained(torch.float32, order) for order in orders(8)]
    compare({**g["final"], "losses": g["losses"]}, trained(torch.float64, torch.arange(8)), ours)
