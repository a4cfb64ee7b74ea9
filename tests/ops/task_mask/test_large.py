"""``task_mask`` where a tensor is larger than the caches, so that C++ writes it otherwise; and short planes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastroute import functional, use_backend
from fastroute.ops.task_mask import reference as reference
from tests.helpers import seeds
from tests.helpers.backends import needs_native
from tests.helpers.layouts import Fenced

pytestmark = needs_native

T = 3
#: 3 x 7 planes of 41 MiB together. No plane but the first begins at a cache line; a window has rows alone.
LARGE = (3, 7, 731, 701)


def mapping_of(C: int) -> Tensor:
    return (torch.rand(T, C, generator=seeds.generator(1)) < 0.5).float()


def checked(x: Tensor, fence: Fenced, relu: bool, task: int | Tensor) -> None:
    mapping = mapping_of(x.shape[1])
    expected = reference.task_mask(x, mapping, task, relu)
    with use_backend("native"):
        assert functional.task_mask(x, mapping, task, relu=relu, inplace=True) is x
    assert torch.equal(x, expected) and fence.intact()


@pytest.mark.parametrize("relu", [False, True], ids=["mask", "relu"])
@pytest.mark.parametrize("threads", [1, 2])
def test_in_place(relu: bool, threads: int) -> None:
    fence = Fenced(torch.rand(LARGE) - 0.5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        checked(fence.tensor, fence, relu, torch.tensor([2, 0, 2]))
        fence.tensor.copy_(torch.rand(LARGE))
        checked(fence.tensor[..., 3:], fence, relu, 1)
    finally:
        torch.set_num_threads(before)


def test_out_of_place() -> None:
    """What is new is on huge pages."""
    x = (torch.rand(LARGE) - 0.5).requires_grad_()
    mapping = mapping_of(x.shape[1])
    with use_backend("native"):
        y = functional.task_mask(x, mapping, 1, relu=True)
        y.backward(torch.ones(1).expand(LARGE))
    assert torch.equal(y, reference.task_mask(x.detach(), mapping, 1, True))
    assert x.grad is not None and torch.equal(x.grad, (y > 0).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 7, 15, 16, 17, 31, 33, 64, 100, 1023, 1025, 3000])
def test_planes_of_any_length(size: int, dtype: torch.dtype) -> None:
    """Zeroed in lines of the cache, the last one perhaps twice; the next one is fetched, also where there is none."""
    for C in (1, 2, 9):
        fence = Fenced((torch.rand(5, C, size) - 0.5).to(dtype))
        checked(fence.tensor, fence, False, torch.tensor([0, 0, 2, 1, 1]))
        fence.tensor.fill_(2)
        checked(fence.tensor[1:4, :, 1:], fence, False, 2)
