"""Sibling heads, losses and weightings on a GPU: the CPU's numbers, captured in a graph, and nothing waited for."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from fastroute.multitask import MTLModel, MultiHead, weighting
from tests.helpers import seeds

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
TASKS = [f"h{i}" for i in range(8)]


def model_of(**options: Any) -> MTLModel:
    seeds.manual_seed(0)
    layers: list[dict[str, Any]] = [{"name": "trunk", "layers": nn.Linear(16, 32)}]
    for i, name in enumerate(TASKS):
        head = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))
        loss: nn.Module = nn.MSELoss() if i % 2 else nn.CrossEntropyLoss()
        layers.append({"name": name, "layers": head, "anchor_layer": "trunk", "loss": loss})
    return MTLModel(layers, TASKS, **options)


def batch() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    seeds.manual_seed(1)
    y = {n: torch.randn(64, 3) if i % 2 else torch.randint(3, (64,)) for i, n in enumerate(TASKS)}
    y["h1"][::3] = math.nan
    y["h2"][:] = -100
    return torch.randn(64, 16), y


def to_cuda(x: torch.Tensor, y: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return x.cuda(), {k: v.cuda() for k, v in y.items()}


@pytest.mark.parametrize("kind", [None, *(k for k in weighting.WEIGHTINGS if k not in ("auto", "rlw"))])
def test_a_step_waits_for_nothing(kind: str | None) -> None:
    models = [model_of(weighting=kind).double(), model_of(weighting=kind, fuse_heads=False).double().cuda()]
    models.append(copy.deepcopy(models[0]).cuda())
    x, y = batch()
    x, y = x.double(), {k: v.double() if v.is_floating_point() else v for k, v in y.items()}
    results = []
    for model in models:
        given = to_cuda(x, y) if model.trunk.weight.is_cuda else (x, y)
        model.loss(model(given[0]), given[1])  # moves parameters side by side
        model.zero_grad()
        torch.cuda.set_sync_debug_mode("error")
        try:
            total, losses = model.loss(model(given[0]), given[1])
            total.backward()
            if model.weighting is not None:
                model.weighting.update(losses)
                model.weighting.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([total.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(results[0], other, strict=True))


def test_a_step_is_captured_in_a_graph() -> None:
    model = model_of(weighting="uncertainty").cuda()
    x, y = to_cuda(*batch())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model.loss(model(x), y)[0].backward()
    torch.cuda.current_stream().wait_stream(side)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.loss(model(x), y)[0].backward()
    graph.replay()
    torch.cuda.synchronize()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multihead(dtype: torch.dtype) -> None:
    multi = MultiHead(16, 8, 3, 5, dtype=dtype, device="cuda")
    x, task = torch.randn(64, 16, dtype=dtype, device="cuda"), torch.randint(5, (64,), device="cuda")
    every = multi(x)
    assert isinstance(every, torch.Tensor)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert torch.allclose(multi(x, task), every[task, torch.arange(64, device="cuda")], rtol=tolerance, atol=tolerance)
