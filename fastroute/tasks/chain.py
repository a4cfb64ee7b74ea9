"""Sequentials as flat chains of layers, and what each layer does to channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .router import TaskRouter

#: Layers that treat every channel alone and give 0 for 0, so that a masked channel needs no computing.
_KEEP_ZERO: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Hardswish, nn.Softsign, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Identity),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
)
#: Layers that treat every channel alone, but make something of 0.
_ALONE: tuple[type[nn.Module], ...] = (nn.Sigmoid, nn.Softplus, nn.LogSigmoid, nn.Hardsigmoid)

#: What a layer does with its input's channels (axis 1).
MIX, NORM, ROUTER, KEEP, ALONE, DROP, FLAT, OPAQUE = "mix", "norm", "router", "keep", "alone", "drop", "flat", "opaque"


class Leaf(NamedTuple):
    """A layer of a chain, and where it is registered."""

    name: str  #: its path in the model
    module: nn.Module
    parent: nn.Sequential
    key: str

    @property
    def kind(self) -> str:
        return kind(self.module)


def is_sequence(module: nn.Module) -> bool:
    """Whether its forward calls its children one after the other and does nothing else."""
    forward = type(module).forward
    return isinstance(module, nn.Sequential) and (
        forward is nn.Sequential.forward or getattr(forward, "is_a_sequence", False)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at its inputs or outputs, which then have to be the dense ones."""
    return any(
        getattr(module, name, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def leaves(sequence: nn.Sequential, name: str = "") -> Iterator[Leaf]:
    """The layers of a Sequential and of the Sequentials in it, in the order of their calls."""
    for key, child in sequence._modules.items():
        path = f"{name}.{key}" if name else key
        if child is None:
            continue
        if is_sequence(child) and not has_hooks(child):
            yield from leaves(child, path)  # type: ignore[arg-type]
        else:
            yield Leaf(path, child, sequence, key)


def sequences(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Sequential]]:
    """The outermost Sequentials of a model, with their paths."""
    if is_sequence(model):
        yield name, model  # type: ignore[misc]
        for leaf in leaves(model, name):  # type: ignore[arg-type]
            yield from sequences(leaf.module, leaf.name)
    else:
        for key, child in model.named_children():
            yield from sequences(child, f"{name}.{key}" if name else key)


def kind(module: nn.Module) -> str:
    """One of MIX, NORM, ROUTER, KEEP, ALONE, DROP, FLAT; OPAQUE for what is none of these, or has hooks."""
    if isinstance(module, TaskRouter):
        return OPAQUE if has_hooks(module) else ROUTER
    exact = type(module)
    if has_hooks(module):
        return OPAQUE
    if isinstance(module, nn.Conv2d) and exact.forward is nn.Conv2d.forward:
        return MIX if module.groups == 1 and module.padding_mode == "zeros" else OPAQUE
    if exact is nn.Linear:
        return MIX
    if exact in (nn.BatchNorm1d, nn.BatchNorm2d):
        return NORM
    if exact in _KEEP_ZERO:
        return OPAQUE if getattr(module, "return_indices", False) else KEEP
    if exact is nn.Hardtanh:
        return KEEP if module.min_val <= 0 <= module.max_val else ALONE  # type: ignore[operator]
    if exact is nn.PReLU:
        return KEEP if module.num_parameters == 1 else OPAQUE
    if exact in _ALONE:
        return ALONE
    if exact in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
        return DROP
    if exact is nn.Flatten:
        return FLAT if module.start_dim == 1 and module.end_dim == -1 else OPAQUE
    return OPAQUE


def channels(module: nn.Module) -> int:
    """How many channels a layer that MIXes, or NORMs, gives."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, _BatchNorm):
        return module.num_features
    return int(module.out_channels)  # type: ignore[arg-type]


def rank(module: nn.Module) -> int | None:
    """How many axes its input has to have for axis 1 to be that of channels; None if any number will do."""
    if isinstance(module, nn.Linear):
        return 2
    name = type(module).__name__
    return int(name[-2]) + 2 if name[-1] == "d" and name[-2].isdigit() else None


class Step(NamedTuple):
    """What a live chain runs next."""

    kind: str
    layer: nn.Module
    norm: nn.Module | None  #: the BatchNorm that follows a layer that MIXes, if a router does afterwards
    router: TaskRouter | None  #: what masks its outputs before anything but itself and lone channels see them


def steps(chain: list[Leaf]) -> list[Step]:
    """The chain with every layer that MIXes told which router comes behind it, if one does."""
    found: list[Step] = []
    n = 0
    while n < len(chain):
        layer, what = chain[n].module, chain[n].kind
        n += 1
        norm, router = None, None
        if what == MIX:
            norm, router = _behind(layer, chain[n:])
            n += norm is not None
        found.append(Step(what, layer, norm, layer if isinstance(layer, TaskRouter) else router))
    return found


def _behind(layer: nn.Module, rest: list[Leaf]) -> tuple[nn.Module | None, TaskRouter | None]:
    axes, units = rank(layer), channels(layer)
    norm = None
    if rest and rest[0].kind == NORM:
        norm, rest = rest[0].module, rest[1:]
        if type(norm) is not (nn.BatchNorm2d if axes == 4 else nn.BatchNorm1d) or channels(norm) != units:
            return None, None
    for leaf in rest:
        if leaf.kind == ROUTER and leaf.module.unit_count == units:
            return norm, leaf.module  # type: ignore[return-value]
        if leaf.kind not in (KEEP, ALONE) or rank(leaf.module) not in (None, axes):
            break
    return None, None
