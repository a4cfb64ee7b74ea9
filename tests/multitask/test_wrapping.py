"""Nodes that are functions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute.multitask import Add, Concat, Lambda, MTLModel, Multiply, SimpleSelect, SliceSelect, Split, Stack
from tests.helpers import seeds

A, B, C = (torch.randn(2, 3, 4, generator=seeds.generator(k)) for k in range(3))

CASES: list[tuple[Any, tuple[Any, ...], Any, str]] = [
    (Concat(1), (A, B, C), torch.cat((A, B, C), 1), "Concat(dim=1)"),
    (Concat(dim=-1), (A,), A, "Concat(dim=-1)"),
    (Stack(0), (A, B), torch.stack((A, B)), "Stack(dim=0)"),
    (Stack(-1), (A, B, C), torch.stack((A, B, C), -1), "Stack(dim=-1)"),
    (Add(), (A, B, C), A + B + C, "Add()"),
    (Add(), (A, B[:, :1]), A + B[:, :1], "Add()"),
    (Multiply(), (A, B, C), A * B * C, "Multiply()"),
    (Split(2, -1), (A,), A.split(2, -1), "Split(2, dim=-1)"),
    (Split([1, 2], dim=1), (A,), A.split([1, 2], 1), "Split((1, 2), dim=1)"),
    (SimpleSelect(1), ([A, B],), B, "SimpleSelect(1)"),
    (SimpleSelect(selection_axis="b"), ({"a": A, "b": B},), B, "SimpleSelect('b')"),
    (SimpleSelect(-1), (A,), A[-1], "SimpleSelect(-1)"),
    (SliceSelect(slice(0, 1)), ((A, B),), (A,), "SliceSelect(slice(0, 1, None))"),
    (SliceSelect(sel_slice=(slice(None), 2)), (A,), A[:, 2], "SliceSelect((slice(None, None, None), 2))"),
    (Lambda(torch.flatten, start_dim=1), (A,), A.flatten(1), "Lambda(flatten, start_dim=1)"),
    (Lambda(torch.maximum, "larger"), (A, B), torch.maximum(A, B), "Lambda(larger)"),
]


@pytest.mark.parametrize(("layer", "inputs", "expected", "shown"), CASES, ids=[c[3] for c in CASES])
def test_what_they_give(layer: Any, inputs: tuple[Any, ...], expected: Any, shown: str) -> None:
    """Also in a model, copied and pickled; they are no children."""
    assert repr(layer) == shown
    nodes = [{"name": f"x{k}", "layers": SimpleSelect(k)} for k in range(len(inputs))]
    join = {"name": "join", "layers": layer, "anchor_layer": [f"x{k}" for k in range(len(inputs))]}
    model = MTLModel([*nodes, join], ["join"])
    assert not list(model.children()) and not model.state_dict() and model.join is layer
    torch._dynamo.reset()  # one model is one graph of the same code, of which eight are kept
    for made in (
        layer(*inputs),
        copy.deepcopy(model)(inputs)[0][0],
        pickle.loads(pickle.dumps(model))(list(inputs))[0][0],
        torch.compile(model, fullgraph=True, backend="eager")(inputs)[0][0],
    ):
        torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_attributes() -> None:
    assert Concat(1).dim == 1 and SimpleSelect("a").sel == "a" and SliceSelect(slice(2)).slice == slice(2)


def test_gradients() -> None:
    def f(*inputs: Tensor) -> Tensor:
        nodes: list[dict[str, Any]] = [
            {"name": "a", "layers": SimpleSelect(0)},
            {"name": "b", "layers": SimpleSelect(1)},
            {"name": "sum", "layers": Add(), "anchor_layer": ["a", "b", "a"]},
            {"name": "product", "layers": Multiply(), "anchor_layer": ["sum", "b"]},
            {"name": "both", "layers": Stack(0), "anchor_layer": ["product", "sum"]},
            {"name": "parts", "layers": Split([1, 2], 2), "anchor_layer": "both"},
            {"name": "last", "layers": SimpleSelect(1), "anchor_layer": "parts"},
        ]
        return MTLModel(nodes, ["last"])(inputs)[0][0]  # type: ignore[no-any-return]

    a, b = (t[:, :, :3].double().requires_grad_() for t in (A, B))
    assert torch.autograd.gradcheck(f, (a, b))


def test_a_list_of_layers_is_a_sequential() -> None:
    layers = [nn.Linear(4, 3), nn.ReLU()]
    model = MTLModel([{"name": "a", "layers": layers}, {"name": "b", "layers": []}], ["a", "b"])
    assert isinstance(model.a, nn.Sequential) and list(model.a) == layers
    assert list(model.state_dict()) == ["a.0.weight", "a.0.bias"]
    outputs, _, _ = model(A)
    assert torch.equal(outputs[0], model.a(A)) and outputs[1] is A


def test_functions_and_methods() -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    model = MTLModel(
        [
            {"name": "f", "layers": double},
            {"name": "g2", "layers": torch.sin},
            {"name": "m", "layers": nn.ReLU().forward},
        ],
        ["f", "g2", "m"],
    )
    outputs, _, _ = model(A)
    assert all(map(torch.equal, outputs, (2 * A, A.sin(), A.relu())))
    assert "(f): <function" in repr(model) and "double" in repr(model)
