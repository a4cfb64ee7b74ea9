"""Layers as tools around them use them: hooks on gradients, replicas, and defaults that are not PyTorch's own."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastroute
from fastroute.networks import Initialization, Selection
from tests.helpers import seeds
from tests.helpers.layers import LAYERS, LayerCase, rand
from tests.helpers.process_wide import default_dtype

F64 = torch.float64
ROWS = [pytest.param(name, marks=pytest.mark.long) if case.long else name for name, case in LAYERS.items()]


def outputs(layer: nn.Module, case: LayerCase) -> list[Tensor]:
    seeds.manual_seed(1)
    made = tree_leaves(layer(*case.inputs, *case.rest, **case.options))
    return [t for t in made if isinstance(t, Tensor) and t.is_floating_point()]


def passes(layer: nn.Module, case: LayerCase) -> tuple[list[Tensor], list[Tensor | None]]:
    made = outputs(layer, case)
    sum((t.square().sum() for t in made if t.requires_grad), torch.zeros((), dtype=F64, device="cpu")).backward()
    return [t.detach() for t in made], [p.grad for p in layer.parameters()]


def same(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None) and (
            one is None or (one.device, one.dtype) == (other.device, other.dtype)
        )
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("name", ROWS)
def test_hooks_after_gradients_are_called_where_there_is_one(name: str) -> None:
    """As optimizers in the backward pass, and whoever counts parameters that are ready, take for granted."""
    case = LAYERS[name]
    _, expected = passes(case.layer(), case)
    layer, seen = case.layer(), dict[int, Tensor | None]()
    for k, p in enumerate(layer.parameters()):
        p.register_post_accumulate_grad_hook(lambda p, k=k: (seen.update({k: p.grad}), None)[1])
    _, found = passes(layer, case)
    same(found, expected)
    assert all(grad is not None for grad in seen.values())
    assert seen.keys() == {k for k, grad in enumerate(found) if grad is not None}


# ------------------------------------------------------------------------------------------------------------- defaults


@contextmanager
def meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("default", [meta, partial(default_dtype, F64)], ids=["meta", "float64"])
def test_a_call_under_other_defaults(default: Callable[[], Any], name: str) -> None:
    """No tensor of it is of the default device or dtype: the bits are the same."""
    case = LAYERS[name]
    expected, layer = passes(case.layer(), case), case.layer()
    with default():
        found = passes(layer, case)
    same(found[0], expected[0])
    same(found[1], expected[1])


#: Functions of torch that make a tensor on the default device.
FACTORIES = {
    "tensor", "as_tensor", "asarray", "scalar_tensor", "zeros", "ones", "full", "empty", "arange", "eye", "linspace",
    "rand", "randn", "randint", "randperm",
}  # fmt: skip
#: Of a program that is its own user; and buffers, which a default device is for.
ELSEWHERE = {"demos", "metrics.py"}


def test_every_tensor_says_where_it_is() -> None:
    package, missing = Path(fastroute.__file__).parent, []
    for path in sorted(package.rglob("*.py")):
        if ELSEWHERE & {*path.relative_to(package).parts}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(call := node.func, ast.Attribute):
                continue
            makes = isinstance(call.value, ast.Name) and call.value.id == "torch" and call.attr in FACTORIES
            if makes and not {"device", None} & {k.arg for k in node.keywords}:
                missing.append(f"{path.relative_to(package)}:{node.lineno}")
    assert not missing, "expected device= in each call that makes a tensor"


# ------------------------------------------------------------------------------------------- tensors for parameters


def plain_tensors(stack: nn.Module) -> None:
    """A hypernetwork's, in the place of parameters."""
    for m in stack.modules():
        for name, p in list(m._parameters.items()):
            delattr(m, name)
            setattr(m, name, None if p is None else p * 2)


def replica(stack: Any) -> Any:
    """As ``torch.nn.parallel.replicate`` makes one, with twice the parameters."""
    copies = {m: m._replicate_for_data_parallel() for m in stack.modules()}
    for m, copied in copies.items():
        for key, child in m._modules.items():
            copied._modules[key] = copies[child]
        for key, p in m._parameters.items():
            setattr(copied, key, None if p is None else p * 2)
    return copies[stack]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 4), "norm": lambda: nn.LayerNorm(6), "RMS norm": lambda: nn.RMSNorm(6),
    "chain": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2))),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("replicated", [False, True], ids=["hypernetwork", "replica"])
def test_plain_tensors_for_a_stacks_parameters(replicated: bool, kind: str) -> None:
    seeds.manual_seed(0)
    modules = [MODULES[kind]().double() for _ in range(3)]
    with torch.no_grad():
        for m in modules:
            for p in m.parameters():
                p.add_(rand(*p.shape))
    layer, x, actions = Selection(*modules, stacked=True).double(), rand(7, 6), torch.arange(7) % 3
    parameters = list(layer.parameters())
    used = replica(layer) if replicated else layer
    if not replicated:
        plain_tensors(layer._submodules)
    y = used(x, Initialization()(x)[1], actions)[0]
    with torch.no_grad():
        for m in modules:
            for p in m.parameters():
                p.mul_(2)
    expected = torch.stack([modules[int(k)](row) for k, row in zip(actions, x, strict=True)])
    torch.testing.assert_close(y, expected)
    assert all(g is not None for g in torch.autograd.grad(y.sum(), parameters, allow_unused=True))


def test_a_plain_tensor_of_one_module_is_refused() -> None:
    layer, x = Selection(nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4), stacked=True), torch.randn(3, 6)
    pattern: Any = layer._submodules.pattern
    del pattern.weight
    pattern.weight = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match=r"expected weight of all modules, \[3, ...\], got \[4, 6\]"):
        layer(x, Initialization()(x)[1], torch.arange(3))
