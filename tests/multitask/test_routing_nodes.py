"""Layers of the other families, and of this one, as nodes of a model; task ids that flow through the graph.

Axes: B samples, T tasks, F features, K modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastroute
from fastroute import networks
from fastroute.multitask import (
    CGC,
    PLE,
    Concat,
    CrossStitch,
    EachTask,
    MMoE,
    MTLModel,
    OfTask,
    SimpleSelect,
    SliceSelect,
    ToTasks,
    Unpack,
)
from fastroute.tasks import TaskRouter, live
from tests.helpers import seeds
from tests.helpers.opcheck import assert_same

pytestmark = pytest.mark.usefixtures("poisoned")

F64 = torch.float64
T, F, K = 3, 6, 3
TASKS = [f"task {t}" for t in range(T)]


def node(name: str, layers: Any, *anchors: str) -> dict[str, Any]:
    return {"name": name, "layers": layers, **({"anchor_layer": list(anchors)} if anchors else {})}


def masks() -> torch.Generator:
    return seeds.generator(0)


INPUTS = [node("x", SimpleSelect("x")), node("task", SimpleSelect("task"))]


def batch(B: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Every task has a sample, if there are that many."""
    generator = seeds.generator(seed)
    x = torch.randn(B, F, generator=generator, dtype=F64)
    return {"x": x, "task": (torch.arange(B) % T)[torch.randperm(B, generator=generator)]}


def per_task(layer: Any) -> list[dict[str, Any]]:
    """A layer with an output per task, and heads."""
    picks = [node(f"in {t}", SimpleSelect(name if layer.tasks else t), "mix") for t, name in enumerate(TASKS)]
    return [node("mix", layer), *picks, *(node(name, nn.Linear(F, 2), f"in {t}") for t, name in enumerate(TASKS))]


def task_routed() -> MTLModel:
    return MTLModel(
        [
            *INPUTS,
            node("first", nn.Linear(F, 8), "x"),
            node("routed", TaskRouter(8, T, 0.5, generator=masks()), "first", "task"),
            node("relu", nn.ReLU(), "routed"),
            *(node(name, nn.Linear(8, 2), "relu") for name in TASKS),
            node("y", OfTask(), *TASKS, "task"),
        ],
        ["y"],
    )  # fmt: skip


def each_task_routed() -> MTLModel:
    """Every sample with all tasks."""
    return MTLModel(
        [
            node("x", SimpleSelect("x")),
            node("every", EachTask(T), "x"),
            node("many", SimpleSelect(0), "every"),
            node("ids", SimpleSelect(1), "every"),
            node("first", nn.Linear(F, 8), "many"),
            node("routed", TaskRouter(8, T, 0.5, generator=masks()), "first", "ids"),
            node("relu", nn.ReLU(), "routed"),
            node("apart", ToTasks(T), "relu"),
            *(node(f"in {t}", SimpleSelect(t), "apart") for t in range(T)),
            *(node(name, nn.Linear(8, 2), f"in {t}") for t, name in enumerate(TASKS)),
        ],
        TASKS,
    )  # fmt: skip


def live_routed() -> MTLModel:
    """A whole live network is one node."""
    routed = [nn.Linear(F, 8), TaskRouter(8, T, 0.5, generator=masks()), nn.ReLU(), nn.Linear(8, 8)]
    trunk = live(nn.Sequential(*routed, TaskRouter(8, T, 0.5, generator=masks())))
    return MTLModel([*INPUTS, node("trunk", trunk, "x", "task"), node("y", nn.Linear(8, 2), "trunk")], ["y"])


def selection() -> networks.Selection:
    return networks.Selection(*(nn.Linear(F, F) for _ in range(K)), unused_grad="zeros")


def selected() -> MTLModel:
    """A module per task: the task is the action."""
    return MTLModel(
        [
            *INPUTS,
            node("start", networks.Initialization(), "x", "task"),
            node("both", SliceSelect(slice(2)), "start"),
            node("select", Unpack(selection(), take=0), "both", "task"),
            node("y", nn.Linear(F, 2), "select"),
        ],
        ["y"],
    )  # fmt: skip


def routed_network() -> MTLModel:
    """A learned choice of a module, by agents of which every task has one; their record is an output."""
    return MTLModel(
        [
            *INPUTS,
            node("start", networks.Initialization(), "x", "task"),
            node("agents", Unpack(networks.PerTaskAssignment()), "start"),
            node("choose", Unpack(networks.WPL(K, F, num_agents=T)), "agents"),
            node("selected", Unpack(selection()), "choose"),
            node("h", SimpleSelect(0), "selected"),
            node("record", SimpleSelect(1), "selected"),
            node("y", nn.Linear(F, 2), "h"),
        ],
        ["y", "record"],
    )  # fmt: skip


