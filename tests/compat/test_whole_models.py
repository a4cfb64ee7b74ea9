"""Files of ``torch.save(model)`` that the upstreams wrote, loaded by a user who allows it: they run, or say what to do.

What the upstreams' classes pickle is made here of our own layers: those have the same attributes, and some more.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastroute import compat
from fastroute.compat import PytorchRouting, heinsen_routing, torchmtl
from fastroute.compat.taskrouting import routed_vgg, taskrouting
from tests.helpers import seeds
from tests.helpers.multitask import README_TASKS, readme

pytestmark = pytest.mark.usefixtures("imports_as_before")


def saved(path: Path, where: str, name: str, state: dict[str, Any]) -> Path:
    """The file that a class ``name`` of module ``where`` with these attributes pickles."""
    module = types.ModuleType(where)
    cls = type(name, (nn.Module,), {"__module__": where})
    setattr(module, name, cls)
    made = cls()
    made.__dict__.update(state)
    known = {".".join(where.split(".")[: end + 1]): module for end in range(where.count(".") + 1)}
    sys.modules.update(known)
    torch.save(made, path)
    for part in known:
        del sys.modules[part]
    return path


def loaded(path: Path) -> Any:
    compat.install()
    return torch.load(path, weights_only=False)


def without(module: nn.Module, *names: str) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in names}


def capsules() -> Iterator[tuple[str, nn.Module, tuple[str, ...], tuple[torch.Tensor, ...]]]:
    x = torch.randn(2, 5, 4)
    yield "EfficientVectorRouting", heinsen_routing.EfficientVectorRouting(5, 3, 4, 2), ("_memo",), (x,)
    yield "EfficientVectorRouting", heinsen_routing.EfficientVectorRouting(-1, 3, 4, 2), ("_memo",), (x,)
    parts = nn.Linear(4, 1), nn.Linear(4, 6), nn.Linear(2, 4), nn.Bilinear(1, 1, 1)
    layer = heinsen_routing.DefinableVectorRouting(*parts, 5, 3, n_iters=1)
    yield "DefinableVectorRouting", layer, ("d_inp",), (x,)
    a, mu = torch.randn(2, 5), torch.randn(2, 5, 2, 3)
    yield "GenerativeMatrixRouting", heinsen_routing.GenerativeMatrixRouting(5, 3, 2, 3, 4), (), (a, mu)
    yield "Routing", heinsen_routing.Routing(2, 3, 4), (), (a, mu)


@pytest.mark.parametrize("where", ["heinsen_routing", "heinsen_routing.heinsen_routing"])
def test_capsules(where: str, tmp_path: Path) -> None:
    seeds.manual_seed(0)
    for name, layer, ours, inputs in capsules():
        made = loaded(saved(tmp_path / "whole.pt", where, name, without(layer, *ours)))
        assert type(made) is type(layer)
        torch.testing.assert_close(made(*inputs), layer(*inputs), rtol=0, atol=0)
        for known in [known for known in sys.modules if known.startswith("heinsen_routing")]:
            del sys.modules[known]


@pytest.mark.parametrize("sigma", [3, 0])
def test_a_router(sigma: int, tmp_path: Path) -> None:
    np.random.seed(0)
    router = taskrouting.TaskRouter(8, 4, sigma)
    router.set_active_task(2)
    state = without(router, "task_count", "sigma", "inplace", "_active", "_active_id")
    state["active_task"] = 2
    if sigma == 0:  # a plain attribute there
        state |= {"_buffers": {}, "_non_persistent_buffers_set": set(), "_unit_mapping": router._unit_mapping}
    made = loaded(saved(tmp_path / "router.pt", "taskrouting", "TaskRouter", state))
    x = torch.randn(2, 8, 1, 1)
    assert torch.equal(made(x.clone()), router(x.clone())) and made.active_task == 2 and made.sigma == sigma
    assert list(made.state_dict()) == list(router.state_dict()) and repr(made) == repr(router)
    assert made.set_active_task(3) == 3


def test_a_routed_vgg(tmp_path: Path) -> None:
    np.random.seed(0)
    model = routed_vgg.VGG(routed_vgg.make_layers([4, "M"], 3, 0.5), 3, bottleneck_spatial=(1, 1)).eval()
    model.set_active_task(1)
    state = without(model, "unused_grad", "_active", "_active_id") | {"active_task": 1}
    made = loaded(saved(tmp_path / "vgg.pt", "routed_vgg", "VGG", state))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(made(x), model(x)) and made.active_task == 1 and not made.training


def test_a_model_of_tasks(tmp_path: Path) -> None:
    seeds.manual_seed(0)
    model = torchmtl.MTLModel(readme(init=0.7), list(README_TASKS)).eval()
    with torch.no_grad():
        model.Task3_loss.fill_(0.25)
    names = ("task_layers", "layer_names", *vars(nn.Module()))
    state = {k: v for k, v in vars(model).items() if k in names}
    state |= {"output_tasks": model.output_tasks, "losses": dict(model.losses), "outputs": {"root": torch.ones(1)}}
    weight = nn.Parameter(model.Task3_loss.data)
    state |= {"_parameters": {"Task3_loss": weight}, "loss_weights": {"Task3": weight}, "g": None}
    made = loaded(saved(tmp_path / "model.pt", "torchmtl.model_builder", "MTLModel", state))
    x = torch.randn(4, 16)
    (a, _, weights), (b, _, _) = made(x), model(x)
    assert all(torch.equal(y, z) for y, z in zip(a, b, strict=True)) and not made.training
    assert weights[2] is made.Task3_loss and float(weights[2].detach()) == 0.25
    assert list(made.state_dict()) == list(model.state_dict())
    (weights[2] * torch.ones(())).backward()
    assert made.Task3_loss.grad is not None


@pytest.mark.parametrize(
    ("path", "name", "args"),
    [
        ("CoreLayers.Selection", "Selection", (nn.Linear(2, 2), nn.Linear(2, 2))),
        ("DecisionLayers.ReinforcementLearning.WPL", "WPL", (3, 2)),
    ],
)
def test_routed_networks_say_what_to_do(path: str, name: str, args: Any, tmp_path: Path) -> None:
    """Their objects have other attributes; ours load as ever."""
    module = importlib.import_module(f"{PytorchRouting.__name__}.{path}")
    layer = getattr(module, name)(*args)
    state = without(layer, "_recipe", "_storage_type", "_policy")
    with pytest.raises(RuntimeError, match=rf"{name}: expected an object that fastroute pickled, .*fastroute convert"):
        loaded(saved(tmp_path / "whole.pt", f"PytorchRouting.{path}", name, state))
    torch.save(layer, tmp_path / "ours.pt")
    assert list(loaded(tmp_path / "ours.pt").state_dict()) == list(layer.state_dict())
