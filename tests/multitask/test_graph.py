"""Random graphs against a naive evaluation; orders, slots, what is freed when; and the graph as users see it."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastroute.compat import torchmtl
from fastroute.multitask import Add, MTLModel
from fastroute.multitask.graph import Graph, draw, read
from fastroute.multitask.schedule import Call, assign, breadth_first, in_list_order
from tests.helpers.extras import without
from tests.helpers.multitask import README_TASKS, Layers, Tagged, listed, naive, polled, readme

Draw = Callable[..., Any]


@st.composite
def graphs(draw: Draw, most: int = 9) -> tuple[Layers, list[str]]:
    """A list of dicts in any order, and outputs: repeats, lists of one, tuples, 'root' anywhere, no anchors at all."""
    names = [f"n{k}" for k in range(draw(st.integers(1, most)))]
    entries: Layers = []
    for k, name in enumerate(names):
        entry: dict[str, Any] = {"name": name, "layers": Tagged(name)}
        anchors = draw(st.lists(st.sampled_from(["root", *names[:k]]), max_size=4))
        form = draw(st.sampled_from([list, tuple]))
        if len(anchors) == 1 and draw(st.booleans()):
            entry["anchor_layer"] = anchors[0]
        elif anchors:
            entry["anchor_layer"] = form(anchors)
        elif draw(st.booleans()):
            entry["anchor_layer"] = None
        entries.append(entry)
    entries = draw(st.permutations(entries))
    return entries, draw(st.lists(st.sampled_from(["root", *names]), max_size=5))


@settings(max_examples=150, deadline=None)
@given(graphs(), st.sampled_from(["list", "bfs"]), st.booleans(), st.booleans())
def test_any_graph(case: tuple[Layers, list[str]], order: str, run_all: bool, keep: bool) -> None:
    """What runs and what is kept changes no output."""
    layers, outputs = case
    model = MTLModel(layers, outputs, order=order, run_all=run_all, keep_outputs=keep)
    assert model("x") == (naive(layers, outputs, "x"), [None] * len(outputs), [None] * len(outputs))
    names = [entry["name"] for entry in layers]
    run = [step.names[0] for step in model.plan.steps]
    assert len(set(run)) == len(run) and sorted([*run, *model.unused]) == sorted(names)
    if run_all:
        assert not model.unused
    if keep:
        assert model.outputs == {"root": "x", **dict(zip(run, naive(layers, run, "x"), strict=True))}
        assert list(model.outputs) == ["root", *run]
    else:
        assert not hasattr(model, "outputs")


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_only_what_is_needed_runs(case: tuple[Layers, list[str]]) -> None:
    layers, outputs = case
    by_name = {entry["name"]: listed(entry) for entry in layers}

    def ancestors(name: str) -> set[str]:
        return {name}.union(*map(ancestors, by_name.get(name, [])))

    expected = set().union(*map(ancestors, outputs)) - {"root"}
    model = MTLModel(layers, outputs)
    assert {step.names[0] for step in model.plan.steps} == expected
    model.output_tasks = "root"
    assert model.plan.steps == () and model("x")[0] == ["x"] and model.output_tasks == ["root"]


@settings(max_examples=100, deadline=None)
@given(graphs(), st.data())
def test_names_and_the_order_of_the_list_mean_nothing(case: tuple[Layers, list[str]], data: st.DataObject) -> None:
    layers, outputs = case
    expected = MTLModel(layers, outputs)("x")[0]
    assert MTLModel(data.draw(st.permutations(layers)), outputs)("x")[0] == expected
    names = [entry["name"] for entry in layers]
    other = {"root": "root", **dict(zip(names, data.draw(st.permutations([f"m{k}" for k in range(len(names))]))))}  # noqa: B905
    renamed = [{**e, "name": other[e["name"]], "anchor_layer": [other[a] for a in listed(e)]} for e in layers]
    assert MTLModel(renamed, [other[name] for name in outputs])("x")[0] == expected


@settings(max_examples=150, deadline=None)
@given(graphs(most=14))
def test_upstreams_order(case: tuple[Layers, list[str]]) -> None:
    layers, outputs = case
    ran: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *inputs: ran.append(name)

    MTLModel([{**e, "layers": note(e["name"])} for e in layers], outputs, order="bfs", run_all=True)("x")
    assert ran == polled(layers)
    model = torchmtl.MTLModel(layers, outputs)
    assert [step.names[0] for step in model.plan.steps] == polled(layers)


@settings(max_examples=100, deadline=None)
@given(graphs(most=14))
def test_the_order_of_the_list_unless_a_use_comes_first(case: tuple[Layers, list[str]]) -> None:
    anchors = {node.name: node.anchors for node in read(case[0])}
    order = in_list_order(anchors)
    place = {name: k for k, name in enumerate(["root", *order])}
    assert all(place[a] < place[name] for name in order for a in anchors[name])
    assert in_list_order({name: anchors[name] for name in order}) == order
    bfs = breadth_first(anchors, order)
    assert sorted(bfs) == sorted(order)


@settings(max_examples=100, deadline=None)
@given(graphs(most=14), st.data())
def test_no_slot_is_written_while_it_is_needed_nor_kept_after(
    case: tuple[Layers, list[str]], data: st.DataObject
) -> None:
    """Also where a call computes several nodes."""
    layers, outputs = case
    anchors = {node.name: node.anchors for node in read(layers)}
    calls: list[Call] = []
    for name in in_list_order(anchors):
        before = calls[-1] if calls else None
        if before and before.inputs == anchors[name] and data.draw(st.booleans()):
            calls[-1] = Call((*before.names, name), before.inputs)
        else:
            calls.append(Call((name,), anchors[name]))
    plan = assign(calls, outputs)
    held: list[str | None] = ["root"] + [None] * (plan.slots - 1)
    most = 1
    for k, (call, step) in enumerate(zip(calls, plan.steps, strict=True)):
        assert [held[i] for i in step.inputs] == list(call.inputs)
        for slot, name in zip(step.outputs, call.names, strict=True):
            held[slot] = name
        for slot in step.free:
            held[slot] = None
        later = {name for after in calls[k + 1 :] for name in after.inputs} | set(outputs)
        alive = later & ({"root"} | {name for c in calls[: k + 1] for name in c.names})
        assert {name for name in held if name is not None} == alive
        most = max(most, len(alive | set(call.names)))
    assert [held[slot] for slot in plan.results] == outputs
    assert plan.slots == most


class Watched(nn.Module):
    """Remembers, weakly, what it returned, and what of it was alive whenever a node ran."""

    made: dict[str, Any]
    alive: dict[str, set[str]]

    def __init__(self, name: str, made: dict[str, Any], alive: dict[str, set[str]]) -> None:
        super().__init__()
        self.name, self.made, self.alive = name, made, alive

    def forward(self, *inputs: Any) -> Any:
        self.alive[self.name] = {name for name, ref in self.made.items() if ref() is not None}
        out = torch.zeros(2)
        self.made[self.name] = weakref.ref(out)
        return out


def test_activations_are_freed_after_their_last_use() -> None:
    made: dict[str, Any] = {}
    alive: dict[str, set[str]] = {}
    edges = {"a": ["root"], "b": ["a"], "dead": ["a"], "c": ["b"], "d": ["c", "b"], "e": ["d"], "out": ["e"]}
    layers = [{"name": k, "layers": Watched(k, made, alive), "anchor_layer": v} for k, v in edges.items()]
    outputs = MTLModel(layers, ["c", "out"], run_all=True)(torch.zeros(2))[0]
    assert alive["dead"] == {"a", "b"} and alive["c"] == {"b"} and alive["d"] == {"b", "c"}
    assert alive["e"] == {"c", "d"} and alive["out"] == {"c", "e"}
    assert {name for name, ref in made.items() if ref() is not None} == {"c", "out"} and len(outputs) == 2


class Grouped(MTLModel):
    """Neighbours with the same inputs run as one call, as ``_calls`` allows."""

    def _calls(self) -> list[Call]:
        calls: list[Call] = []
        for call in super()._calls():
            if calls and calls[-1].inputs == call.inputs:
                names = (*calls[-1].names, *call.names)
                calls[-1] = Call(names, call.inputs, Together(names))
            else:
                calls.append(call)
        return calls


class Together:
    """Several nodes at once."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, layers: Any, *inputs: Any) -> list[Any]:
        return [layers[name](*inputs) for name in self.names]


