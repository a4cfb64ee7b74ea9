"""Every wrong argument raises before any work, and the message names it, what was expected and what came."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastroute
from fastroute.tasks import VGG, TaskRouter, live, on_task, set_task, vgg, vgg11, vgg11_bn
from tests.helpers.tasks import images, router, small_vgg

CONSTRUCTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sigma": -1}, ValueError, "sigma: expected 0 or more units off, got -1"),
    ({"sigma": -0.1}, ValueError, "sigma: expected a fraction of units off from 0.0 to 1.0, got -0.1"),
    ({"sigma": 1.5}, ValueError, "sigma: expected a fraction .*got 1.5"),
    ({"sigma": float("nan")}, ValueError, "sigma: expected a fraction .*got nan"),
    ({"sigma": "0.5"}, TypeError, r"sigma: expected an int \(units off\) or a float .*got '0.5'"),
    ({"sigma": True}, TypeError, "sigma: expected an int .*got True"),
    ({"sigma": None}, TypeError, "sigma: expected an int .*got None"),
    ({"unit_count": 0}, ValueError, "unit_count: expected at least 1, got 0"),
    ({"unit_count": 8.0}, TypeError, "unit_count: expected an int, got 8.0"),
    ({"task_count": 0}, ValueError, "task_count: expected at least 1, got 0"),
    ({"task_count": "4"}, TypeError, "task_count: expected an int, got '4'"),
    ({"dtype": torch.int32}, TypeError, "dtype: expected a floating-point dtype, got torch.int32"),
    ({"sigma": 7, "no_orphans": True}, ValueError, r"no_orphans: .*all 8 units, got 5 places \(5 tasks of 1 units\)"),
    ({"sigma": 9, "no_orphans": True}, ValueError, r"no_orphans: .*got 0 places \(5 tasks of 0 units\)"),
]


@pytest.mark.parametrize(("options", "error", "message"), CONSTRUCTION, ids=[str(c[0]) for c in CONSTRUCTION])
def test_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskRouter(**{"unit_count": 8, "task_count": 5, "sigma": 3, **options})


TASKS: list[tuple[Any, type[Exception], str]] = [
    (5, IndexError, "task: expected a task from 0 to 4, got 5"),
    (-1, IndexError, "task: expected a task from 0 to 4, got -1"),
    (1.5, TypeError, "task: expected an int or an integer tensor, 0-d or .B. .one per sample., got 1.5"),
    ("a", TypeError, "task: expected an int .*got 'a'"),
    ([0, 1, 2, 3], TypeError, r"task: expected an int .*got \[0, 1, 2, 3\]"),
    (True, TypeError, "task: expected an int .*got True"),
    (torch.tensor(1.0), TypeError, "task: expected an int or an integer tensor, 0-d or .B., got torch.float32"),
    (torch.tensor([True] * 4), TypeError, "task: .*got torch.bool"),
    (torch.tensor([[0]] * 4), ValueError, r"task: .*got \[4, 1\]"),
]
ELSEWHERE: list[tuple[Any, type[Exception], str]] = [
    (torch.tensor(5), IndexError, "task: expected a task from 0 to 4, got 5"),
    (torch.tensor([0, 9, -1, 5]), IndexError, "task: expected tasks from 0 to 4, got 3 of 4 out of range"),
    (torch.tensor([0, 1, 2]), ValueError, r"task: expected .*one task per sample, shape \[4\], got \[3\]"),
    (torch.zeros(4, dtype=torch.int64, device="meta"), ValueError, "task: expected a tensor on cpu like x, got .*meta"),
    (torch.zeros((), dtype=torch.int64, device="meta"), ValueError, "task: expected a tensor on cpu like x"),
]


@pytest.mark.parametrize(("task", "error", "message"), TASKS + ELSEWHERE, ids=lambda v: str(v)[:30])
@pytest.mark.parametrize("inplace", [False, True])
def test_tasks(task: Any, error: type[Exception], message: str, inplace: bool) -> None:
    layer, x = router(inplace=inplace), torch.randn(4, 8)
    kept = x.clone()
    with pytest.raises(error, match=message):
        layer(x, task)
    with pytest.raises(error, match=message):
        small_vgg()(images(4), task)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("task", "error", "message"), TASKS, ids=lambda v: str(v)[:30])
def test_active_tasks(task: Any, error: type[Exception], message: str) -> None:
    """All parts of a model then keep the task they had."""
    model = small_vgg()
    set_task(model, 2)
    with pytest.raises(error, match=f"active_{message}"):
        router().set_active_task(task)
    with pytest.raises(error, match=f"active_{message}"):
        model.set_active_task(task)
    with pytest.raises(error, match=message):
        set_task(model, task)
    with pytest.raises(error, match=message):
        set_task(nn.ModuleList([router(tasks=100), model]), task)
    assert {m.active_task for m in model.modules() if hasattr(m, "active_task")} == {2}


class _OfThree(nn.Module):
    """A part with a way of its own to be set to a task."""

    active_task: Any = 0

    def set_active_task(self, active_task: Any) -> None:
        if active_task > 2:
            raise IndexError("active_task: three")
        self.active_task = active_task

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("last", [partial(router, tasks=4), _OfThree], ids=["router", "own"])
@pytest.mark.parametrize("set_it", [set_task, lambda m, task: m.set_active_task(task)], ids=["set_task", "method"])
@pytest.mark.parametrize("is_live", [False, True])
def test_a_task_that_one_part_refuses_is_none_of_the_others(last: Any, set_it: Any, is_live: bool) -> None:
    features = nn.Sequential(nn.Conv2d(3, 8, 1), router(tasks=6), nn.ReLU(), last())
    model = VGG(features, task_count=6, bottleneck_spatial=(1, 1))
    model = live(model) if is_live else model
    set_it(model, 2)
    with pytest.raises(IndexError, match="task: "):
        set_it(model, 4)
    assert [m.active_task for m in model.modules() if hasattr(m, "active_task")] == [2] * (3 + is_live)


class _Told(TaskRouter):
    """A router that keeps what it is set to, and refuses task 4."""

    def __init__(self) -> None:
        super().__init__(8, 5, 0.5)
        self.told: list[Any] = []

    def set_active_task(self, active_task: Any) -> Any:
        self.told.append(active_task)
        if active_task == 4:
            raise ValueError("four")
        return super().set_active_task(active_task)


@pytest.mark.parametrize("of_class", [True, False], ids=["class", "instance"])
@pytest.mark.parametrize("is_live", [False, True])
def test_a_set_active_task_of_ones_own_is_called(of_class: bool, is_live: bool) -> None:
    mine = _Told()
    layer: TaskRouter = mine if of_class else router()
    if not of_class:
        layer.set_active_task = lambda task: mine.told.append(task) or TaskRouter.set_active_task(layer, task)  # type: ignore
    model: nn.Module = nn.Sequential(nn.Linear(8, 8), layer, nn.ReLU(), router())
    model = live(model) if is_live else model
    set_task(model, 2)
    assert (mine.told, layer.active_task) == ([2], 2)
    with on_task(model, 1):
        assert (mine.told, layer.active_task) == ([2, 1], 1)
    assert (mine.told, layer.active_task) == ([2, 1, 2], 2)
    if of_class:
        with pytest.raises(ValueError, match="four"):
            set_task(model, 4)
        with pytest.raises(ValueError, match="four"), on_task(model, 4):
            pass
    assert [m.active_task for m in model.modules() if isinstance(m, TaskRouter)] == [2, 2]


def test_an_active_task_that_does_not_fit_the_batch() -> None:
    layer = router()
    layer.set_active_task(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"task: expected .*one task per sample, shape \[4\], got \[3\]"):
        layer(torch.randn(4, 8))
    layer.set_active_task(torch.tensor([0, 1, 2, 7]))
    with pytest.raises(IndexError, match="task: expected tasks from 0 to 4, got 1 of 4 out of range"):
        layer(torch.randn(4, 8))


def test_set_task_without_routers() -> None:
    with pytest.raises(ValueError, match="model: expected a module with task routers in it, found none in Linear"):
        set_task(nn.Linear(2, 2), 0)


XS: list[tuple[Any, type[Exception], str]] = [
    (torch.randn(4, 7), ValueError, r"x: expected \[B, 8, ...\] \(unit_count units\), got \[4, 7\]"),
    (torch.randn(4, 7, 2, 2), ValueError, r"x: expected \[B, 8, ...\] .*got \[4, 7, 2, 2\]"),
    (torch.randn(8), ValueError, r"x: expected \[B, 8, ...\] .*got \[8\]"),
    (torch.randn(()), ValueError, r"x: expected \[B, 8, ...\] .*got \[\]"),
    (torch.ones(4, 8, dtype=torch.int64), TypeError, "x: expected a floating-point tensor, got torch.int64"),
    ([[1.0] * 8], TypeError, "x: expected a floating-point tensor .*got list"),
    (torch.randn(4, 8, device="meta"), ValueError, "mapping: expected a tensor on meta like x, got one on cpu"),
]


@pytest.mark.parametrize(("x", "error", "message"), XS, ids=[m[-30:] for *_, m in XS])
def test_x(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        router()(x, 1)


def test_in_place_into_shared_memory() -> None:
    with pytest.raises(ValueError, match="x: expected memory of its own"):
        router(inplace=True)(torch.randn(1, 8).expand(4, 8))


MODELS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"task_count": 0}, ValueError, "task_count: expected at least 1, got 0"),
    ({"sigma": 2}, ValueError, "sigma: expected a fraction of units off from 0.0 to 1.0, got 2.0"),
    ({"sigma": -0.5}, ValueError, "sigma: expected a fraction .*got -0.5"),
    ({"bottleneck_spatial": 7}, ValueError, r"bottleneck_spatial: expected \[height, width\], got 7"),
    ({"bottleneck_spatial": [7]}, ValueError, r"bottleneck_spatial: expected \[height, width\], got \[7\]"),
    ({"bottleneck_spatial": [7, 0]}, ValueError, "bottleneck_spatial: expected at least 1, got 0"),
    ({"active_task": 10}, IndexError, "active_task: expected a task from 0 to 9, got 10"),
    ({"unused_grad": "None"}, ValueError, "unused_grad: expected 'none' or 'zeros', got 'None'"),
    ({"num_classes": 2}, TypeError, "num_classes"),
]


@pytest.mark.parametrize(("options", "error", "message"), MODELS, ids=[str(c[0]) for c in MODELS])
def test_models(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vgg11_bn(**{"device": "meta", **options})


def test_features() -> None:
    with pytest.raises(ValueError, match=r"features: expected a module with an nn.Conv2d in it, got none"):
        VGG(nn.Flatten())
    for layers, message in (([8, "m"], "\"M\", got 'm' at 1"), ([8, 0], "cfg: expected at least 1, got 0")):
        with pytest.raises(ValueError, match=f"cfg: .*{message}" if "at 1" in message else message):
            vgg.make_layers(layers, 4, 0.5)  # type: ignore[arg-type]

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.router = nn.Conv2d(3, 8, 1), router()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.router(self.conv(x))  # type: ignore[no-any-return]

    model = VGG(Own(), 5)
    with pytest.raises(
        TypeError, match=r"task: expected routers in nn.Sequentials, .*inside a Own; set the task before"
    ):
        model(images(), 3)
    model.set_active_task(3)
    assert model(images()).shape == (6, 2)


def test_heads() -> None:
    model = small_vgg()
    model.classifier_2 = nn.Sequential(nn.Dropout(), nn.Linear(48, 2))
    assert model(images(), 2).shape == (6, 2)
    tasks = [0, 1, 2, 0, 1, 2]
    model.eval()
    expected = torch.cat([model(x[None], t) for x, t in zip(images(), tasks, strict=True)])
    torch.testing.assert_close(model(images(), torch.tensor(tasks)), expected)


# -------------------------------------------------------------------------------------------------------- pretrained


def test_pretrained_is_a_file(tmp_path: Path) -> None:
    for given in (True, 1, 3.0):
        with pytest.raises(ValueError, match=r"pretrained: .*vgg11 \(nothing is downloaded\), got (True|1|3.0)"):
            vgg11(given)  # type: ignore[arg-type]
    missing = tmp_path / "vgg11.pth"
    with pytest.raises(FileNotFoundError, match=f"pretrained: expected the file of .*vgg11_bn, found no {missing}"):
        vgg11_bn(str(missing))
    with pytest.raises(FileNotFoundError, match="pretrained"):
        vgg11(tmp_path)
    missing.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"pretrained: expected a state dict .*cannot read"):
        vgg11(missing)


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pretrained_with_something_else_in_it(tmp_path: Path) -> None:
    path, touched = tmp_path / "file.pth", tmp_path / "touched"
    key = "features.0.weight"
    cases: list[tuple[Any, str]] = [
        ({key: Touches(touched)}, "cannot read"),
        ([torch.ones(1)], "expected a state dict of tensors in .*got list"),
        ({key: 3}, "expected a state dict of tensors"),
        ({}, r"one with 16 of its keys missing \['features.0.bias', .*and 0 others"),
        ({key: torch.ones(1), "head.weight": torch.ones(1)}, r"15 of its keys missing .*1 others \['head.weight'\]"),
    ]
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"pretrained: .*{message}"):
            vgg11(path, device="meta")
    assert not touched.exists()


def test_strict_is_for_devices_that_wait() -> None:
    """On a CPU values are looked at in any case."""
    with fastroute.strict(False), pytest.raises(IndexError, match="out of range"):
        router()(torch.randn(2, 8), torch.tensor([0, 5]))


@pytest.mark.parametrize("task", [1, torch.tensor([0, 2])])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_inputs_of_another_dtype_than_the_parameters(task: Any, dtype: torch.dtype) -> None:
    conv = fastroute.RoutedConv2d(3, 8, 3, output_router=TaskRouter(8, 4, 3))
    linear = fastroute.RoutedLinear(3, 8, output_router=TaskRouter(8, 4, 3))
    model = fastroute.live(fastroute.route(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), 4, 0.5))
    for layer, x in ((conv, torch.ones(2, 3, 4, 4)), (model, torch.ones(2, 3, 4, 4)), (linear, torch.ones(2, 3))):
        assert layer(x, task).dtype == torch.float32
        with pytest.raises(TypeError, match=rf"x: expected torch.float32 on cpu like the parameters, .* of {dtype}"):
            layer(x.to(dtype), task)
