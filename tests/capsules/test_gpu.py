"""The layer on a GPU: numbers against float64, no synchronisation, and a training step in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import EfficientVectorRouting, explain
from fastroute.reference.efficient_routing import efficient_routing
from tests.helpers.budget import assert_within_budget

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

#: n_inp, n_out, d_inp, d_out: fixed inputs, the Gram form (d <= 4 m), and linear betas without it.
SIZES = {"fixed": (500, 40, 64, 48), "gram": (-1, 40, 64, 48), "linear": (-1, 10, 96, 48)}
PADDING = {"whole": None, "padded": [500, 3, 0]}


def inputs(size: tuple[int, int, int, int]) -> tuple[EfficientVectorRouting, Tensor, Tensor]:
    torch.manual_seed(3)
    _, m, d, h = size
    return EfficientVectorRouting(*size, n_iters=2), torch.randn(3, 500, d), torch.randn(3, m, h)


def step(
    layer: EfficientVectorRouting, x: Tensor, cotangent: Tensor, lengths: Tensor | None, plain: bool
) -> list[Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad()
    if plain:
        y = efficient_routing(x, layer._parameters_by_name(), n_iters=2, normalize=True, lengths=lengths)
    else:
        y = layer(x, lengths=lengths)
        assert isinstance(y, Tensor)
    (y * cotangent).sum().backward()
    found = [y, x.grad, *(p.grad for p in layer.parameters())]
    return [t.detach().clone() for t in found if t is not None]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_float64(size: str, padding: str) -> None:
    layer, x, cotangent = inputs(SIZES[size])
    where: dict[str, Any] = {"device": "cuda"}
    lengths = None if PADDING[padding] is None else torch.tensor(PADDING[padding])
    exact = step(layer.double(), x.double(), cotangent.double(), lengths, plain=True)
    on_cpu = step(layer.float(), x, cotangent, lengths, plain=True)
    layer = layer.to(**where)
    x, cotangent = x.to(**where), cotangent.to(**where)
    lengths = None if lengths is None else lengths.to(**where)
    assert {d.backend for d in explain(layer, x)} == {"triton"}
    found = step(layer, x, cotangent, lengths, plain=False)
    on_gpu = [t.cpu() for t in step(layer, x, cotangent, lengths, plain=True)]
    for actual, truth, *usual in zip(found, exact, on_cpu, on_gpu, strict=True):
        # one draw of a rounding error says little: the yardstick is the larger of two
        worse = max(usual, key=lambda t, truth=truth: float((t.double() - truth).norm()))  # type: ignore[misc]
        assert_within_budget(actual.cpu(), truth, worse)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("size", SIZES)
def test_a_training_step_is_captured_without_a_sync(size: str, padding: str) -> None:
    layer, x, cotangent = inputs(SIZES[size])
    layer, x, cotangent = layer.cuda(), x.cuda(), cotangent.cuda()
    lengths = None if PADDING[padding] is None else torch.tensor(PADDING[padding], device="cuda")
    expected = step(layer, x, cotangent, lengths, plain=False)
    static = torch.zeros_like(x).requires_grad_()

    def train() -> Tensor:
        static.grad = None
        layer.zero_grad()
        y = layer(static, lengths=lengths)
        (y * cotangent).sum().backward()
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = train()
    with torch.no_grad():
        static.copy_(x)
    graph.replay()
    found = [y, static.grad, *(p.grad for p in layer.parameters())]
    for got, wanted in zip((t for t in found if t is not None), expected, strict=True):
        assert torch.equal(got, wanted)
