"""MultiHead against a module per task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastroute
from fastroute.multitask import MultiHead
from tests.helpers import seeds


def as_heads(multi: MultiHead, activation: type[nn.Module] = nn.ReLU) -> list[nn.Sequential]:
    """Its heads as modules of their own."""
    made = []
    for t in range(len(multi.tasks)):
        layers: list[nn.Module] = []
        for k, weight in enumerate(multi.weights):
            linear = nn.Linear(weight.shape[2], weight.shape[1], bias=len(multi.biases) > 0).to(weight.dtype)
            with torch.no_grad():
                linear.weight.copy_(weight[t])
                if len(multi.biases):
                    linear.bias.copy_(multi.biases[k][t])
            layers += [linear] if k == len(multi.weights) - 1 else [linear, activation()]
        made.append(nn.Sequential(*layers))
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [None, 4, [4, 6]])
@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("gelu", nn.GELU)])
@pytest.mark.long_after(6)
def test_multihead(hidden: Any, bias: bool, activation: str, kind: type[nn.Module]) -> None:
    seeds.manual_seed(0)
    multi = MultiHead(5, hidden, 2, 3, activation=activation, bias=bias, dtype=torch.float64)
    heads = as_heads(multi, kind)
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = torch.stack([h(x) for h in heads])
    assert torch.allclose(multi(x), expected)
    assert torch.allclose(multi(x.view(2, 3, 5)), expected.view(3, 2, 3, 2))
    task = torch.tensor([2, 0, 0, 1, 2, 0])
    assert torch.allclose(multi(x, task), expected[task, torch.arange(6)])
    names = list(multi.state_dict())
    assert names == [f"weights.{k}" for k in range(len(multi.weights))] + [
        f"biases.{k}" for k in range(len(multi.biases))
    ]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(multi, dict(zip(names, parameters, strict=True)), (x,))

    x.requires_grad_()
    parameters = [p.detach().requires_grad_() for p in multi.parameters()]
    assert torch.autograd.gradcheck(call, (x, *parameters))
    with fastroute.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, *p: torch.func.functional_call(multi, dict(zip(names, p, strict=True)), (x, task)),
            (x, *parameters),
        )


def test_multihead_forms() -> None:
    names = ["x", "y", "z"]
    for returns, kind in (("tensor", Tensor), ("list", list), ("dict", dict)):
        multi = MultiHead(5, 4, 2, names, returns=returns)
        made = multi(torch.randn(6, 5))
        assert isinstance(made, kind) and len(made) == 3
    assert list(made) == names and made["z"].shape == (6, 2)
    seeds.manual_seed(0)
    wide = MultiHead(400, None, 50, 2)
    assert wide.weights[0].abs().max() <= 1 / 20 and abs(float(wide.weights[0].detach().std()) - 1 / 20 / 3**0.5) < 1e-3
    assert "400 -> 50, tasks=2" in repr(wide)


@pytest.mark.parametrize("by_task", [False, True])
def test_multihead_compiles(by_task: bool) -> None:
    torch._dynamo.reset()
    multi = MultiHead(5, 4, 2, 3)
    compiled = torch.compile(multi, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (4, 9):
        x = torch.randn(B, 5)
        args = (x, torch.randint(3, (B,))) if by_task else (x,)
        assert torch.allclose(compiled(*args), multi(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MultiHead(5, 4, 2, 3, activation="rely"), ValueError, "activation: expected one of relu.*'rely'"),
        (lambda: MultiHead(5, 4, 2, 3, returns="tuple"), ValueError, "returns: expected"),
        (lambda: MultiHead(0, 4, 2, 3), ValueError, "in_features: expected at least 1"),
        (lambda: MultiHead(5, [4, 0], 2, 3), ValueError, "hidden: expected at least 1"),
        (lambda: MultiHead(5, 4, 2.5, 3), TypeError, "out_features: expected an int"),  # type: ignore[arg-type]
        (lambda: MultiHead(5, 4, 2, []), ValueError, "tasks: expected at least one"),
        (lambda: MultiHead(5, 4, 2, 3)(torch.ones(2, 4)), ValueError, r"x: expected \[..., 5\], got \[2, 4\]"),
        (lambda: MultiHead(5, 4, 2, 3)(torch.ones(2, 5), torch.tensor([0, 3])), IndexError, "task: expected indices"),
        (lambda: MultiHead(5, 4, 2, 3)(torch.ones(2, 5), torch.tensor([0, -1])), IndexError, "task: expected indices"),
        (lambda: MultiHead(5, 4, 2, 3)(torch.ones(2, 5), torch.tensor([0])), ValueError, "task: expected one per"),
        (lambda: MultiHead(5, 4, 2, 3)(torch.ones(1, 2, 5), torch.tensor([0])), ValueError, r"x: expected \[B, 5\]"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
