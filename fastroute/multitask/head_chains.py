"""The products of many small networks on one input: T chains of Linear and activations of the same shapes.

Axes: T networks, N rows, F features, O outputs. Of a layer's parameters, T of each kind, T O rows lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.autograd import apply, asked_again, through, transformed
from ..ops.precision import autocast_dtype

_aten: Any = torch.ops.aten
_version = attrgetter("_version")


class _Activation(NamedTuple):
    """An activation that is made in place, and its gradient from what it returned, written to ``grad_input``."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]


_ACTIVATIONS: dict[type, _Activation] = {
    nn.ReLU: _Activation(torch.relu_, lambda g, y, into: _aten.threshold_backward.grad_input(g, y, 0, grad_input=into)),
    nn.Tanh: _Activation(torch.tanh_, lambda g, y, into: _aten.tanh_backward.grad_input(g, y, grad_input=into)),
    nn.Sigmoid: _Activation(
        torch.sigmoid_, lambda g, y, into: _aten.sigmoid_backward.grad_input(g, y, grad_input=into)
    ),
}


class Layer(NamedTuple):
    """A layer of all networks."""

    O: int
    F: int
    has_bias: bool
    then: tuple[nn.Module, ...]  #: what follows it, of one of the networks: they have no parameters


def _linear(h: Tensor, layer: Layer, weight: Tensor, bias: Tensor | None, T: int) -> Tensor:
    """A linear map of all networks, [T, O, N]: one product of the rows [N, F] that all take, else a batched one of
    their own, [T, F, N].

    Rows are the last axis: then a network's part of the first product lies together, and what follows need not move it.
    """
    if h.dim() == 2:
        h = h.t()
        made = torch.mm(weight, h) if bias is None else torch.addmm(bias.unsqueeze(1), weight, h)
        return made.view(T, layer.O, h.shape[1])
    weight = weight.view(T, layer.O, layer.F)
    return torch.bmm(weight, h) if bias is None else torch.baddbmm(bias.view(T, layer.O, 1), weight, h)


def _put_side_by_side(parameters: Sequence[Tensor], T: int) -> list[Tensor]:
    """Each T of them in one, [T A, ...] of T [A, ...]."""
    return [torch.cat(tuple(parameters[k : k + T])) for k in range(0, len(parameters), T)]


