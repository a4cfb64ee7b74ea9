"""TaskRouting's import paths: its numbers, its gradient, its tensors written in place, its checkpoints, its script."""

from __future__ import annotations

import copy
import doctest
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastroute import extract_task, fold, live, set_task, tasks
from fastroute.compat import taskrouting
from fastroute.compat.taskrouting import routed_vgg
from fastroute.compat.taskrouting.taskrouting import TaskRouter
from tests.helpers import golden
from tests.helpers.budget import Yardstick
from tests.helpers.tasks import T, from_file, images, load, masked, small_vgg, step, tasks_of

LAYERS = load("tr_layer.pt")["cases"]


def test_the_tree() -> None:
    for path, names in (("taskrouting", ["TaskRouter"]), ("routed_vgg", ["VGG", "vgg11", "vgg11_bn"])):
        module = importlib.import_module(f"fastroute.compat.taskrouting.{path}")
        assert sorted(module.__all__) == names and all(hasattr(module, name) for name in names)
    beside = importlib.import_module("fastroute.compat.routed_vgg")
    assert all(getattr(beside, name) is getattr(routed_vgg, name) for name in beside.__all__)
    assert taskrouting.TaskRouter is TaskRouter and issubclass(TaskRouter, tasks.TaskRouter)
    assert routed_vgg.cfg["A"] == [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]


def test_the_example() -> None:
    assert doctest.testmod(taskrouting).failed == 0


@pytest.mark.parametrize("g", LAYERS, ids=lambda g: f"{g['unit_count']}x{g['task_count']}-{g['sigma']}")
def test_the_layer(g: dict[str, Any]) -> None:
    """The caller's tensor is written to and returned; the gradient is the identity's."""
    np.random.seed(g["numpy_seed"])
    router = TaskRouter(g["unit_count"], g["task_count"], g["sigma"])
    assert torch.equal(router.get_unit_mapping(), g["mapping"])
    assert ("_unit_mapping" in router.state_dict()) == g["in_state_dict"] == (len(list(router.parameters())) == 1)
    for known in g["tasks"]:
        assert router.set_active_task(known["task"]) == known["task"]
        x = g["x"].clone().requires_grad_()
        y = router(x)
        assert y is x and torch.equal(x, known["out"])
        y.backward(g["g"])
        assert torch.equal(x.grad, known["grad_upstream"])  # type: ignore[arg-type]
        x = g["x"].clone().requires_grad_()
        y = router(x * 1).relu_()
        assert torch.equal(y, known["out_relu"])
        y.backward(g["g"])
        assert torch.equal(x.grad, known["grad_relu"])  # type: ignore[arg-type]
    known = g["per_sample"]
    router.set_active_task(known["ids"])
    assert torch.equal(router(g["x"].clone()), known["out"])


@pytest.mark.parametrize(("sigma", "off"), [(-1, 7), (-3, 5), (-8, 0), (-11, 0), (20, 8)])
def test_sigma_as_a_slice(sigma: int, off: int) -> None:
    np.random.seed(1)
    drawn = np.random.rand(4, 8)
    expected = np.ones((4, 8))
    for row, order in zip(expected, drawn.argsort(1), strict=True):
        row[order[:sigma]] = 0
    np.random.seed(1)
    router = TaskRouter(8, 4, sigma)
    assert (router.get_unit_mapping().detach().numpy() == expected).all()
    assert ((router.get_unit_mapping() == 0).sum(1) == off).all() and isinstance(router._unit_mapping, nn.Parameter)
    follows = np.random.rand()
    np.random.seed(1)
    assert np.random.rand(33)[-1] == follows


def test_sigma_is_an_int() -> None:
    with pytest.raises(TypeError, match=r"sigma: expected an int, got 0\.5"):
        TaskRouter(8, 4, 0.5)  # type: ignore[arg-type]


