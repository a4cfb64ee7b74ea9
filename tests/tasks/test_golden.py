"""Upstream's numbers: masks, the layer, routed networks with their gradients, and twenty training steps."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastroute import use_backend
from fastroute.tasks import TaskRouter, set_task, vgg11
from tests.helpers import golden
from tests.helpers.budget import Yardstick
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


def compare(theirs: dict[str, Any], yardstick: Yardstick) -> None:
    """Upstream's float32 numbers, within budget; None where it has None."""
    yardstick.check({k: None if (t := theirs.get(k)) is None else torch.as_tensor(t) for k in yardstick.exact})


def everything(g: Any, model: Any, task: int) -> dict[str, Tensor | None]:
    """Of a fresh model: a training step, and its logits in evaluation."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        set_task(model.eval(), task)
        out_eval = model(g["x"].to(next(model.parameters()).dtype))
    return {**step(model.train(), g["x"], g["y"], task), "out_eval": out_eval}


@pytest.mark.parametrize("file", ["tr_small_vgg.pt", "tr_small_vgg_bn.pt"])
def test_a_routed_network(file: str) -> None:
    g, model = from_file(file)
    exact = copy.deepcopy(model).double()
    for known in g["tasks"]:
        yardstick = Yardstick(partial(everything, g, exact, known["task"]), torch.float32)
        compare({**known, **known["grads"]}, yardstick)
        for backend in ("reference", "auto"):
            with use_backend(backend):
                compare(everything(g, model, known["task"]), yardstick)


def trained(dtype: torch.dtype) -> dict[str, Tensor]:
    g, model = from_file("tr_train20.pt")
    model.to(dtype)
    rates = {name: g[name] for name in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(model.parameters(), **rates)
    losses = []
    for k, task in enumerate(g["tasks"]):
        optimizer.zero_grad()
        x, y = g["X"][k % len(g["X"])], g["Y"][k % len(g["Y"])][:, task]
        loss = step(model, x, y, task)["loss"]
        assert loss is not None
        losses.append(loss)
        optimizer.step()
    return {"losses": torch.stack(losses), **{k: t for k, t in model.state_dict().items() if "mapping" not in k}}


def test_twenty_steps() -> None:
    g, yardstick = load("tr_train20.pt"), Yardstick(lambda: trained(torch.float64), torch.float32)
    for numbers in (trained(torch.float32), {**g["final"], "losses": g["losses"]}):
        compare(numbers, yardstick)
