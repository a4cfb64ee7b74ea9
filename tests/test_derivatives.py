"""Every derivative of every layer: right, whoever asks for it. Second ones, forward mode, torch.func, checkpointing.

The layers are small, in float64, and each is a function of its parameters and its inputs (``functional_call``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.helpers import seeds
from tests.helpers.layers import LAYERS, Selected, evr, rand
from tests.helpers.matrix import IN_EVAL, cell, each

F64 = torch.float64


def each_layer(title: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The test of a column's cell, for every layer."""

    def of(test: Callable[..., None]) -> Callable[..., None]:
        @each(title)
        @functools.wraps(test)
        def run(name: str, **others: Any) -> None:
            cell(name, title, lambda: test(name, **others))

        return run

    return of


def given(name: str) -> tuple[Callable[..., Tensor], dict[str, Tensor], tuple[Tensor, ...]]:
    case = LAYERS[name]
    layer = case.layer().train(name not in IN_EVAL)
    parameters = {k: p.detach().clone() for k, p in layer.named_parameters()}
    return case.function(layer), parameters, case.inputs


def cotangent(y: Tensor) -> Tensor:
    return rand(*y.shape, seed=9)


def by_autograd(f: Callable[..., Tensor], parameters: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (*parameters.values(), *inputs)]
    own = dict(zip(parameters, leaves, strict=False))
    y = f(own, *leaves[len(own) :])
    made = torch.autograd.grad(y, leaves, cotangent(y), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(made, leaves, strict=True)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@each_layer("jvp")
def test_forward_mode(name: str) -> None:
    """<w, J v> = <J^T w, v>, and J v is not nothing."""
    f, parameters, inputs = given(name)
    v = (
        {k: rand(*p.shape, seed=i) for i, (k, p) in enumerate(parameters.items())},
        *(rand(*t.shape, seed=7) for t in inputs),
    )
    y, tangent = jvp(f, (parameters, *inputs), v)
    close(y, f(parameters, *inputs))
    expected = sum((g * t).sum() for g, t in zip(by_autograd(f, parameters, inputs), tree_leaves(v), strict=True))
    close((cotangent(y) * tangent).sum(), expected)  # type: ignore[arg-type]
    assert tangent.abs().max() > 1e-3


@each_layer("grad")
def test_torch_func_grad(name: str) -> None:
    f, parameters, inputs = given(name)

    def loss(parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        y = f(parameters, *inputs)
        return (y * cotangent(y)).sum()

    found = grad(loss, argnums=tuple(range(1 + len(inputs))))(parameters, *inputs)
    for a, b in zip(tree_leaves(found), by_autograd(f, parameters, inputs), strict=True):
        close(a, b)


@pytest.mark.parametrize("name", [name for name in IN_EVAL if name != "every weighting"])  # which notes in backward
def test_buffers_that_torch_func_may_not_change(name: str) -> None:
    """Refused, unless they are given as the parameters are."""
    case = LAYERS[name]
    layer = case.layer().train()
    f, parameters = case.function(layer), dict(layer.named_parameters())
    with pytest.raises(RuntimeError, match=re.escape(IN_EVAL[name])):
        grad(lambda p: f(p, *case.inputs).sum())(parameters)
    buffers = {k: b.clone() for k, b in layer.named_buffers()}
    given = {**parameters, **buffers}
    found = grad(lambda p, b: f({**p, **b}, *case.inputs).sum())(parameters, buffers)
    (f(given, *case.inputs)).sum().backward()
    for k, p in parameters.items():
        close(found[k], torch.zeros_like(p) if p.grad is None else p.grad)


def test_actions_that_vmap_hides() -> None:
    """Modules that are called are given their own samples, which nobody knows for many actions at a time."""
    case = LAYERS["Selection, unlike modules"]
    layer, (x,) = case.layer(), case.inputs
    several = torch.stack([case.rest[0], case.rest[0].flip(0)])
    with pytest.raises(RuntimeError, match="actions: expected one sample in each call"):
        vmap(lambda actions: layer(x, actions))(several)
    found = vmap(lambda x, a: layer(x[None], a[None])[0])(x, several[0])
    close(found, layer(x, several[0]))


@each_layer("2nd")
def test_second_derivative(name: str) -> None:
    """Of a gradient penalty: against torch.func's forward over reverse, and against finite differences."""
    f, parameters, inputs = given(name)

    def penalty(*leaves: Tensor) -> Tensor:
        own = dict(zip(parameters, leaves, strict=False))
        x = leaves[len(own) :]
        y = f(own, *x)
        made = torch.autograd.grad((y * cotangent(y)).sum(), x, create_graph=True)
        return sum((g.square().sum() for g in made), y.new_zeros(()))

    leaves = [t.clone().requires_grad_() for t in (*parameters.values(), *inputs)]
    found = torch.autograd.grad(penalty(*leaves), leaves, allow_unused=True)
    direction = [rand(*t.shape, seed=3 + i) for i, t in enumerate(leaves)]
    slope = sum(
        ((g * v).sum() for g, v in zip(found, direction, strict=True) if g is not None), torch.zeros((), dtype=F64)
    )
    step = 1e-5

    def at(k: int) -> Tensor:
        moved = (t.detach() + k * step * v for t, v in zip(leaves, direction, strict=True))
        return penalty(*(t.requires_grad_() for t in moved)).detach()

    by_differences = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
    assert slope.abs() > 1e-3
    torch.testing.assert_close(slope, by_differences, rtol=1e-6, atol=1e-7)


@each_layer("2nd")
def test_jacobians(name: str) -> None:
    f, parameters, inputs = given(name)
    by_rows, by_columns = jacrev(f, 1)(parameters, *inputs), jacfwd(f, 1, randomness="same")(parameters, *inputs)
    close(by_rows, by_columns)
    x = inputs[0].clone().requires_grad_()
    y = f(parameters, x, *inputs[1:])
    each = torch.stack([torch.autograd.grad(y[i], x, retain_graph=True)[0] for i in range(len(y))])
    close(by_rows, each)
    many = torch.autograd.grad(y, x, torch.eye(len(y), dtype=F64), is_grads_batched=True)[0]
    close(many, each)


@each_layer("2nd")
def test_gradients_of_several_losses_by_vmap(name: str) -> None:
    """vmap over ``torch.autograd.grad`` of a graph that is there already, as TorchJD takes gradients of tasks."""
    f, parameters, inputs = given(name)
    leaves = [t.clone().requires_grad_() for t in (*parameters.values(), *inputs)]
    y = f(dict(zip(parameters, leaves, strict=False)), *leaves[len(parameters) :])
    some = torch.stack([rand(len(y), seed=s) for s in (3, 4)])

    def gradients(weights: Tensor) -> list[Tensor]:
        made = torch.autograd.grad(y, leaves, weights, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, made, strict=True)]

    for many, *rows in zip(vmap(gradients)(some), *map(gradients, some), strict=True):
        close(many, torch.stack(rows))


@pytest.mark.parametrize("name", ["QLearning, tabular", "AAC, WPL that collaborate"])
def test_vmap_within_vmap(name: str) -> None:
    """Decisions and their losses: within several, PyTorch's ``mse_loss`` takes one's axis for another's."""
    f, parameters, inputs = given(name)
    several = [torch.stack([t, t / 2]) for t in inputs]
    each = vmap(lambda *x: f(parameters, *x), randomness="same")
    found = vmap(lambda *x: each(*(torch.stack([t, 3 * t]) for t in x)), randomness="same")(*several)
    for i, j in ((0, 1), (1, 0)):
        close(found[i, j], f(parameters, *(t[i] * (1 + 2 * j) for t in several)))


@each_layer("vmap")
def test_an_ensemble(name: str) -> None:
    """vmap over stacked parameters: as one after the other."""
    f, parameters, inputs = given(name)
    several = {k: torch.stack([p, 0.5 * p, -p]) for k, p in parameters.items()}
    found = vmap(f, (0, *[None] * len(inputs)), randomness="same")(several, *inputs)
    for i, row in enumerate(found):
        close(row, f({k: p[i] for k, p in several.items()}, *inputs))


@each_layer("vmap")
def test_gradients_of_each_sample(name: str) -> None:
    """vmap over grad, every sample with its own actions, tasks and lengths: as one after the other."""
    case = LAYERS[name]
    _, parameters, inputs = given(name)
    layer = case.layer().train(name not in IN_EVAL)
    size, zero = len(inputs[0]), torch.zeros((), dtype=F64)
    options = {k: v for k, v in case.options.items() if isinstance(v, Tensor) and len(v) == size}

    def loss(parameters: dict[str, Tensor], inputs: Any, rest: Any, options: Any) -> Tensor:
        seeds.manual_seed(1)
        one = [t[None] for t in (*inputs, *rest)]
        made = functional_call(
            layer, parameters, tuple(one), {**case.options, **{k: t[None] for k, t in options.items()}}
        )
        return sum((t.square().sum() for t in tree_leaves(made) if isinstance(t, Tensor) and t.dtype == F64), zero)

    found = vmap(grad(loss), (None, 0, 0, 0), randomness="same")(parameters, inputs, tuple(case.rest), options)
    for b in range(size):
        leaves = {k: p.clone().requires_grad_() for k, p in parameters.items()}
        own = {k: t[b] for k, t in options.items()}
        y = loss(leaves, [t[b] for t in inputs], [t[b] for t in case.rest], own)
        wanted = list(leaves.values())
        made = torch.autograd.grad(y, wanted, allow_unused=True) if y.requires_grad else [None] * len(wanted)
        for (k, p), g in zip(leaves.items(), made, strict=True):
            close(found[k][b], torch.zeros_like(p) if g is None else g)


@each_layer("checkpoint")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(name: str, use_reentrant: bool) -> None:
    """What is computed again gives the same gradients, to the bit."""
    case = LAYERS[name]
    found = []
    for again in (False, True):
        layer = case.layer()
        inputs = [t.clone().requires_grad_() for t in case.inputs]
        seeds.manual_seed(1)

        def run(*x: Tensor, layer: nn.Module = layer) -> Tensor:
            made = tree_leaves(layer(*x, *case.rest, **case.options))
            return torch.cat([t.reshape(-1) for t in made if isinstance(t, Tensor) and t.dtype == F64])

        y = checkpoint(run, *inputs, use_reentrant=use_reentrant) if again else run(*inputs)
        y.square().sum().backward()
        found.append([t.grad for t in (*layer.parameters(), *inputs)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


# ------------------------------------------------------------------------------------------------------------ hooks

UNUSED: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "one iteration": lambda: (evr(4, 3, 6, 5, n_iters=1), (rand(2, 4, 6).float(),)),
    "modules without a sample": lambda: (Selected(), (rand(5, 6).float(), torch.zeros(5, dtype=torch.int64))),
}


@pytest.mark.parametrize("name", UNUSED)
def test_hooks_are_given_tensors(name: str) -> None:
    """A hook on a parameter that gets no gradient is not called: autograd would call it with None."""
    layer, given = UNUSED[name]()
    seen: dict[str, object] = {}
    for key, p in layer.named_parameters():
        p.register_hook(lambda g, key=key: seen.__setitem__(key, g))
    layer(*given).sum().backward()
    assert seen and all(isinstance(g, Tensor) for g in seen.values())
    assert (
        set(seen)
        == {key for key, p in layer.named_parameters() if p.grad is not None}
        < dict(layer.named_parameters()).keys()
    )
