"""All iterations on a GPU: numbers against float64, no synchronisation, and a training step in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import EfficientVectorRouting, explain
from tests.helpers import seeds
from tests.helpers.budget import check
from tests.helpers.routing_cases import Size, efficient_case, efficient_op, efficient_truth

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = "cuda"

#: n_inp, n_out, d_inp, d_out: fixed inputs, the Gram form (d <= 4 m), and linear betas without it.
SIZES = {"fixed": (500, 40, 64, 48), "gram": (-1, 40, 64, 48), "linear": (-1, 10, 96, 48)}
PADDING = {"whole": None, "padded": [500, 3, 0]}


def on_gpu(fn: Any) -> Any:
    """The same function of CPU tensors, computed on the GPU."""

    def call(**inputs: Tensor | None) -> dict[str, Tensor]:
        found = fn(**{k: None if t is None else t.to(GPU) for k, t in inputs.items()})
        return {k: t.cpu() for k, t in found.items()}

    return call


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_float64(size: str, padding: str) -> None:
    n, m, d, h = SIZES[size]
    options: dict[str, Any] = {} if PADDING[padding] is None else {"lengths": PADDING[padding]}
    cases = [efficient_case(Size(3, 500, m, d, h), linear=n == -1, seed=seed, **options) for seed in range(3)]
    check(on_gpu(efficient_op()), efficient_truth(), cases, dtype=torch.float32)


def inputs(size: tuple[int, int, int, int]) -> tuple[EfficientVectorRouting, Tensor, Tensor]:
    seeds.manual_seed(3)
    _, m, d, h = size
    return (
        EfficientVectorRouting(*size, device=GPU),
        torch.randn(3, 500, d, device=GPU),
        torch.randn(3, m, h, device=GPU),
    )


def test_takes_triton() -> None:
    layer, x, _ = inputs(SIZES["fixed"])
    assert {decision.backend for decision in explain(layer, x)} == {"triton"}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("size", SIZES)
def test_a_training_step_is_captured_without_a_sync(size: str, padding: str) -> None:
    layer, x, cotangent = inputs(SIZES[size])
    lengths = None if PADDING[padding] is None else torch.tensor(PADDING[padding], device=GPU)
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
    captured = [t.detach().clone() for t in (y, static.grad, *(p.grad for p in layer.parameters())) if t is not None]
    expected = [train().detach(), *(t for t in (static.grad, *(p.grad for p in layer.parameters())) if t is not None)]
    for got, wanted in zip(captured, expected, strict=True):
        assert torch.equal(got, wanted)
