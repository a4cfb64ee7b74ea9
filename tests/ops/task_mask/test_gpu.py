"""``task_mask`` on a GPU: real sizes, every backend, graph capture, no synchronisation, over 2**31 elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastroute
from fastroute import functional, use_backend
from fastroute.ops.backends import missing
from fastroute.ops.batch_norm_mask_relu import reference as batch_norm_mask_relu_reference
from fastroute.ops.task_mask import reference as reference
from tests.helpers import seeds
from tests.helpers.graphs import captured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BACKENDS = [b for b in ("triton", "native", "reference") if torch.cuda.is_available() and missing(b, "cuda") is None]  # type: ignore[arg-type]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_relu = pytest.mark.parametrize("relu", [False, True], ids=["mask", "relu"])
SHAPES = ((64, 256, 32, 32), (32, 512, 7, 7), (4096, 1024), (5, 33, 31), (70_000, 3, 5))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.empty_cache()


def problem(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the gradient of y, mapping, a task for every sample."""
    generator = seeds.generator(seed, "cuda")
    x, g = (torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(2))
    mapping = (torch.rand(20, shape[1], device="cuda", generator=generator) < 0.5).float()
    return x, g, mapping, torch.randint(20, shape[:1], device="cuda", generator=generator)


@each_backend
@each_relu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values(backend: str, relu: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, g, mapping, tasks = problem(shape, dtype)
    for last in (False, True):
        if last:
            x, g = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g))
        for task in (3, tasks):
            leaf, other = x.detach().requires_grad_(), x.detach().requires_grad_()
            with use_backend(backend):
                y = functional.task_mask(leaf, mapping, task, relu=relu)
                changed = functional.task_mask(x.clone(), mapping, task, relu=relu, inplace=True)
                y.backward(g)
            exact = reference.task_mask(other, mapping, task, relu)
            exact.backward(g)
            assert torch.equal(y, exact) and torch.equal(changed, exact) and torch.equal(leaf.grad, other.grad)  # type: ignore[arg-type]


def norm(x: Tensor, g: Tensor, mapping: Tensor, task: Any, fn: Callable[..., Tensor]) -> list[Tensor]:
    C = x.shape[1]
    acc = torch.promote_types(x.dtype, torch.float32)
    generator = seeds.generator(1, "cuda")
    weight, bias, mean, var = (torch.rand(C, device="cuda", generator=generator).to(acc) + 0.5 for _ in range(4))
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    y = fn(leaves[0], mapping, task, mean, var, *leaves[1:], True, 0.1, 1e-5)
    return [y.detach(), *torch.autograd.grad(y, leaves, g), mean, var]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(64, 256, 32, 32), (32, 512, 7, 7), (4096, 1024)], ids=lambda s: "x".join(map(str, s))
)
def test_batch_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Within twice plain PyTorch's error on the same GPU, and one rounding."""
    x, g, mapping, tasks = problem(shape, dtype)
    for last in (False, True):
        if last:
            x, g = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g))
        for task in (3, tasks):
            with use_backend("triton"):
                found = norm(x, g, mapping, task, functional.batch_norm_mask_relu)
            plain = norm(x, g, mapping, task, batch_norm_mask_relu_reference.batch_norm_mask_relu)
            exact = norm(x.double(), g.double(), mapping, task, batch_norm_mask_relu_reference.batch_norm_mask_relu)
            for mine, theirs, truth in zip(found, plain, exact, strict=True):
                eps = torch.finfo(mine.dtype).eps
                allowed = 2 * (theirs.double() - truth).norm() + eps * truth.norm()
                assert (mine.double() - truth).norm() <= allowed


@each_backend
@each_relu
def test_captures_in_a_graph_without_synchronising(backend: str, relu: bool) -> None:
    """One graph serves every task, which is written into its tensor."""
    x, g, mapping, tasks = problem((16, 32, 9, 9), torch.float32)

    def step() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = functional.task_mask(leaf * 1, mapping, tasks, relu=relu, inplace=True)
        return [y.detach(), *torch.autograd.grad(y, leaf, g)]

    with use_backend(backend):
        graph, found = captured(step)
        torch.cuda.set_sync_debug_mode("error")
        tasks.copy_(tasks.roll(1))
        graph.replay()
        expected = step()
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, expected))


def test_batch_norm_captures_and_repeats() -> None:
    x, g, mapping, tasks = problem((16, 32, 9, 9), torch.float32)
    running = [torch.zeros(32, device="cuda"), torch.ones(32, device="cuda")]
    parameters = [torch.ones(32, device="cuda", requires_grad=True), torch.zeros(32, device="cuda", requires_grad=True)]

    def step() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = functional.batch_norm_mask_relu(leaf, mapping, tasks, *running, *parameters, True, 0.1, 1e-5)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], g)]

    with use_backend("triton"):
        first = step()
        graph, found = captured(step)
        graph.replay()
    assert all(map(torch.equal, found, first))


@each_backend
def test_tasks_out_of_range(backend: str) -> None:
    """Zero samples; strict counts them and raises, and the context lives on."""
    x, _, mapping, _ = problem((4, 6, 5), torch.float32)
    tasks = torch.tensor([0, 20, -1, 2**40], device="cuda")
    with use_backend(backend):
        y = functional.task_mask(x, mapping, tasks)
        assert not y[1:].any() and torch.equal(y[:1], functional.task_mask(x[:1], mapping, 0))
        with fastroute.strict(True), pytest.raises(IndexError, match=r"^task: .*got 3 of 4 out of range"):
            functional.task_mask(x, mapping, tasks)
        with pytest.raises(ValueError, match=r"^task: expected a tensor on cuda"):
            functional.task_mask(x, mapping, tasks.cpu())


@each_backend
def test_more_than_2_31_elements(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB")
    x = torch.ones(3, 3, 2**28, dtype=torch.bfloat16, device="cuda")
    mapping = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], device="cuda")
    tasks = torch.tensor([0, 0, 1], device="cuda")
    with use_backend(backend):
        y = functional.task_mask(x, mapping, tasks, inplace=True)
    sums = torch.stack([row.float().mean() for row in y.flatten(0, 1)]).reshape(3, 3)
    assert torch.equal(sums, mapping[tasks])