def test_sigma_zero(capsys: pytest.CaptureFixture[str]) -> None:
    router = TaskRouter(8, 4, 0)
    assert router.use_knockout is False and router.use_routing and capsys.readouterr().out == ""
    x = torch.randn(2, 8, 1, 1)
    assert torch.equal(router(x.clone()), x) and not router.state_dict()


def test_tasks_are_looked_at_in_forward() -> None:
    router, x = TaskRouter(8, T, 3), torch.randn(2, 8, 1, 1)
    for task in (T, -1):
        assert router.set_active_task(task) == task
        with pytest.raises(IndexError, match=f"task: expected a task from 0 to {T - 1}, got {task}"):
            router(x)
    mapping = router.get_unit_mapping().detach()
    for one in (torch.tensor([1]), torch.tensor([1.7]), torch.tensor([1], dtype=torch.uint8)):  # times ones(B)
        assert router.set_active_task(one) is one
        for B in (1, 2, 5):
            several = torch.randn(B, 8, 1, 1)
            assert torch.equal(router(several.clone()), masked(several, mapping, 1))
    for task in (1.7, torch.tensor(1), torch.tensor(1.7), np.int64(1), np.float64(1.2)):
        assert router.set_active_task(task) is task and router.active_task is task
        assert torch.equal(router(x.clone()), masked(x, mapping, 1))
    tasks_given = torch.tensor([2, 4])
    assert torch.equal(router(x.clone(), tasks_given), masked(x, mapping, tasks_given))
    router.use_routing = False
    assert router(x) is x
    other = copy.deepcopy(router).double()
    assert other.active_task == 1.2 and int(other._active_id) == 1


def test_behind_autograds_back() -> None:
    """A leaf is written to, what saved its output does not notice, and another consumer sees the masked values."""
    router = TaskRouter(8, T, 3)
    leaf = torch.randn(2, 8, 1, 1, requires_grad=True)
    assert router(leaf) is leaf and int((leaf == 0).sum()) == 6
    x = torch.randn(2, 8, 1, 1, requires_grad=True)
    y = x.exp()
    (router(y) + y).sum().backward()
    assert torch.equal(x.grad, 2 * y)  # type: ignore[arg-type]
    for bad in (torch.ones(2, 8, 1, 1, dtype=torch.int64), torch.ones(1, 8, 1, 1).expand(2, 8, 1, 1)):
        with pytest.raises((TypeError, ValueError), match="input: expected"):
            router(bad)


def test_checkpoints_and_optimizers_both_ways() -> None:
    """Parameters in upstream's order: an optimizer's state dict fits. Ours of fastroute.tasks load, too."""
    literal, ours = small_vgg(family=routed_vgg), small_vgg()
    names = [name for name, _ in literal.named_parameters()]
    assert names[:4] == ["features.0.weight", "features.0.bias", "features.1._unit_mapping", "features.4.weight"]
    assert all(p.requires_grad for p in literal.parameters())
    ours.load_state_dict(literal.state_dict(), strict=True)
    assert torch.equal(ours(images(), tasks_of(6)), literal(images(), tasks_of(6)))
    literal.load_state_dict(small_vgg(seed=1).state_dict(), strict=True)
    assert isinstance(literal.features[1]._unit_mapping, nn.Parameter)
    optimizer = torch.optim.AdamW(literal.parameters(), weight_decay=0.5)
    before = literal.features[1].get_unit_mapping().clone()
    step(literal, images(), torch.zeros(6, dtype=torch.int64), 1)
    optimizer.step()
    assert (
        torch.equal(literal.features[1].get_unit_mapping(), before) and literal.features[1]._unit_mapping.grad is None
    )


#: What may have become of masks, and of the router since: they are multiplied by, as upstream's.
DECAYED: dict[str, Callable[[TaskRouter], TaskRouter]] = {
    "an optimizer": lambda r: decay(r),
    "a checkpoint": lambda r: loaded(TaskRouter(8, T, 3), decay(r).state_dict()),
    "assigned": lambda r: loaded(TaskRouter(8, T, 3), decay(r).state_dict(), assign=True),
    "a new parameter": lambda r: renewed(r),
    "a copy": lambda r: copy.deepcopy(decay(r)),
    "moved": lambda r: decay(r).double().float(),
    "moved before": lambda r: decay(r.double().float()),
    "drawn again": lambda r: drawn(decay(r)),
    "zeros and ones": lambda r: r,
}