def capsules() -> MTLModel:
    """Six vectors of one feature to a vector per task."""
    return MTLModel(
        [
            node("x", SimpleSelect("x")),
            node("vectors", nn.Unflatten(1, (F, 1)), "x"),
            node("route", fastroute.EfficientVectorRouting(F, T, 1, 4), "vectors"),
            *(node(f"in {t}", SliceSelect((slice(None), t)), "route") for t in range(T)),
            *(node(name, nn.Linear(4, 2), f"in {t}") for t, name in enumerate(TASKS)),
        ],
        TASKS,
    )  # fmt: skip


def mixture() -> MTLModel:
    return MTLModel(
        [
            node("x", SimpleSelect("x")),
            node("moe", Unpack(networks.MoE(F, 5, K, 2), return_aux=True), "x"),
            node("h", SimpleSelect(0), "moe"),
            node("aux", SimpleSelect(1), "moe"),
            node("balance", SimpleSelect(0), "aux"),
            *(node(name, nn.Linear(F, 2), "h") for name in TASKS),
        ],
        [*TASKS, "balance"],
    )  # fmt: skip


def stitched() -> MTLModel:
    """Columns that a stitch joins twice."""
    nodes = [node("x", SimpleSelect("x"))]
    before = ["x"] * T
    for level in range(2):
        columns = [f"column {level} {t}" for t in range(T)]
        nodes += [node(c, nn.Sequential(nn.Linear(F, F), nn.ReLU()), b) for c, b in zip(columns, before, strict=True)]
        nodes.append(node(f"stitch {level}", CrossStitch(T, channels=F), *columns))
        before = [f"in {level} {t}" for t in range(T)]
        nodes += [node(b, SimpleSelect(t), f"stitch {level}") for t, b in enumerate(before)]
    return MTLModel([*nodes, *(node(y, nn.Linear(F, 2), b) for y, b in zip(TASKS, before, strict=True))], TASKS)


def of(layer: Callable[[], Any]) -> Callable[[], MTLModel]:
    def model() -> MTLModel:
        first, *nodes = per_task(layer())
        return MTLModel([node("x", SimpleSelect("x")), {**first, "anchor_layer": "x"}, *nodes], TASKS)

    return model


SIZES: dict[str, Any] = {"hidden_features": 5, "out_features": F}
MODELS: dict[str, Callable[[], MTLModel]] = {
    "TaskRouter": task_routed,
    "TaskRouter, each task": each_task_routed,
    "live": live_routed,
    "Selection": selected,
    "routing network": routed_network,
    "EfficientVectorRouting": capsules,
    "MoE": mixture,
    "CrossStitch": stitched,
    "MMoE": of(lambda: MMoE(F, 4, T, **SIZES)),
    "MMoE, named": of(lambda: MMoE(F, 4, TASKS, **SIZES)),
    "CGC": of(lambda: CGC(F, 1, 2, TASKS, **SIZES)),
    "PLE": of(lambda: PLE(F, 1, 2, T, **SIZES)),
}
each_model = pytest.mark.parametrize("name", MODELS)


def model_of(name: str) -> MTLModel:
    seeds.manual_seed(0)
    made = MODELS[name]().double().eval()
    return made


def tensors(outputs: list[Any]) -> list[Tensor]:
    return [y for y in outputs if isinstance(y, Tensor)]


def results(model: Callable[[Any], Any], given: dict[str, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    seeds.manual_seed(1)
    ys = tensors(model(given)[0])
    grads = torch.autograd.grad([y.square().sum() for y in ys], leaves, allow_unused=True)
    return [
        *(y.detach() for y in ys),
        *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)),
    ]


# ------------------------------------------------------------------------------------------ the same without a graph


def test_a_task_router_is_called_with_the_batchs_tasks() -> None:
    model, given = model_of("TaskRouter"), batch()
    (y,), _, _ = model(given)
    h = (model.first(given["x"]) * model.routed.get_unit_mapping()[given["task"]]).relu()
    for b, t in enumerate(given["task"]):
        assert_same(y[b].detach(), getattr(model, TASKS[t])(h[b]).detach())


def test_each_task_has_all_samples() -> None:
    model, given = model_of("TaskRouter, each task"), batch()
    for t, y in enumerate(model(given)[0]):
        h = (model.first(given["x"]) * model.routed.get_unit_mapping()[t]).relu()
        assert_same(y.detach(), getattr(model, TASKS[t])(h).detach())