@settings(max_examples=100, deadline=None)
@given(graphs(), st.booleans(), st.booleans())
def test_nodes_that_are_computed_together(case: tuple[Layers, list[str]], run_all: bool, keep: bool) -> None:
    outputs = case[1]
    layers = [{**entry, "layers": AsModule(entry["layers"])} for entry in case[0]]
    model = Grouped(layers, outputs, run_all=run_all, keep_outputs=keep)
    assert model("x")[0] == naive(layers, outputs, "x")
    if keep:
        run = [name for step in model.plan.steps for name in step.names]
        assert model.outputs == {"root": "x", **dict(zip(run, naive(layers, run, "x"), strict=True))}
    copied = copy.deepcopy(model)
    assert copied("x")[0] == model("x")[0] and len(copied.plan.steps) == len(model.plan.steps)


class AsModule(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def test_a_group_in_a_compiled_graph() -> None:
    layers = [{"name": f"t{k}", "layers": nn.Linear(3, 2), "anchor_layer": "e"} for k in range(4)]
    model = Grouped([{"name": "e", "layers": nn.Linear(3, 3)}, *layers], [f"t{k}" for k in range(4)])
    assert [step.names for step in model.plan.steps] == [("e",), ("t0", "t1", "t2", "t3")]
    x = torch.randn(5, 3)
    torch._dynamo.reset()
    found, expected = torch.compile(model, fullgraph=True, backend="eager")(x)[0], model(x)[0]
    assert all(map(torch.equal, found, expected))


def test_thousands_of_nodes() -> None:
    """Deeper than Python's stack, in any order of the list; upstream's queue would turn millions of times."""
    N = sys.getrecursionlimit() + 200
    chain = [
        {"name": f"c{k}", "layers": lambda x: x + 1, "anchor_layer": f"c{k - 1}" if k else "root"} for k in range(N)
    ]
    joiners = [{"name": f"j{k}", "layers": Add(), "anchor_layer": ["root", f"c{N - 1}"]} for k in range(N)]
    outputs = [f"j{k}" for k in range(N)]
    for layers in (chain + joiners, joiners + chain[::-1]):
        for order in ("list", "bfs"):
            model = MTLModel(layers, outputs, order=order)
            assert model(1)[0] == [N + 2] * N
            model.output_tasks = [f"c{N - 1}"]
            assert model.plan.slots == 1 and len(model.unused) == N


def test_the_graph_with_and_without_networkx(monkeypatch: pytest.MonkeyPatch) -> None:
    networkx = pytest.importorskip("networkx")
    layers = [*readme(), {"name": "late", "layers": Add(), "anchor_layer": ["after", "root", "after"]}]
    layers.append({"name": "after", "layers": nn.Identity(), "anchor_layer": "Embed1"})
    model = MTLModel(layers, README_TASKS)
    assert isinstance(model.g, networkx.DiGraph) and networkx.is_directed_acyclic_graph(model.g)
    full = model.g
    without("networkx", monkeypatch)
    assert model.g is full  # which was handed out
    small = MTLModel(layers, README_TASKS).g
    assert isinstance(small, Graph)
    assert list(small) == list(full) and len(small) == len(full) and "late" in small and "later" not in small
    for got, expected in ((small.nodes, full.nodes), (small.nodes(), full.nodes()), (small.edges(), full.edges())):
        assert list(got) == list(expected)
    for name in full:
        assert list(small.predecessors(name)) == list(full.predecessors(name))
        assert list(small.successors(name)) == list(full.successors(name))
    assert list(draw({"a": ("b",), "b": ("root",)}).nodes) == ["root", "a", "b"]
