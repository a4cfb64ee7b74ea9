"""Streaming to a GPU from the memory of the CPU, and slot attention on one."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastroute
from fastroute import EfficientVectorRouting, SlotAttention
from tests.helpers import seeds
from tests.helpers.budget import assert_within_budget

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = "cuda"
#: n_inp, n_out, d_inp, d_out: parameters with a row per input; the Gram form; both betas in one.
SIZES = {"fixed": (5000, 20, 64, 48), "gram": (-1, 40, 64, 48), "betas": (-1, 10, 64, 48)}


def results(layer: EfficientVectorRouting, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(y, list(layer.parameters()), dy.to(y))
    names = ["x_out", *(name for name, _ in layer.named_parameters())]
    return {name: t.detach().cpu() for name, t in zip(names, (y, *grads), strict=True)}


@pytest.mark.parametrize("size", SIZES)
def test_streams_from_a_file(size: str, tmp_path: Path) -> None:
    seeds.manual_seed(0)
    layer = EfficientVectorRouting(*SIZES[size])
    x, dy = torch.randn(5000, 64), torch.randn(*layer(torch.zeros(5000, 64)).shape)
    x.numpy().tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=(5000, 64))
    exact = copy.deepcopy(layer).double()
    layer.to(GPU)
    found = results(layer, layer.stream(mapped, rows=700), dy)
    assert_within_budget(found, lambda: results(exact, exact(x.double()), dy), torch.float32)


def test_other_vectors_are_found_when_strict() -> None:
    layer = EfficientVectorRouting(-1, 20, 64, 48, device=GPU)
    parts = iter([[torch.randn(100, 64, device=GPU)] for _ in range(2)])
    with fastroute.strict(True), torch.no_grad(), pytest.raises(ValueError, match="the same vectors in every pass"):
        layer.stream(lambda: iter(next(parts)), n=100)


def test_slot_attention() -> None:
    seeds.manual_seed(0)
    layer = SlotAttention(7, 64, 48)
    x, slots = torch.randn(3, 500, 64), layer.initial_slots(3).detach()
    lengths = [500, 3, 0]

    def made(layer: SlotAttention, x: Tensor, slots: Tensor) -> dict[str, Tensor]:
        y = layer(x, slots, lengths=lengths)
        grads = torch.autograd.grad(y.sin().sum(), [layer.k.weight, layer.v.weight, layer.gru.weight_ih])
        return {str(k): t.detach().cpu() for k, t in enumerate((y, *grads))}

    exact = copy.deepcopy(layer).double()
    found = made(layer.to(GPU), x.to(GPU), slots.to(GPU))
    assert_within_budget(found, lambda: made(exact, x.double(), slots.double()), torch.float32)