def test_selection_takes_the_task_as_action() -> None:
    model, given = model_of("Selection"), batch()
    (y,), _, _ = model(given)
    modules = model.select.layer._submodules
    for b, t in enumerate(given["task"]):
        assert_same(y[b].detach(), model.y(modules[t](given["x"][b])).detach())


def test_a_routing_network_is_that_without_a_graph() -> None:
    model, given = model_of("routing network"), batch()
    (y, record), _, _ = model(given)
    with torch.no_grad():
        h, meta, none = networks.Initialization()(given["x"], given["task"])
        h, meta, agents = networks.PerTaskAssignment()(h, meta, none)
        h, meta, actions = model.choose.layer(h, meta, agents)
        h, meta, actions = model.selected.layer(h, meta, actions)
    assert torch.equal(y.detach(), model.y(h).detach()) and torch.equal(record.actions, meta.actions)
    assert torch.equal(record.agents[0], given["task"])


def test_a_routing_network_learns_through_its_record() -> None:
    model, given = model_of("routing network").train(), batch()
    (y, record), _, _ = model(given)
    module_loss, routing_loss = networks.Loss(nn.CrossEntropyLoss(), networks.NegLossReward())(
        y, record, given["task"] % 2
    )
    (module_loss + routing_loss).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_mixtures_losses_are_an_output() -> None:
    model, given = model_of("MoE"), batch()
    *_, balance = model(given)[0]
    assert torch.equal(balance, model.moe.layer(given["x"], return_aux=True)[1].loss)


# -------------------------------------------------------------------------------------------------------------- laws


@each_model
@torch.no_grad()
def test_permuting_samples_permutes_outputs(name: str) -> None:
    model, given = model_of(name), batch()
    order = torch.randperm(8, generator=seeds.generator(0))
    expected, found = model(given)[0], model({k: t[order] for k, t in given.items()})[0]
    for y, turned in zip(tensors(expected), tensors(found), strict=True):
        assert_same(turned, y[order] if y.dim() else y)


@each_model
@torch.no_grad()
def test_not_a_number_stays_in_its_sample(name: str) -> None:
    model, given = model_of(name), batch()
    bad = torch.arange(8) == 3
    spoilt = {**given, "x": torch.where(bad[:, None], torch.nan, given["x"])}
    for y, found in zip(tensors(model(given)[0]), tensors(model(spoilt)[0]), strict=True):
        assert y.dim() == 0 or torch.equal(found[~bad], y[~bad])


@each_model
def test_copies_and_state_dicts(name: str) -> None:
    model, given = model_of(name), batch()
    leaves = list(model.parameters())
    expected = results(model, given, leaves)
    copied = copy.deepcopy(model)  # after a forward pass
    other = MODELS[name]().double().eval()
    other.load_state_dict(model.state_dict())
    for again in (copied, other):
        for got, wanted in zip(results(again, given, list(again.parameters())), expected, strict=True):
            assert torch.equal(got, wanted)


# -------------------------------------------------------------------------------------------------------- one graph


LONG = ("routing network", "MoE", "MMoE", "PLE")  # to compile


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.long if name in LONG else ())
    for name in MODELS if name not in ("CGC", "MMoE, named", "TaskRouter, each task")
])  # fmt: skip
@pytest.mark.long_after(1)
def test_compiles_as_one_graph_for_all_batch_sizes(name: str) -> None:
    model = model_of(name)
    leaves = list(model.parameters())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def outputs(given: dict[str, Tensor]) -> tuple[list[Tensor]]:
        return (tensors(model.forward_outputs(given)),)

    compiled, graphs = torch.compile(outputs, fullgraph=True, dynamic=True, backend=counter), 0
    for k, B in enumerate((8, 5, 12)):
        given = batch(B, seed=B)
        for got, expected in zip(results(compiled, given, leaves), results(outputs, given, leaves), strict=True):
            assert_same(got, expected)
        graphs = counter.frame_count if k == 0 else graphs
        assert counter.frame_count == graphs, f"compiled again for batch {B}"


