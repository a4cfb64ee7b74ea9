"""Experts, stitches and routing nodes on a GPU: the same numbers, no waiting for the device, steps in a CUDA graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute.multitask import CrossStitch
from tests.helpers.budget import assert_within_budget
from tests.multitask import test_experts, test_routing_nodes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

#: Routing networks and mixtures have GPU tests of their own (tests/networks).
NODES = [name for name in test_routing_nodes.MODELS if name not in ("routing network", "live", "MoE")]


def step(module: nn.Module, given: Any) -> list[Tensor]:
    """Outputs and gradients."""
    made = module(given)
    ys = test_routing_nodes.tensors(made[0] if isinstance(made, tuple) and isinstance(made[0], (list, tuple)) else made)
    leaves = list(module.parameters())
    grads = torch.autograd.grad([y.square().sum() for y in ys], leaves, allow_unused=True)
    return [*(y.detach() for y in ys), *(g for g in grads if g is not None)]


def case(name: str) -> tuple[nn.Module, Any]:
    if name == "stitch":
        stitch = CrossStitch(3)
        return nn.Sequential(_Columns(), stitch), test_experts.samples(40, dtype=torch.float32)
    if name in test_experts.MAKE:
        return test_experts.layer(name, dtype=torch.float32), test_experts.samples(40, dtype=torch.float32)
    given = test_routing_nodes.batch(40)
    return test_routing_nodes.model_of(name).float(), {**given, "x": given["x"].float()}


class _Columns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ModuleList(nn.Linear(test_experts.D, 5) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [column(x) for column in self.columns]


def moved(given: Any, to: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.to(to) if to == "cuda" or t.is_floating_point() else t, given)


each = pytest.mark.parametrize(
    "name", [*test_experts.MAKE, "stitch", *(n for n in NODES if n not in test_experts.MAKE)]
)


@each
def test_the_same_numbers_without_waiting(name: str) -> None:
    module, given = case(name)
    exact, given64 = copy.deepcopy(module).double(), moved(given, torch.float64)
    module, given = module.cuda(), moved(given, "cuda")
    step(module, given)  # libraries and kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(module, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_within_budget(
        {str(k): t.cpu() for k, t in enumerate(found)},
        lambda: {str(k): t for k, t in enumerate(step(exact, given64))}, torch.float32,
    )  # fmt: skip


@each
def test_in_a_cuda_graph(name: str) -> None:
    module, given = case(name)
    module, given = module.cuda(), moved(given, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(module, given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, given)
    x = given["x"] if isinstance(given, dict) else given
    x.copy_(torch.randn_like(x))
    graph.replay()
    for got, expected in zip(captured, step(module, given), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", test_experts.MAKE)
def test_autocast(name: str) -> None:
    module, x = case(name)
    module, x = module.cuda(), x.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        made = module(x)
        gate = getattr(module, "gate", None)
        assert gate is None or gate(x).dtype == torch.float32
    assert all(y.dtype == torch.bfloat16 for y in made)
    sum(y.float().sum() for y in made).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