def _by_layer(layers: Sequence[Layer], whole: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """(weight [T O, F], bias [T O] or None) of each layer."""
    rest = iter(whole)
    return [(next(rest), next(rest) if layer.has_bias else None) for layer in layers]


def chain(x: Tensor, layers: Sequence[Layer], stacked: Sequence[tuple[Tensor, Tensor | None]], T: int) -> Tensor:
    """[T, N, O], contiguous, of rows [N, F] and every layer's (weight [T O, F], bias [T O])."""
    h = x
    for layer, (weight, bias) in zip(layers, stacked, strict=True):
        h = _linear(h, layer, weight, bias, T)
        for module in layer.then:
            h = module(h)
    return h.transpose(1, 2).contiguous()


class _Chains(torch.autograd.Function):
    """``chain`` of T networks' own parameters as one node of the graph: activations in place, gradients in few passes.

    A second derivative goes through ``chain``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Layer], T: int, whole: list[Tensor] | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.layers, ctx.T, ctx.parameters = layers, T, parameters
        ctx.set_materialize_grads(False)
        # What lies in the parameters' own memory changes when they do, unseen by autograd.
        ctx.versions = list(map(_version, parameters))
        ctx.done, ctx.left, ctx.x_version = set(), None, x._version
        stacked = _by_layer(layers, whole or _put_side_by_side(parameters, T))
        h, kept = x, [x]
        for layer, (weight, bias) in zip(layers, stacked, strict=True):
            h = _linear(h, layer, weight, bias, T)
            if layer.then:
                h = _ACTIVATIONS[type(layer.then[0])].forward(h)
            kept += [weight, h]
        if not layers[-1].then:
            kept.pop()
        ctx.save_for_backward(*kept)
        h = h.transpose(1, 2)  # what an activation gave is kept for its gradient: nobody may write to that
        return split(h.clone(memory_format=torch.contiguous_format) if layers[-1].then else h.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        layers, T = ctx.layers, ctx.T
        used = [t for t in range(T) if grads[t] is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        first: Any = grads[used[0]]
        again = asked_again(first)
        if ctx.versions != (now := list(map(_version, ctx.parameters))):
            _check_unchanged(ctx, now, used, again)
        if again:
            return _through_chain(ctx, grads)
        # Some networks' outputs alone: of one, where a task's gradient is asked for by itself.
        low, high = used[0], used[-1] + 1
        here = slice(low, high)
        g = torch.stack([torch.zeros_like(first) if y is None else y for y in grads[here]]).transpose(1, 2)  # [T, O, N]
        x, *kept = _saved(ctx, used)
        weights = [w.view(T, layer.O, layer.F)[here] for w, layer in zip(kept[::2], layers, strict=True)]
        outputs = [h[here] for h in kept[1::2]]
        needs = ctx.needs_input_grad
        at, made = len(needs), []

        def of_each(gradient: Tensor) -> list[Tensor | None]:
            found = [*[None] * low, *gradient.unbind(), *[None] * (T - high)]
            if len(used) == high - low:
                return found
            return [t if y is not None else None for t, y in zip(found, grads, strict=True)]

        for k, layer in reversed(list(enumerate(layers))):
            if layer.then:  # into g, unless it is the user's
                into = torch.empty_like(outputs[k]) if k == len(layers) - 1 else g
                g = _ACTIVATIONS[type(layer.then[0])].backward(g, outputs[k], into)
            if layer.has_bias:
                at -= T
                made.append(of_each(g.sum(2)) if any(needs[at : at + T]) else [None] * T)
            at -= T
            wants = any(needs[at : at + T])
            if k == 0:  # the rows of all networks are the same
                g = g.reshape(g.shape[0] * layer.O, x.shape[0])
                made.append(of_each(torch.mm(g, x).view(high - low, layer.O, layer.F)) if wants else [None] * T)
                break
            made.append(of_each(torch.bmm(g, outputs[k - 1].transpose(1, 2))) if wants else [None] * T)
            g = torch.bmm(weights[k].transpose(1, 2), g)
        dx = torch.mm(g.t(), weights[0].flatten(0, 1)) if needs[0] else None
        return (dx, None, None, None, *(t for part in reversed(made) for t in part))


def _check_unchanged(ctx: Any, now: Sequence[int], used: Sequence[int], again: bool) -> None:
    """Raises if parameters changed that the gradients of some networks read: in first order only weights."""
    at, needs = 0, ctx.needs_input_grad
    for layer in ctx.layers:
        for is_read in (again or needs[0] or any(needs[4 : 4 + at]), *[again] * layer.has_bias):
            if is_read and any(ctx.versions[at + t] != now[at + t] for t in used):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                    "parameter of a head, between the forward and the backward pass"
                )
            at += ctx.T


def _saved(ctx: Any, used: Sequence[int]) -> Sequence[Tensor]:
    """What was saved, which is there until each network has had its backward pass, as if each had a node of its own."""
    left = ctx.left
    if left is not None and ctx.done.isdisjoint(used) and left[0]._version == ctx.x_version:
        saved = left
    else:
        saved = ctx.saved_tensors
    ctx.done.update(used)
    ctx.left = saved if len(ctx.done) < ctx.T else None
    return saved


def _through_chain(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The gradients of ``chain``, computed again from its inputs."""
    layers, T, parameters = ctx.layers, ctx.T, ctx.parameters

    def plain(x: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        return chain(x, layers, _by_layer(layers, _put_side_by_side(own, T)), T).unbind()

    needs = ctx.needs_input_grad
    dx, *rest = through(plain, (ctx.saved_tensors[0], *parameters), (needs[0], *needs[4:]), grads)
    return (dx, None, None, None, *(t if grads[i % T] is not None else None for i, t in enumerate(rest)))


def split(h: Tensor) -> tuple[Tensor, ...]:
    """[T, N, O] as T tensors that may be written to: to their users they have nothing in common."""
    if torch.compiler.is_compiling() or transformed():
        return tuple(t.squeeze(0) for t in torch.unsafe_split(h, 1))
    if not h.shape[1]:
        return tuple(t.clone() for t in h.unbind())
    return torch.unsafe_split(h.flatten(0, 1), h.shape[1])


def chains(
    x: Tensor, layers: Sequence[Layer], parameters: Sequence[Tensor], T: int, whole: list[Tensor] | None = None
) -> Sequence[Tensor]:
    """T chains of layers, each with parameters of its own, on the same rows.

    Args:
        x: [N, F].
        layers: what all have in common.
        parameters: of each layer T weights [O, F], then T biases [O] if it has any.
        whole: the same without gradient, each T in one, if they lie side by side.

    Returns:
        T tensors [N, O], contiguous.
    """
    plain = torch.compiler.is_compiling() or transformed()
    if torch.is_grad_enabled() and not plain:
        plain = autocast_dtype(x.device.type) is not None or parameters[0].dtype != x.dtype
        if not plain and all(
            len(layer.then) < 2 and all(type(m) in _ACTIVATIONS for m in layer.then) for layer in layers
        ):
            return apply(_Chains, x, layers, T, whole, *parameters)
        whole = None  # which has no gradient
    if whole is None or plain:
        whole = _put_side_by_side(parameters, T)
    h = chain(x, layers, _by_layer(layers, whole), T)
    return split(h.clone() if layers[-1].then else h)  # as above
