"""Networks that compute live channels only, seen by torch.compile, torch.export and vmap."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastroute.tasks import RoutedConv2d, live, set_task
from tests.helpers.opcheck import assert_same
from tests.helpers.tasks import T, images, router, small_vgg, tasks_of

MANY = 20
each_norm = pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])


def live_vgg(batch_norm: bool, tasks: int = T, **options: Any) -> nn.Module:
    model: nn.Module = live(small_vgg(batch_norm, tasks=tasks, **options).double())
    return model


@each_norm
@pytest.mark.long_after(1)
def test_twenty_tasks_train_as_one_graph(batch_norm: bool) -> None:
    """Logits and gradients are the eager ones."""
    model, x = live_vgg(batch_norm, MANY, unused_grad="zeros"), images().double()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run: Any = torch.compile(model, fullgraph=True, backend=counter)
    parameters = list(model.parameters())
    for task in range(MANY):
        set_task(model, task)
        y = run(x)
        grads = torch.autograd.grad(y.square().sum(), parameters)
        if task % 7 == 0:
            expected = model(x)
            assert_same(y.detach(), expected.detach())
            for got, want in zip(grads, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
                assert_same(got, want)
    assert counter.frame_count == 1


@each_norm
@pytest.mark.long_after(1)
def test_export(batch_norm: bool) -> None:
    """With the task as an input, one for all or one for each, saved and loaded; or the active task of the moment."""
    model, x = live_vgg(batch_norm).eval(), images().double()
    with torch.no_grad():
        for tasks in ([torch.tensor(t) for t in range(T)], [tasks_of(len(x), seed=seed) for seed in range(3)]):
            stored = io.BytesIO()
            torch.export.save(torch.export.export(model, (x, tasks[0])), stored)
            stored.seek(0)
            loaded = torch.export.load(stored).module()
            for task in tasks:
                assert_same(loaded(x, task), model(x, task))
        set_task(model, 3)
        assert_same(torch.export.export(model, (x,)).module()(x), model(x, 3))


@each_norm
def test_vmap_over_tasks(batch_norm: bool) -> None:
    """One task for every copy, and one for every sample of every copy; densely."""
    model, x = live_vgg(batch_norm).eval().requires_grad_(False), images().double()
    y = torch.vmap(lambda task: model(x, task))(torch.arange(T))
    each = torch.stack([tasks_of(len(x), seed=seed) for seed in range(3)])
    ys = torch.vmap(lambda task: model(x, task))(each)
    for task in range(T):
        assert_same(y[task], model(x, task))
    for n in range(3):
        assert_same(ys[n], model(x, each[n]))


def test_vmap_over_samples_of_one_task() -> None:
    model, x = live_vgg(False).eval().requires_grad_(False), images().double()
    set_task(model, 2)
    assert_same(torch.vmap(lambda one: model(one[None])[0])(x), model(x))


def test_gradients_of_all_tasks_by_vmap() -> None:
    model, x = live_vgg(False, unused_grad="zeros").eval(), images().double()
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], task: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, given, (x, task))
        return y.square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.arange(T))
    for task in range(T):
        set_task(model, task)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for name, want in zip(parameters, expected, strict=True):
            assert_same(found[name][task], want)


def test_vmap_over_tasks_of_a_layer() -> None:
    layer = RoutedConv2d(8, 12, 3, input_router=router(8), output_router=router(12, seed=1), dtype=torch.float64)
    layer.requires_grad_(False)
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    y = torch.vmap(lambda task: layer(x, task))(torch.arange(T))
    for task in range(T):
        assert_same(y[task], layer(x, task))
    ends = RoutedConv2d(8, 12, 3, input_router=router(8), output_router=router(12), compact_output=True)
    with pytest.raises(ValueError, match="compact_output"):
        torch.vmap(lambda task: ends(x.float(), task))(torch.arange(T))
