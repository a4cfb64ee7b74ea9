"""Mixtures on a GPU: numbers against float64, no synchronisation, and a training step in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute.networks import Initialization, MoE, Selection, TopKGating
from tests.helpers import seeds
from tests.helpers.budget import check
from tests.helpers.cases import Case, Results, evaluate
from tests.ops.expert_ffn.test_op import ACTIONS, ffn_case, truth

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = "cuda"


def on_gpu(actions: Tensor, **given: Any) -> dict[str, Tensor]:
    from fastroute.functional import expert_ffn
    from fastroute.ops import dispatch

    x, weights, w_in, w_out = (None if t is None else t.to(GPU) for t in given.values())
    plan = dispatch.plan(actions.to(GPU), len(given["w_in"]))
    return {"y": expert_ffn(x, plan, weights, w_in, w_out).cpu()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in ACTIONS if name != "no-samples"])
def test_expert_ffn_agrees_with_float64(name: str, dtype: torch.dtype) -> None:
    actions = torch.tensor(ACTIONS[name]).repeat(9, 1)
    cases = [ffn_case(actions, 48, 32, 40, dtype=dtype, seed=seed) for seed in range(2)]
    check(on_gpu, truth(), cases, dtype=dtype, stored=dtype)


def test_the_same_bits_again() -> None:
    case: Case = ffn_case(torch.tensor(ACTIONS["four"]).repeat(50, 1), 48, 32, 40)
    first: Results = evaluate(on_gpu, case)
    assert all(torch.equal(t, evaluate(on_gpu, case)[name]) for name, t in first.items())  # type: ignore[arg-type]


class Net(nn.Module):
    """A mixture of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = TopKGating(5, 32, 2, capacity=1.0, z_loss=0.1, bias_balancing=0.01)
        self.select = Selection(*[nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(5)])
        self.moe = MoE(32, 16, 5, 2, shared_experts=1, capacity=1.5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y, meta, actions = self.gate(*Initialization()(x)[:2], mask=mask)
        y, _, _ = self.select(y, meta, actions, mask)
        y, aux = self.moe(y, mask, return_aux=True)
        loss: Tensor = y.square().mean() + meta.aux_loss + aux.loss
        return loss


def prepared() -> tuple[Net, Tensor, Tensor]:
    seeds.manual_seed(0)
    return Net().to(GPU), torch.randn(300, 32, device=GPU), torch.rand(300, device=GPU) < 0.8


def test_nothing_waits_for_the_device() -> None:
    net, x, mask = prepared()
    net(x, mask).backward()  # compiles kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(x, mask).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_in_a_cuda_graph() -> None:
    net, x, mask = prepared()
    parameters = list(net.parameters())

    def step() -> list[Tensor]:
        loss = net(x, mask)
        return [loss, *torch.autograd.grad(loss, parameters)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)
