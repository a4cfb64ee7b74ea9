"""Task routing on a GPU: the CPU's numbers, no synchronisation, a CUDA graph in which the task is an input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastroute
from fastroute.tasks import set_task
from tests.helpers.budget import assert_within_budget
from tests.helpers.opcheck import assert_same
from tests.helpers.tasks import T, images, masked, router, small_vgg, tasks_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_router(dtype: torch.dtype, inplace: bool) -> None:
    layer = router(inplace=inplace).to(GPU)
    leaf = torch.randn(6, 8, 5, 3, device=GPU, dtype=dtype, requires_grad=True)
    for task in (2, torch.tensor(3, device=GPU), tasks_of(6).to(GPU)):
        y = layer(leaf * 1, task)
        assert torch.equal(y, masked(leaf, layer.get_unit_mapping(), task))
        (dx,) = torch.autograd.grad(y.sum(), leaf)
        assert torch.equal(dx, masked(torch.ones_like(leaf), layer.get_unit_mapping(), task))


def test_tasks_out_of_range_are_zero_rows() -> None:
    layer, x = router().to(GPU), torch.randn(4, 8, device=GPU)
    tasks = torch.tensor([0, T, -1, 2], device=GPU)
    y = layer(x, tasks)
    assert (y[1:3] == 0).all() and torch.equal(y[3], masked(x, layer.get_unit_mapping(), 2)[3])
    with fastroute.strict(), pytest.raises(IndexError, match="2 of 4 out of range"):
        layer(x, tasks)
    with pytest.raises(ValueError, match="task: expected a tensor on cuda"):
        layer(x, tasks.cpu())


def step(model: Any, x: torch.Tensor, task: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    y = model(x, task)
    y.square().sum().backward()
    zero = torch.zeros(())
    return {"y": y.detach(), **{k: zero if p.grad is None else p.grad for k, p in model.named_parameters()}}


@pytest.mark.parametrize("batch_norm", [False, True])
def test_agrees_with_float64(batch_norm: bool) -> None:
    model = small_vgg(batch_norm)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for task in (1, tasks_of(6)):
            on_gpu = task if isinstance(task, int) else task.to(GPU)
            found = step(copy.deepcopy(model).to(GPU), images().to(GPU), on_gpu)
            assert_within_budget(
                {k: t.cpu() for k, t in found.items()},
                lambda task=task: step(copy.deepcopy(model).double(), images().double(), task),  # type: ignore[misc]
                torch.float32,
            )
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_waits_for_nothing() -> None:
    """Nor does a switch of tasks, whether to a number or to tasks that are on the GPU."""
    model, x, tasks = small_vgg(True).to(GPU), images().to(GPU), tasks_of(6).to(GPU)
    given: tuple[Any, ...] = (3, tasks, torch.tensor(1, device=GPU))
    for synchronise in ("default", "error"):  # the first round compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(synchronise)
        try:
            for task in given:
                set_task(model, task)
                model(x).sum().backward()
                model(x, task).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_moves() -> None:
    model, x = small_vgg().double().requires_grad_(False), images().double()
    set_task(model, 3)
    expected = model(x)
    moved = copy.deepcopy(model).to(GPU)
    assert moved.active_task == 3 and moved._active_id.is_cuda and moved.features[1]._active_id.is_cuda
    assert_same(moved(x.to(GPU)).cpu(), expected)
    assert torch.equal(moved.to("cpu")(x), expected)


def test_a_cuda_graph() -> None:
    """The task of a replay is what is in its tensor then."""
    layer, x, task = router().to(GPU), torch.randn(6, 8, 4, device=GPU), torch.zeros(6, dtype=torch.int64, device=GPU)
    layer(x, task)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, task)
    for seed in range(3):
        task.copy_(tasks_of(6, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, masked(x, layer.get_unit_mapping(), task))
