"""What modules of torch.nn are, apart from their parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastroute.modules.reading import call, options
from fastroute.multitask import MTLModel, heads
from fastroute.networks import Initialization, Selection, grouped_modules
from tests.helpers.opcheck import assert_same

ARGUMENTS: dict[type, tuple[int, ...]] = {
    nn.LayerNorm: (4,), nn.RMSNorm: (4,), nn.GroupNorm: (2, 4), nn.Conv2d: (3, 4, 2), nn.MaxPool2d: (2,),
    nn.AvgPool2d: (2,), nn.AdaptiveAvgPool2d: (2,), nn.AdaptiveMaxPool2d: (2,),
}  # fmt: skip
KINDS: list[Any] = sorted(
    grouped_modules._FREE | grouped_modules._NORMS | heads._ELEMENTWISE | {nn.Conv2d}, key=lambda kind: kind.__name__
)


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_all_that_is_public(kind: Any) -> None:
    module = kind(*ARGUMENTS.get(kind, ()))
    public = {name: value for name, value in vars(module).items() if name[0] != "_"}
    fixed = {"training", "transposed"}  # a mode; and the same for every nn.Conv2d
    assert dict(options(module)) == {name: value for name, value in public.items() if name not in fixed}


def test_a_forward_of_its_own_is_seen_by_heads_that_ran_together() -> None:
    """Of a kind that is looked at in every call: not one of ``heads._PLAIN``."""
    layers: list[Any] = [{"name": "trunk", "layers": nn.Linear(3, 4)}]
    layers += [
        {
            "name": f"head{k}",
            "layers": nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)),
            "anchor_layer": "trunk",
        }
        for k in range(8)
    ]
    model, x = MTLModel(layers, [f"head{k}" for k in range(8)]).double(), torch.randn(6, 3, dtype=torch.float64)
    before = model(x)[0]
    gelu = next(m for m in model.modules() if isinstance(m, nn.GELU))
    gelu.forward = torch.zeros_like  # type: ignore[method-assign]
    after = model(x)[0]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(changed) == 1
    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 2][changed.index(True)]
    assert_same(after[changed.index(True)].detach(), last.bias.detach().expand(6, 2))


def test_a_forward_of_its_own_is_called() -> None:
    selection = Selection(*[nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2)]).double()
    for module in selection.modules():
        if isinstance(module, nn.ReLU):
            module.forward = torch.tanh  # type: ignore[method-assign]
    layers = [m for m in selection.modules() if isinstance(m, nn.Linear)]
    x, actions = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    routed, meta, _ = Initialization()(x)
    y = selection(routed, meta, actions)[0]
    expected = torch.stack([torch.tanh(layers[int(a)](row)) for row, a in zip(x, actions, strict=True)])
    assert_same(y.detach(), expected.detach())


def test_a_layer_in_two_places_keeps_its_parameters() -> None:
    """Of two tied layers either is called with the other dtype, and of one that is called twice both times."""
    layer, tied = nn.Linear(3, 3), nn.Linear(3, 3)
    tied.weight = layer.weight
    net = nn.Sequential(layer, nn.Tanh(), layer, tied)
    own, x = list(net.parameters()), torch.randn(4, 3, dtype=torch.float64)
    wide = copy.deepcopy(net).double()
    for _ in range(2):
        made = call(net, x)
        assert made.dtype == torch.float64 and torch.equal(made, wide(x))
        assert all(p is q for p, q in zip(net.parameters(), own, strict=True))
    made.sum().backward()
    wide(x).sum().backward()
    assert all(torch.allclose(p.grad, q.grad.float()) for p, q in zip(own, wide.parameters(), strict=True))  # type: ignore[arg-type, union-attr]
