"""Sibling heads: nodes that do the same to one input, each with parameters of its own, computed together.

Axes: T heads, N rows, F features, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modules.reading import Proof, may_be_read, options
from ..ops.autograd import transformed
from .head_chains import Layer, chains
from .schedule import Call
from .side_by_side import SideBySide

#: What acts on every element alone and has no parameters.
_ELEMENTWISE: frozenset[type] = frozenset({
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink,
    nn.Softshrink,
})  # fmt: skip
_DROPOUTS: frozenset[type] = frozenset({nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout})
_TENSORS = (nn.Parameter, Tensor)
#: So many heads are faster together: on a CPU, setting out costs what some products do; on a GPU, starting one does.
#: Together 4 take 1.1 times as long as a loop, 6 take 0.94, 16 take 0.66 (``bench/calibrate_thresholds.py``).
_LEAST = {"cpu": 6}
#: Fewer are no group anywhere: looking whether they still can run together would cost what it saves.
_FEWEST = 4

Signature = tuple[Any, ...]


def _signature(m: Any, leaves: list[nn.Module], seen: tuple[list[Any], list[Any]], static: bool) -> Signature | None:
    """What a head does, parameters' values apart; None if it is not a chain of Linear and activations.

    Args:
        leaves: what it consists of is appended, but for what does nothing.
        seen: what was looked at is appended: modules, and modules of whom the class was enough.
        static: leave out what often changes: modes, and whether it may be read.
    """
    kind = type(m)
    if not (kind in _ELEMENTWISE or kind in _DROPOUTS or kind in (nn.Sequential, nn.Identity, nn.Linear)):
        seen[1].append(m)
        return None
    seen[0].append(m)
    if not static and not may_be_read(m):
        return None
    if kind is nn.Sequential:
        made: Signature = ()
        for child in m._modules.values():
            if child is None or (part := _signature(child, leaves, seen, static)) is None:
                return None
            made += part
        return made
    if kind is nn.Identity or (kind in _DROPOUTS and (static or not m.training or m.p == 0)):
        return ()
    if kind is nn.Linear:
        weight, bias = m._parameters.get("weight"), m._parameters.get("bias")
        if type(weight) not in _TENSORS or not (bias is None or type(bias) in _TENSORS):
            return None  # a parametrization, a sharded tensor
        leaves.append(m)
        if static:
            return ((kind, weight.shape, bias is None),)
        return ((kind, *_like(weight), *(() if bias is None else _like(bias))),)
    if kind in _ELEMENTWISE:
        leaves.append(m)
        return ((kind, *options(m)),)
    return None


def _like(p: Tensor) -> tuple[Any, ...]:
    return p.shape, p.dtype, p.device


def _is_useful(signature: Signature | None) -> bool:
    """Whether there is a product in it, and nothing before it that writes to what all heads read."""
    if not signature or not any(part[0] is nn.Linear for part in signature):
        return False
    before = next(i for i, part in enumerate(signature) if part[0] is nn.Linear)
    return not any(("inplace", True) in part for part in signature[:before])


def join(calls: Sequence[Call], layers: Mapping[str, Any]) -> list[Call]:
    """A schedule in which sibling heads are one call, at the place of the first of them.

    Siblings have the same single anchor, and are Linear, or Sequentials of Linear, activations and dropout of the same
    shapes.
    """
    groups: dict[Any, list[str]] = {}
    keys: dict[str, Any] = {}
    for call in calls:
        layer = layers.get(call.names[0])
        if call.group is None and len(call.inputs) == 1 and isinstance(layer, nn.Module):
            signature = _signature(layer, [], ([], []), static=True)
            if _is_useful(signature):
                key = keys[call.names[0]] = (call.inputs, signature)
                groups.setdefault(key, []).append(call.names[0])
    made: list[Call] = []
    for call in calls:
        siblings = groups.get(keys.get(call.names[0]), [])
        if len(siblings) < _FEWEST:
            made.append(call)
        elif call.names[0] == siblings[0]:
            made.append(Call(tuple(siblings), call.inputs, Siblings(siblings)))
    return made


class _Part(NamedTuple):
    """Heads that run together."""

    heads: tuple[int, ...]  #: which they are
    before: tuple[nn.Module, ...]  #: what comes before their first product
    layers: tuple[Layer, ...]
    parameters: tuple[tuple[dict[str, Any], str], ...]  #: where they are and what they are called, layer by layer
    memory: SideBySide


def _part(heads: Sequence[int], leaves: Sequence[Sequence[nn.Module]], before: Sequence[SideBySide]) -> _Part:
    """Of heads that consist of these leaves."""
    at_first: list[nn.Module] = []
    layers: list[Layer] = []
    parameters: list[tuple[dict[str, Any], str]] = []
    for column in zip(*leaves, strict=True):
        first = column[0]
        if type(first) is nn.Linear:
            names = [name for name in ("weight", "bias") if first._parameters[name] is not None]
            O, F = first._parameters["weight"].shape  # type: ignore[union-attr]
            layers.append(Layer(O, F, len(names) == 2, ()))
            parameters += [(leaf._parameters, name) for name in names for leaf in column]
        elif layers:
            layers[-1] = layers[-1]._replace(then=(*layers[-1].then, first))
        else:
            at_first.append(first)
    memory = SideBySide(len(heads), before)
    return _Part(tuple(heads), tuple(at_first), tuple(layers), tuple(parameters), memory)


class _Recipe:
    """Which heads can run together, and what shows that this is still so."""

    def __init__(self, heads: Sequence[nn.Module], before: _Recipe | None = None) -> None:
        memories = [part.memory for part in before.parts] if before is not None else []
        found: dict[Signature, list[int]] = {}
        leaves: list[list[nn.Module]] = []
        self.alone: list[int] = []
        self.seen: tuple[list[Any], list[Any]] = [], []
        for i, head in enumerate(heads):
            leaves.append([])
            signature = _signature(head, leaves[i], self.seen, static=False)
            if _is_useful(signature):
                found.setdefault(signature, []).append(i)  # type: ignore[arg-type]
            else:
                self.alone.append(i)
        self.parts: list[_Part] = []
        for members in found.values():
            if len(members) > 1:
                self.parts.append(_part(members, [leaves[i] for i in members], memories))
            else:
                self.alone += members


class Siblings:
    """What computes a group of sibling heads: a step of a model's schedule.

    The first layer of all is one product, later ones are one batched product each. Parameters are the heads' own, put
    side by side at every call. Heads that differ from the others now (a hook, a dropout at work, another layer in its
    place) run by themselves.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._known: tuple[_Recipe, Proof] | None = None  # replaced as a whole: threads see both or nothing

    def __deepcopy__(self, memo: Any) -> Siblings:
        return Siblings(self.names)

    def __reduce__(self) -> Any:
        return Siblings, (self.names,)

    def __repr__(self) -> str:
        return f"Siblings({', '.join(self.names)})"

    def __call__(self, layers: Mapping[str, Any], x: Any) -> list[Any]:
        """The output of each head.

        Args:
            layers: the model's, by name.
            x: what all take, [..., F].
        """
        return run_heads(self, [layers[name] for name in self.names], x)

    def recipe(self, heads: Sequence[nn.Module]) -> _Recipe:
        """The one for these heads as they are."""
        if torch.compiler.is_compiling() or transformed():  # a graph is guarded by what it reads, not by a memo
            return _Recipe(heads)
        known = self._known
        if known is None or not known[1].holds(heads):
            recipe = _Recipe(heads, None if known is None else known[0])
            known = self._known = recipe, Proof(heads, *recipe.seen)
        return known[0]


def run_heads(siblings: Siblings, heads: Sequence[Any], x: Any) -> list[Any]:
    """The output of each head."""
    if type(x) not in _TENSORS or not x.is_floating_point() or x.dim() == 0:
        return [head(x) for head in heads]
    least = _LEAST.get(x.device.type, _FEWEST)
    if len(heads) < least:
        return [head(x) for head in heads]
    recipe = siblings.recipe(heads)
    made: list[Any] = [None] * len(heads)
    for part in recipe.parts:
        together = len(part.heads) >= least
        ys = _run(part, x) if together else [heads[i](x) for i in part.heads]
        for i, y in zip(part.heads, ys, strict=True):
            made[i] = y
    for i in recipe.alone:
        made[i] = heads[i](x)
    return made


def _run(part: _Part, x: Tensor) -> Sequence[Tensor]:
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    for module in part.before:
        rows = module(rows)
    T = len(part.heads)
    parameters = [d[name] for d, name in part.parameters]
    whole = None if torch.compiler.is_compiling() else part.memory(parameters)
    made = chains(rows, part.layers, parameters, T, whole)
    return made if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[1]) for y in made]
