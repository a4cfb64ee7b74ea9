"""torch.jit.trace of every family: two traces are the same, the graph takes other batches, learns and is saved."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastroute
from fastroute import functional
from tests.helpers import seeds
from tests.helpers.backends import needs_native
from tests.helpers.subprocesses import check_python

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class Alone(nn.Module):
    """A layer of a network, between tensors."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, fastroute.networks.Trajectory(len(x)), torch.arange(len(x), device=x.device) % 3)[0]


ROUTER = fastroute.TaskRouter(4, 3, 0.5, inplace=True)
LEARNING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vectors": (lambda: fastroute.EfficientVectorRouting(6, 4, 5, 3), (6, 5)),
    "any vectors": (lambda: fastroute.EfficientVectorRouting(-1, 4, 5, 3), (6, 5)),
    "slots": (lambda: fastroute.SlotAttention(4, 5, 5), (6, 5)),
    "mixture": (lambda: fastroute.MoE(5, 8, 3, 2), (5,)),
    "router": (lambda: ROUTER, (4, 3)),
}
FROZEN = {
    "selection": (lambda: Alone(fastroute.Selection(*(nn.Linear(4, 2) for _ in range(3)))), (4,)),
    "decision": (lambda: Alone(fastroute.REINFORCE(3, 4, num_agents=3)), (4,)),
    "vgg": (lambda: fastroute.VGG(nn.Sequential(nn.Conv2d(3, 4, 1), ROUTER, nn.ReLU()), 3), (3, 8, 8)),
}


@pytest.mark.parametrize("name", [*LEARNING, *FROZEN])
def test_trace(name: str) -> None:
    make, shape = {**LEARNING, **FROZEN}[name]
    layer = make().eval().requires_grad_(name in LEARNING)
    traced = torch.jit.trace(layer, torch.randn(3, *shape))
    x = torch.randn(5, *shape) if name not in ("selection", "decision") else torch.randn(3, *shape)
    made = []
    for run in (traced, layer):
        seeds.fixed_seed(1)  # of slots
        made.append(run(x))
    torch.testing.assert_close(*made)
    torch.jit.save(traced, io.BytesIO())
    own = list(layer.parameters())
    if name in LEARNING and own:
        grads = [torch.autograd.grad(y.square().sum(), own) for y in made]
        torch.testing.assert_close(*grads)


def test_a_mask_in_place_of_what_learns() -> None:
    def f(x: Tensor) -> Tensor:
        return functional.task_mask(x * 1, torch.tensor([[1, 0, 1]]), 0, inplace=True)

    x = torch.randn(2, 3, requires_grad=True)
    traced = torch.jit.trace(f, x, check_trace=False)
    assert torch.equal(traced(2 * x), torch.stack([2 * x[:, 0], 0 * x[:, 1], 2 * x[:, 2]], 1))


@needs_native
@pytest.mark.long
def test_a_trace_may_be_the_first_call() -> None:
    """It loads the extension."""
    layer = "torch.jit.trace(fastroute.EfficientVectorRouting(4, 3, 6, 5), torch.zeros(2, 4, 6))"
    check_python(f"import torch, fastroute\nassert 'fastroute::_isa' not in str({layer}.graph)")