def decay(router: TaskRouter) -> TaskRouter:
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.5)
    router._unit_mapping.grad = torch.zeros_like(router._unit_mapping)
    optimizer.step()
    assert set(router.get_unit_mapping().unique().tolist()) == {0.0, torch.tensor(0.95).item()}
    return router


def loaded(router: TaskRouter, state: dict[str, Any], **options: bool) -> TaskRouter:
    router.load_state_dict(state, **options)
    return router


def renewed(router: TaskRouter) -> TaskRouter:
    router._unit_mapping = nn.Parameter(router._unit_mapping.detach() * 2)
    return router


def drawn(router: TaskRouter) -> TaskRouter:
    router.reset_parameters()
    return router


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("what", DECAYED)
def test_masks_of_other_numbers(what: str, compiled: bool) -> None:
    """As upstream multiplies by them, whatever they are; a checkpoint that has them is loaded strictly."""
    router, x = TaskRouter(8, T, 3), torch.randn(4, 8, 2, 2)
    router(x.clone())
    router = DECAYED[what](router)
    run = torch.compile(router, fullgraph=True, backend="eager") if compiled else router
    mapping = router.get_unit_mapping().detach()
    for task in (2, torch.tensor(1), torch.tensor([0, 2, 2, 1], dtype=torch.int32)):
        rows = mapping[torch.as_tensor(task).reshape(-1).long()][:, :, None, None]
        for given in (x, x.bfloat16()):
            leaf = given.clone().requires_grad_()
            y = run(leaf, task)
            y.sum().backward()
            assert torch.equal(y.detach(), (given * rows).to(given.dtype)) and bool((leaf.grad == 1).all())  # type: ignore[union-attr]


