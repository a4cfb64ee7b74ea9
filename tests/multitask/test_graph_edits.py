"""What is done to the graph that a model has handed out counts from the next call on, compiled or not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute.compat import torchmtl
from fastroute.multitask import Add, MTLModel
from fastroute.multitask.graph import Graph

networkx = pytest.importorskip("networkx")
each_class = pytest.mark.parametrize("cls", [MTLModel, torchmtl.MTLModel])


def made(cls: Any = MTLModel) -> Any:
    layers: list[dict[str, Any]] = [{"name": name, "layers": nn.Linear(4, 4)} for name in "ef"]
    layers.append({"name": "a", "layers": Add(), "anchor_layer": ["e", "f"]})
    layers.append({"name": "b", "layers": nn.Linear(4, 4), "anchor_layer": "a"})
    return cls(layers, ["b", "a"])


#: What is done, and what node "a" then is.
EDITS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Tensor], Tensor]]] = {
    "an edge less": (lambda g: g.remove_edge("f", "a"), lambda m, x: m.e(x)),
    "an edge more": (lambda g: g.add_edge("root", "a"), lambda m, x: m.e(x) + m.f(x) + x),
    "a chain": (lambda g: (g.remove_edge("root", "f"), g.add_edge("e", "f")), lambda m, x: m.e(x) + m.f(m.e(x))),
    "edges anew": (
        lambda g: (g.clear_edges(), g.add_edges_from([("root", "e"), ("root", "f"), ("e", "a"), ("a", "b")])),
        lambda m, x: m.e(x),
    ),
    "nothing": (lambda g: g.add_node("bare"), lambda m, x: m.e(x) + m.f(x)),
}


@each_class
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("compiled", [False, True])
def test_edits_count(cls: Any, name: str, compiled: bool) -> None:
    model, (edit, expected) = made(cls), EDITS[name]
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(x)[0][1], model.e(x) + model.f(x))
    assert model.g is model.g
    run(x)
    edit(model.g)
    a = expected(model, x)
    for outputs in (run(x)[0], model(x)[0], copy.deepcopy(model)(x)[0], pickle.loads(pickle.dumps(model))(x)[0]):
        torch.testing.assert_close(outputs[1], a)
        torch.testing.assert_close(outputs[0], model.b(a))
    assert list(model.state_dict()) == [f"{n}.{p}" for n in "efb" for p in ("weight", "bias")]


@each_class
def test_edits_are_seen_before_a_call(cls: Any) -> None:
    """By all that tells of the schedule, and by copies, which have graphs of their own."""
    model = made(cls)
    model.g.nodes["a"]["color"] = 1
    model.output_tasks = ["a", "e"]
    model.g.remove_edge("f", "a")
    other = copy.deepcopy(model)
    if cls is MTLModel:
        assert model.unused == ["f", "b"] and [s.names for s in model.plan.steps] == [("e",), ("a",)]
    assert model.feature_names == ["e"] and len(model.shared_parameters()) == 2
    assert other.g.nodes["a"]["color"] == model.g.nodes["a"]["color"] == 1
    other.g.add_edge("f", "a")
    x = torch.randn(3, 4)
    assert torch.equal(model(x)[0][0], model.e(x)) and torch.equal(other(x)[0][0], other.e(x) + other.f(x))


#: What is done, and what every call then says, until it is undone.
WRONG: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "a cycle": (lambda g: g.add_edge("a", "e"), lambda g: g.remove_edge("a", "e"), "g: expected no cycle of anchors"),
    "no anchor": (
        lambda g: g.remove_edge("a", "b"), lambda g: g.add_edge("a", "b"),
        "g: expected all nodes, each with an edge to it, found 'b' without one",
    ),
    "to a stranger": (
        lambda g: g.add_edge("e", "c"), lambda g: g.remove_edge("e", "c"),
        "g: expected edges between nodes, got 'e' -> 'c'",
    ),
    "from a stranger": (
        lambda g: g.add_edge("c", "e"), lambda g: g.remove_edge("c", "e"), "g: expected edges between nodes, got ",
    ),
    "to the input": (
        lambda g: g.add_edge("e", "root"), lambda g: g.remove_edge("e", "root"),
        "g: expected edges between nodes, got 'e' -> 'root'",
    ),
}  # fmt: skip


@each_class
@pytest.mark.parametrize("name", WRONG)
def test_wrong_edits_raise(cls: Any, name: str) -> None:
    model, (do, undo, message) = made(cls), WRONG[name]
    x = torch.randn(3, 4)
    expected = model(x)[0]
    do(model.g)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            model(x)
    undo(model.g)
    assert all(map(torch.equal, model(x)[0], expected))


def test_a_graph_that_is_given() -> None:
    """Stays the model's, whoever made it."""
    model, x = made(torchmtl.MTLModel), torch.randn(3, 4)
    mine = networkx.DiGraph([("root", "e"), ("root", "f"), ("f", "a"), ("a", "b")])
    model.g = mine
    assert model.g is mine and torch.equal(model(x)[0][1], model.f(x))
    mine.add_edge("e", "a")
    assert torch.equal(model(x)[0][1], model.f(x) + model.e(x))
    model.g = small = Graph(["root", *"efab"], [("root", "e"), ("root", "f"), ("e", "a"), ("a", "b")])
    assert model.g is small and torch.equal(model(x)[0][1], model.e(x))


def test_an_anchor_twice_survives_other_edits() -> None:
    layers = [{"name": name, "layers": nn.Linear(4, 4)} for name in "ef"]
    model = MTLModel([*layers, {"name": "a", "layers": Add(), "anchor_layer": ["e", "e"]}], ["a", "f"])
    model.g.add_edge("e", "f")
    model.g.remove_edge("root", "f")
    x = torch.randn(3, 4)
    a, f = model(x)[0]
    assert torch.equal(a, 2 * model.e(x)) and torch.equal(f, model.f(model.e(x)))
