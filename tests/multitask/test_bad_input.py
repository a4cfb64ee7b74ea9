"""Every wrong dict raises at construction, and the message names it, what was expected and the nearest name."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastroute.compat import torchmtl
from fastroute.multitask import Add, Concat, Lambda, MTLModel, MultiHead, Split, Stack
from tests.helpers.multitask import README_TASKS, readme

LAYER = nn.Identity()


def node(name: Any = "extra", layers: Any = LAYER, **keys: Any) -> dict[str, Any]:
    return {"name": name, "layers": layers, **keys}


#: What is added to the README's list (its index is then 7), and what the message says.
NODES: dict[str, tuple[list[Any], str]] = {
    "an undefined anchor": (
        [node(anchor_layer="Embd1")],
        "task_layers[7] ('extra'): anchor_layer: expected the name of a node, got 'Embd1'; did you mean 'Embed1'?",
    ),
    "one of several": (
        [node(anchor_layer=["Embed1", "task1"])],
        "task_layers[7] ('extra'): anchor_layer: expected the name of a node, got 'task1'; did you mean 'Task1'?",
    ),
    "nothing like it": ([node(anchor_layer="zzz")], "anchor_layer: expected the name of a node, got 'zzz'"),
    "no name": ([node(anchor_layer=3)], "anchor_layer: expected the name of a node, got 3"),
    "no anchors": ([node(anchor_layer=[])], "anchor_layer: expected at least one name, got []"),
    "a cycle": (
        [node("a", anchor_layer="c"), node("b", anchor_layer=["root", "a"]), node("c", anchor_layer=["Embed1", "b"])],
        "task_layers: expected no cycle of anchors, got a -> b -> c -> a",
    ),
    "a cycle behind a node": (
        [node("a", anchor_layer="b"), node("b", anchor_layer="c"), node("c", anchor_layer="b")],
        "task_layers: expected no cycle of anchors, got b -> c -> b",
    ),
    "itself": ([node("a", anchor_layer="a")], "task_layers: expected no cycle of anchors, got a -> a"),
    "a name twice": ([node("FNN")], "task_layers[7] ('FNN'): name: expected another than that of task_layers[5]"),
    "root": ([node("root")], "task_layers[7] ('root'): name: 'root' is the input of the model"),
    "a number": ([node(3)], "task_layers[7]: name: expected a str, got 3"),
    "None": ([node(None)], "task_layers[7]: name: expected a str, got None"),
    "an empty name": ([node("")], "task_layers[7] (''): name: expected at least one letter"),
    "a dot": ([node("a.b")], "task_layers[7] ('a.b'): name: expected at least one letter and no \".\""),
    "auto and a layer": (
        [node("A_loss"), node("A", loss_weight="auto", loss_init_val=1.0)],
        "task_layers[8] ('A'): loss_weight: 'auto' makes a parameter 'A_loss', the name of task_layers[7]",
    ),
    "a layer and auto": (
        [node("Task3_loss")],
        "task_layers[6] ('Task3'): loss_weight: 'auto' makes a parameter 'Task3_loss', the name of task_layers[7]",
    ),
    "no name at all": (
        [{"layers": LAYER, "nmae": "a"}],
        "task_layers[7] (its keys are ['layers', 'nmae']): expected the key 'name', found none; is 'nmae' meant",
    ),
    "no layers": (
        [{"name": "a", "layer": LAYER}],
        "task_layers[7] ('a'): expected the key 'layers', found none; is 'layer' meant to be it?",
    ),
    "an unknown key": (
        [node(anchor_layers="Embed1")],
        "task_layers[7] ('extra'): unknown key 'anchor_layers'; did you mean 'anchor_layer'?",
    ),
    "a strange key": ([node(colour="red")], "unknown key 'colour'; the keys are name, layers, anchor_layer, loss,"),
    "layers: None": ([node(layers=None)], "task_layers[7] ('extra'): layers: expected a Module, a list of them or a"),
    "layers: a number": ([node(layers=3)], "layers: expected a Module, a list of them or a function, got int"),
    "layers: a class": ([node(layers=nn.ReLU)], "layers: expected a Module, got the class ReLU: ReLU(...)?"),
    "layers: a list": ([node(layers=[LAYER, 3])], "task_layers[7] ('extra'): layers[1]: expected a Module, got int"),
    "a weight that is not finite": ([node(loss_weight=float("nan"))], "loss_weight: expected a finite number, got nan"),
    "a class for a loss": ([node(loss=nn.MSELoss)], "loss: expected a Module, got the class MSELoss: MSELoss(...)?"),
    "a number for a loss": ([node(loss=3)], "loss: expected a Module or a function, got int"),
    "a weight": ([node(loss_weight="atuo")], "loss_weight: expected a number or 'auto', got 'atuo'"),
    "no initial weight": ([node(loss_weight="auto")], "loss_init_val: expected a number, since loss_weight is 'auto'"),
    "an initial weight": ([node(loss_weight="auto", loss_init_val="1")],
                          "loss_init_val: expected a finite number, got '1"),
    "NaN": ([node(loss_weight="auto", loss_init_val=float("nan"))], "loss_init_val: expected a finite number, got nan"),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "message"), NODES.values(), ids=NODES)
def test_nodes(nodes: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MTLModel([*readme(), *nodes], README_TASKS)


#: What upstream accepts, and so does what stands for it.
LENIENT = {
    "an empty name", "a dot", "an unknown key", "a strange key", "a weight", "a weight that is not finite",
    "a class for a loss", "a number for a loss",
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "message"), [NODES[k] for k in NODES if k not in LENIENT])
def test_in_place_of_upstream(nodes: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        torchmtl.MTLModel([*readme(), *nodes], README_TASKS)


RESERVED = ["forward", "g", "train", "losses", "loss_weights", "outputs", "task_layers", "layer_names", "_modules"]


@pytest.mark.parametrize("name", [*RESERVED, "plan", "output_tasks", "training", "state_dict", "loss_modules", "_flat"])
def test_names_that_the_model_needs(name: str) -> None:
    expected = rf"task_layers\[0\] \({name!r}\): name: expected another than that of an attribute or a method"
    for cls in (MTLModel, torchmtl.MTLModel)[: 1 if name in ("plan", "loss_modules") else 2]:  # upstream has no such
        with pytest.raises(ValueError, match=expected):
            cls([node(name)], [name])


def test_every_attribute_is_reserved() -> None:
    model = MTLModel([*readme(), node("w", loss=nn.CrossEntropyLoss(torch.ones(2)))], README_TASKS, keep_outputs=True)
    model(torch.ones(2, 16))
    for name in {*dir(model)} - {*model.layer_names, "Task3_loss"}:
        with pytest.raises(ValueError, match="name: expected"):
            MTLModel([node(name)], [])


def test_an_auto_weight_that_is_an_attribute() -> None:
    class Own(MTLModel):
        my_loss = 1

    with pytest.raises(ValueError, match="'auto' makes a parameter 'my_loss', the name of an attribute of the model"):
        Own([node("my", loss_weight="auto", loss_init_val=1)], [])


CALLS: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (readme(), ["Task1", "Tsk2"], {}, ValueError, r"output_tasks\[1\]: expected .* 'Tsk2'; did you mean 'Task2'\?"),
    (
        readme(),
        "Task",
        {},
        ValueError,
        r"output_tasks\[0\]: expected the name of a node, got 'Task'; did you mean 'Task",
    ),
    (readme(), [None], {}, ValueError, r"output_tasks\[0\]: expected the name of a node, got None"),
    (readme(), [["Task1"]], {}, ValueError, r"output_tasks\[0\]: expected the name of a node, got \['Task1'\]"),
    (readme(), None, {}, TypeError, "output_tasks: expected a list of names of nodes, got NoneType"),
    (None, [], {}, TypeError, "task_layers: expected a list of dicts, got NoneType"),
    (node(), [], {}, TypeError, "task_layers: expected a list of dicts, got dict"),
    ("nodes", [], {}, TypeError, "task_layers: expected a list of dicts, got str"),
    ([node(), LAYER], [], {}, TypeError, r"task_layers\[1\]: expected a dict, got Identity"),
    (readme(), [], {"order": "dfs"}, ValueError, "order: expected 'list' or 'bfs', got 'dfs'"),
]


@pytest.mark.parametrize(("layers", "outputs", "options", "error", "message"), CALLS)
def test_calls(layers: Any, outputs: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MTLModel(layers, outputs, **options)


def test_later() -> None:
    """Outputs that are set, losses and weights: nothing has changed after an error."""
    model = MTLModel(readme(), README_TASKS)
    with pytest.raises(ValueError, match=r"output_tasks\[0\]: .*did you mean 'FNN'"):
        model.output_tasks = ["FN"]
    assert model.output_tasks == README_TASKS and len(model(torch.ones(2, 16))[0]) == 3
    for view in (model.losses, model.loss_weights):
        with pytest.raises(KeyError, match="expected the name of a node, got 'Tusk1'; did you mean 'Task1'"):
            view["Tusk1"] = 1
        with pytest.raises(KeyError):
            view["FNN"]
        with pytest.raises(KeyError):
            del view["FNN"]
        assert view.get("FNN") is None
    with pytest.raises(AttributeError, match="outputs"):
        _ = model.outputs


@pytest.mark.parametrize("weight", [abs, "0.5", torch.ones(2), [1.0]])
def test_a_weight_that_multiplies_nothing(weight: Any) -> None:
    model = torchmtl.MTLModel([node("a", loss=nn.MSELoss(), loss_weight=weight)], ["a"])
    with pytest.raises(TypeError, match="loss_weight of 'a': expected a number, a tensor of one element or None, got"):
        model.loss(model(torch.ones(2, 1)), torch.ones(2, 1))


def test_a_node_that_fails_is_named() -> None:
    """And what it was called with."""
    model = MTLModel([node("a", nn.Linear(3, 4)), node("b", nn.Linear(5, 2), anchor_layer="a")], ["b"])
    with pytest.raises(RuntimeError) as info:
        model(torch.ones(2, 3))
    notes = getattr(info.value, "__notes__", ["in node 'b' of MTLModel, called with [2, 4]"])
    assert notes == ["in node 'b' of MTLModel, called with [2, 4]"]
    joined = MTLModel([node("a", Concat(1), anchor_layer=["root", "root"])], "a")
    with pytest.raises(TypeError) as other:
        joined([torch.ones(2), torch.ones(2)])
    assert "called with list, list" in "".join(getattr(other.value, "__notes__", ["called with list, list"]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Concat(1.5), TypeError, "dim: expected an int, got 1.5"),
        (lambda: Stack(True), TypeError, "dim: expected an int, got True"),
        (lambda: Split(0, 1), ValueError, "sizes: expected at least 1, got 0"),
        (lambda: Split([2, -1], 1), ValueError, "sizes: expected at least 1, got -1"),
        (lambda: Split("2", 1), TypeError, "sizes: expected an int, got '2'"),
        (lambda: Split(2, None), TypeError, "dim: expected an int, got None"),
        (lambda: Lambda(3), TypeError, "function: expected something to call, got int"),
        (lambda: Add()(), TypeError, "of empty"),
    ],
)
def test_wrapping(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


Y_HAT, Y, ARRAY = torch.ones(2, 3), torch.zeros(2, 3), np.zeros((2, 3))
#: What ``loss`` is given, and what the message says.
GIVEN: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "an array for a target": ([Y_HAT], [ARRAY], {}, "y['a']: expected a tensor, got an array [2, 3] of float64"),
    "by name": ([Y_HAT], {"a": ARRAY}, {}, "y['a']: expected a tensor, got an array [2, 3] of float64"),
    "an array for all": ([Y_HAT], ARRAY, {}, "y: expected a dict by task or a list, got an array [2, 3] of float64"),
    "a number": ([Y_HAT], 3, {}, "y: expected a dict by task or a list, got 3"),
    "a number in a list": ([Y_HAT], [3], {}, "y['a']: expected a tensor, got 3"),
    "a name": ([Y_HAT], "a", {}, "y: expected a dict by task or a list, got 'a'"),
    "a set": ([Y_HAT], {1}, {}, "y: expected a dict by task or a list, got {1}"),
    "no prediction": (None, [Y], {}, "y_hat: expected a dict by task or a list, got None"),
    "None for one": ([None], [Y], {}, "y_hat['a']: expected a tensor, got None"),
    "an array for a prediction": ([ARRAY], [Y], {}, "y_hat['a']: expected a tensor, got an array [2, 3] of float64"),
    "an array for a mask": ([Y_HAT], [Y], {"mask": ARRAY}, "mask: expected a dict by task or a list, got an array [2"),
    "a number for a mask": ([Y_HAT], [Y], {"mask": 3}, "mask: expected a dict by task or a list, got 3"),
    "a weighting": ([Y_HAT], [Y], {"weighting": 3}, "weighting: expected a str, got 3"),
}


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.functional.mse_loss, nn.CrossEntropyLoss()])
def test_what_a_loss_is_given(case: str, loss: Any) -> None:
    y_hat, y, options, message = GIVEN[case]
    model = MTLModel([node("a", loss=loss)], "a")
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        model.loss(y_hat, y, **options)
    total, _ = model.loss([Y_HAT], [Y])
    assert torch.equal(total, loss(Y_HAT, Y))


def test_multihead_of_another_dtype() -> None:
    heads = MultiHead(4, 8, 2, 3)
    for x in (torch.ones(2, 4).double(), torch.ones(2, 4).long()):
        with pytest.raises(TypeError, match=rf"x: expected torch.float32 on cpu like the parameters, .* of {x.dtype}"):
            heads(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert heads(torch.ones(2, 4).bfloat16()).shape == (3, 2, 2)