#: What users make of the masks of a router of sigma 0, and what they are then.
OF_SIGMA_0: dict[str, Callable[[TaskRouter, Tensor], Any]] = {
    "written to": lambda router, masks: router._unit_mapping.copy_(masks),
    "multiplied": lambda router, masks: router._unit_mapping.mul_(masks),
    "replaced": lambda router, masks: setattr(router, "_unit_mapping", masks),
    "a parameter": lambda router, masks: (delattr(router, "_unit_mapping"), setattr(router, "_unit_mapping", masks)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("what", OF_SIGMA_0)
def test_masks_of_a_router_of_sigma_zero(what: str, compiled: bool) -> None:
    """Multiply, as any router's, zeros and ones as well as others."""
    for masks in (torch.rand(T, 8), (torch.rand(T, 8) > 0.5).float(), torch.full((T, 8), 0.5)):
        router, x = TaskRouter(8, T, 0), torch.randn(4, 8, 2, 2)
        router(x.clone())
        OF_SIGMA_0[what](router, masks.clone())
        assert torch.equal(router.get_unit_mapping(), masks)
        torch._dynamo.reset()
        run = torch.compile(router, fullgraph=True, backend="eager") if compiled else router
        for task in (2, torch.tensor([0, 2, 2, 1])):
            rows = masks[torch.as_tensor(task).reshape(-1)][:, :, None, None]
            torch.testing.assert_close(run(x.clone(), task), x * rows, rtol=0, atol=0)
            torch.testing.assert_close(copy.deepcopy(router)(x.clone(), task), x * rows, rtol=0, atol=0)
        assert not router.state_dict()


@pytest.mark.parametrize("what", DECAYED)
@pytest.mark.parametrize("alone", [fold, extract_task])
def test_other_masks_are_not_folded(what: str, alone: Callable[..., nn.Module]) -> None:
    """What can only zero units says so; zeros and ones are folded as ever."""
    router = TaskRouter(8, T, 3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), router, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(alone(net, 0)(x), net(x))
    net[1] = router = DECAYED[what](router)
    masks = router.get_unit_mapping()
    if bool(((masks == 0) | (masks == 1)).all()):
        torch.testing.assert_close(alone(net, 0)(x), net(x))
        return
    message = "1: expected a router that masks and does nothing else, got a TaskRouter: masks of other numbers than 0 "
    with pytest.raises(ValueError, match=message):
        alone(net, 0)


def test_masks_that_are_no_numbers() -> None:
    for bad in (torch.nan, torch.inf):
        with pytest.raises(RuntimeError, match="_unit_mapping: expected masks of zeros and ones"):
            TaskRouter(8, T, 3).load_state_dict({"_unit_mapping": torch.full((T, 8), bad)})


@pytest.mark.parametrize("file", golden.names("tasks", "tr_vgg11_masks*"))
def test_masks_of_vgg11(file: str) -> None:
    """Of vgg11_bn, too, which is the same."""
    g = load(file)
    for make in (routed_vgg.vgg11, routed_vgg.vgg11_bn):
        np.random.seed(g["numpy_seed"])
        model = make(False, g["task_count"], g["sigma"], init_weights=False)
        assert list(model.state_dict()) == g["keys"] and type(model) is routed_vgg.VGG
        for path, mask in g["masks"].items():
            assert torch.equal(model.get_submodule(path).get_unit_mapping(), mask.float())  # type: ignore[operator]


@pytest.mark.parametrize("file", ["tr_small_vgg.pt", "tr_small_vgg_bn.pt"])
def test_a_routed_network(file: str) -> None:
    """Upstream's numbers, and ours, within budget."""
    g, model = from_file(file, routed_vgg)
    exact = copy.deepcopy(model).double()
    for known in g["tasks"]:

        def run(model: nn.Module, task: int = known["task"]) -> dict[str, Tensor | None]:
            return step(copy.deepcopy(model), g["x"], g["y"], task)

        yardstick = Yardstick(lambda run=run: run(exact), torch.float32)  # type: ignore[misc]
        theirs = {"out_train": known["out_train"], "loss": torch.as_tensor(known["loss"]), **known["grads"]}
        assert {k for k, t in yardstick.exact.items() if t is not None} == theirs.keys()
        yardstick.check(theirs, "upstream's")
        yardstick.check(run(model))


def test_one_task_of_a_network() -> None:
    """``extract_task`` and ``fold`` take a router that masks and does nothing else; ``live`` says why it does not."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), TaskRouter(8, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 6), TaskRouter(6, 3, 2),
        nn.ReLU(), nn.Linear(6, 4),
    ).eval()  # fmt: skip
    inputs = torch.randn(2, 3, 8, 8)
    for task in range(3):
        set_task(model, task)
        expected = model(inputs.clone())
        for alone in (extract_task(model, task), fold(model, task)):
            assert not any(isinstance(m, TaskRouter) for m in alone.modules())
            torch.testing.assert_close(alone(inputs), expected)
    with pytest.raises(
        ValueError, match=r"got none in Sequential but those of fastroute\.compat\.taskrouting\.taskrouting, with"
    ):
        live(model)


def test_the_script() -> None:
    """Upstream's README: a function that switches the task, applied to the model; one task per batch."""
    np.random.seed(0)
    model = small_vgg(family=routed_vgg)

    def change_task(m: Any) -> None:
        if hasattr(m, "active_task"):
            m.set_active_task(active_task)

    x, y = images(), torch.tensor([0, 1, 1, 0, 1, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for k in range(5 * T):
        active_task = k % T
        assert model.apply(change_task) is model
        assert {m.active_task for m in model.modules() if hasattr(m, "active_task")} == {active_task}
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-T:]) < sum(losses[:T])
    model.set_active_task(1)  # of the heads alone, as upstream's
    assert model.active_task == 1 and model.features[1].active_task == active_task == T - 1
    set_task(model, 2)
    assert model.active_task == model.features[1].active_task == 2