@pytest.mark.parametrize("name", ["MMoE, named", "CrossStitch", "TaskRouter", "EfficientVectorRouting"])
def test_exports(name: str) -> None:
    model, given = model_of(name), batch()
    size = torch.export.Dim("batch", min=2, max=64)
    used = set(given) if "TaskRouter" in name else {"x"}
    shapes = ({k: {0: size} for k in given if k in used},)
    example = {k: t for k, t in given.items() if k in used}
    program = torch.export.export(model.outputs_only(), (example,), dynamic_shapes=shapes).module()
    for B in (8, 3):
        given = {k: t for k, t in batch(B, seed=B).items() if k in used}
        assert all(torch.equal(a, b) for a, b in zip(program(given), model(given)[0], strict=True))


# --------------------------------------------------------------------------------------------------------- the adapters


def test_unpack() -> None:
    layer = nn.Bilinear(2, 3, 4)
    a, b = torch.randn(5, 2), torch.randn(5, 3)
    assert torch.equal(Unpack(layer)((a, b)), layer(a, b)) and torch.equal(Unpack(layer)((a,), b), layer(a, b))
    assert list(Unpack(layer).state_dict()) == ["layer.weight", "layer.bias"]
    assert Unpack(torch.split, 1, dim=0)((torch.arange(4), 2)).tolist() == [2, 3]
    assert "dim=0" in repr(Unpack(torch.split, 1, dim=0))
    with pytest.raises(TypeError, match="layer: expected a Module or a function, got int"):
        Unpack(3)  # type: ignore[arg-type]


def test_each_task_and_back() -> None:
    x = torch.arange(12.0).reshape(4, 3)
    many, ids = EachTask(2)(x)
    assert torch.equal(many, torch.cat([x, x])) and ids.tolist() == [0] * 4 + [1] * 4
    assert all(torch.equal(a, x) for a in ToTasks(2)(many))
    empty, none = EachTask(2)(x[:0])
    assert empty.shape == (0, 3) and none.shape == (0,) and ToTasks(2)(empty)[1].shape == (0, 3)
    for error, message, call in (
        (ValueError, "tasks: expected at least 1, got 0", lambda: EachTask(0)),
        (TypeError, r"x: expected a tensor \[B, ...\], got int", lambda: EachTask(2)(3)),  # type: ignore[arg-type]
        (ValueError, r"x: expected \[B, ...\], got \[\]", lambda: EachTask(2)(x[0, 0])),
        (
            ValueError,
            r"x: expected as many samples of each of 3 tasks, \[3 B, ...\], got \[4, 3\]",
            lambda: ToTasks(3)(x),
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_of_task() -> None:
    ys, task = [torch.randn(4, 2, 3) for _ in range(3)], torch.tensor([2, 0, 1, 2])
    expected = torch.stack([ys[t][b] for b, t in enumerate(task)])
    for given in (ys, [tuple(ys)], [dict(zip("abc", ys, strict=True))]):
        assert torch.equal(OfTask()(*given, task), expected)
    assert torch.equal(OfTask()(*ys, task.int()), expected)
    assert OfTask()(*[y[:0] for y in ys], task[:0]).shape == (0, 2, 3)
    for error, message, given in (
        (TypeError, "expected tasks' outputs and task ids as anchors, got 1 of them", [ys[0]]),
        (TypeError, r"outputs\[1\]: expected a tensor \[B, ...\], got int", [ys[0], 3, task]),
        (ValueError, r"outputs\[1\]: expected \[B, ...\] like outputs\[0\], \[4, 2, 3\], got \[4, 2\]",
         [ys[0], ys[1][..., 0], task]),
        (TypeError, r"task: expected integers \[B\], got torch.float32", [*ys, task.float()]),
        (ValueError, r"task: expected one per sample, \[4\], got \[3\]", [*ys, task[:3]]),
        (IndexError, "task: expected tasks from 0 to 2, got 1 to 3", [*ys, task + 1]),
        (IndexError, "task: expected tasks from 0 to 2, got -1 to 1", [*ys, task - 1]),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            OfTask()(*given)


def test_per_sample_tasks_through_shared_experts() -> None:
    """One batch of mixed tasks: each sample has the output of its own task's gate and head."""
    seeds.manual_seed(0)
    model = MTLModel(
        [
            *INPUTS,
            node("mix", MMoE(F, 4, TASKS, **SIZES), "x"),
            node("own", OfTask(), "mix", "task"),
            node("both", Concat(1), "own", "x"),
            node("y", nn.Linear(2 * F, 2), "both"),
        ],
        ["y"],
    ).double()  # fmt: skip
    given = batch()
    (y,), _, _ = model(given)
    for b, t in enumerate(given["task"]):
        mixed = model.mix(given["x"][b])[TASKS[t]]
        assert_same(y[b].detach(), model.y(torch.cat([mixed, given["x"][b]])).detach())
