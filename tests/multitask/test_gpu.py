"""On a GPU: the same numbers, losses that follow, and a step in a CUDA graph without waiting for the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute.multitask import MTLModel
from tests.helpers import seeds
from tests.helpers.budget import assert_within_budget
from tests.helpers.multitask import README_TASKS, readme

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def step(model: MTLModel, x: Tensor) -> dict[str, Tensor]:
    outputs, losses, weights = model(x)
    terms = [(w * f(y, torch.ones_like(y))).reshape(1) for y, f, w in zip(outputs, losses, weights, strict=True)]
    total = torch.cat(terms).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(total, parameters)
    return {**dict(zip(names, grads, strict=True)), **{f"y{k}": y.detach() for k, y in enumerate(outputs)}}


def test_the_readme() -> None:
    seeds.manual_seed(0)
    layers = readme()
    layers[4]["loss"] = nn.BCEWithLogitsLoss(pos_weight=torch.full((1,), 2.0))
    model, x = MTLModel(layers, README_TASKS), torch.randn(64, 16)
    exact, x64 = copy.deepcopy(model).double(), x.double()
    model.cuda()
    assert model.losses["Task2"].pos_weight.is_cuda and model.Task3_loss.is_cuda
    x = x.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_within_budget({k: t.cpu() for k, t in found.items()}, lambda: step(exact, x64), torch.float32)


def test_in_a_cuda_graph() -> None:
    seeds.manual_seed(0)
    model, x = MTLModel(readme(), README_TASKS).cuda(), torch.randn(64, 16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, x)
    x.copy_(torch.randn(64, 16))
    graph.replay()
    for name, t in step(model, x).items():
        torch.testing.assert_close(captured[name], t)


def test_compiled() -> None:
    seeds.manual_seed(0)
    model, x = MTLModel(readme(), README_TASKS).cuda(), torch.randn(64, 16, device="cuda")
    run = torch.compile(model, fullgraph=True)
    exact = copy.deepcopy(model).double()

    def outputs(model: Any, x: Tensor) -> dict[str, Tensor]:
        return {str(k): y.detach() for k, y in enumerate(model(x)[0])}

    assert_within_budget(outputs(run, x), lambda: outputs(exact, x.double()), torch.float32)
