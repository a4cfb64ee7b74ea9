"""Names that fastroute has added: what is put under one is found there, or refused."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import multitask, plots, tasks
from fastroute.compat.taskrouting import routed_vgg, taskrouting
from fastroute.compat.torchmtl import MTLModel

#: What was refused, or worse, as the name of a node, and what upstream took; and upstream's own names.
ADDED = (
    "feature_names", "forward_outputs", "keep_outputs", "loss", "loss_modules", "outputs_only", "plan",
    "reset_parameters", "shared_parameters", "task_parameters", "unused", "weighting", "with_features",
)  # fmt: skip
UPSTREAMS = ("forward", "g", "layer_names", "loss_weights", "losses", "output_tasks", "outputs", "task_layers", "train")


def test_which_names_were_added() -> None:
    """A public name that the house adds is in the list above, so it is tested here."""
    model = MTLModel([], [])
    public = {name for name in dir(model) if not name.startswith("_")} - set(dir(nn.Module()))
    assert public | {"outputs", "loss_modules"} == {*ADDED, *UPSTREAMS} - {"forward", "train"}
    for name in UPSTREAMS:
        with pytest.raises(ValueError, match=rf"task_layers\[0\] \('{name}'\): name: expected another than that of an"):
            MTLModel([{"name": name, "layers": nn.Identity()}], [])


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("is_module", [True, False])
@pytest.mark.long_after(4)
def test_nodes_by_any_name(name: str, is_module: bool) -> None:
    """A node is the attribute of its name, runs, has upstream's keys, and is replaced as any other."""
    layer: Any = nn.Linear(3, 3) if is_module else torch.sin
    model = MTLModel(
        [{"name": "first", "layers": nn.Linear(4, 3)},
         {"name": name, "layers": layer, "anchor_layer": "first", "loss": nn.MSELoss(), "loss_weight": 2.0}],
        [name],
    )  # fmt: skip
    x, y = torch.randn(5, 4), torch.zeros(5, 3)
    expected = layer(model.first(x))
    assert torch.equal(model(x)[0][0], expected) and getattr(model, name) is layer
    plots.graph(model)
    own = [f"{name}.weight", f"{name}.bias"] if is_module else []
    assert list(model.state_dict()) == ["first.weight", "first.bias", *own]
    assert [n for n, _ in model.named_children()] == ["first", name][: 1 + is_module]
    other = copy.deepcopy(model)
    other.load_state_dict({key: 2 * value for key, value in model.state_dict().items()}, strict=True)
    assert is_module == (getattr(other, name) is not layer) and not torch.equal(other(x)[0][0], expected)
    total, found = MTLModel.loss(model, model(x), {name: y})  # fastroute's own, whatever "loss" is
    torch.testing.assert_close(total, 2 * expected.square().mean())
    assert list(found) == [name]
    model.output_tasks.append("first")
    torch._dynamo.reset()
    outputs = torch.compile(model, fullgraph=True, backend="eager")(x)[0]
    assert torch.equal(outputs[0], expected) and torch.equal(outputs[1], model.first(x))
    setattr(model, name, nn.Identity())
    assert torch.equal(model(x)[0][0], model.first(x))


@pytest.mark.parametrize("name", ADDED)
def test_a_subclass_has_its_own(name: str) -> None:
    """A module or a value that a subclass puts under such a name is what it finds there, and calls work as ever."""

    class Mine(MTLModel):
        def __init__(self, value: Any) -> None:
            super().__init__([{"name": "e", "layers": nn.Linear(4, 4)}], ["e"])
            setattr(self, name, value)

        def step(self, x: Tensor, y: Tensor) -> Any:
            return getattr(self, name)(self(x)[0][0], y)

    x = torch.randn(5, 4)
    for value in (nn.MSELoss(), 3, [1], None):
        model = Mine(value)
        assert getattr(model, name) is value
        model(x)
        model.output_tasks.append("root")
        assert len(model(x)[0]) == 2 and getattr(model, name) is value and getattr(copy.copy(model), name) is value
    model = Mine(nn.MSELoss())
    torch.testing.assert_close(model.step(x, x), (model.e(x) - x).square().mean())
    assert list(model.state_dict()) == ["e.weight", "e.bias"]
    delattr(model, name)
    assert getattr(model, name, None) is not model.e


@pytest.mark.parametrize("name", ADDED)
def test_what_is_under_a_name_goes_for_good(name: str) -> None:
    """A child takes the place of a value, and what a copy is given is not the model's."""
    model: Any = MTLModel([{"name": "e", "layers": nn.Linear(4, 4)}], ["e"])
    houses = type(getattr(model, name, None))
    setattr(model, name, 3)
    other = copy.copy(model)
    setattr(other, name, 4)
    assert (getattr(model, name), getattr(other, name)) == (3, 4)
    delattr(other, name)
    assert getattr(model, name) == 3 and type(getattr(other, name, None)) is houses
    setattr(model, name, nn.Identity())
    assert isinstance(getattr(model, name), nn.Identity)
    delattr(model, name)
    assert type(getattr(model, name, None)) is houses
    model.__dict__[name] = 5  # as an older version has saved it
    assert getattr(model, name) == 5
    setattr(model, name, 6)
    assert getattr(model, name) == 6 and getattr(copy.deepcopy(model), name) == 6
    delattr(model, name)
    assert type(getattr(model, name, None)) is houses
    with pytest.raises(AttributeError, match=name):
        delattr(model, name)


def classes() -> list[Any]:
    rooms = (multitask, tasks, taskrouting, routed_vgg)
    found = {value for room in rooms for value in vars(room).values() if inspect.isclass(value)}
    ours = [c for c in found if issubclass(c, nn.Module) and c.__module__.startswith("fastroute.")]
    return sorted(ours, key=lambda c: (c.__module__, c.__name__))


@pytest.mark.parametrize("cls", classes(), ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_elsewhere_a_taken_name_is_refused(cls: Any) -> None:
    """A child behind a method or a property, or a value in place of a method, says that the name is taken."""
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    refused = []
    for name in dir(cls):
        base = next(b for b in cls.__mro__ if name in vars(b))
        if name.startswith("__") or not base.__module__.startswith("fastroute."):
            continue
        with pytest.raises(ValueError, match=rf"^{name}: expected another name .* of {cls.__name__}, which has a"):
            setattr(model, name, nn.Identity())
        if inspect.isfunction(vars(base)[name]):
            with pytest.raises(ValueError, match=f"^{name}: expected another name .* which has a method '{name}' alr"):
                setattr(model, name, 3)
            setattr(model, name, print)  # a method may be replaced by another
            assert getattr(model, name) is print
        refused.append(name)
    assert refused
    model.mine = nn.Identity()
    assert list(model._modules) == ["mine"]


def test_a_subclass_of_a_router() -> None:
    class Mine(taskrouting.TaskRouter):
        def __init__(self) -> None:
            super().__init__(8, 4, 3)
            self.masked = nn.Linear(8, 8)

    with pytest.raises(ValueError, match="masked: expected another name for an attribute of Mine, which has a method"):
        Mine()
