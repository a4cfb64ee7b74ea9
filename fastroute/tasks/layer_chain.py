"""Sequentials as flat chains of layers, and what each layer does to channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules.reading import is_pristine, may_be_read
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
_DROPOUTS: tuple[type[nn.Module], ...] = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_OTHERS: tuple[type[nn.Module], ...] = (
    *(nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.Hardtanh, nn.PReLU, nn.Flatten),
    *_DROPOUTS,
)

CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS: tuple[type[nn.Module], ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
#: Over the last axis.
FEATURE_NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm)

#: What a layer does with its input's channels (axis 1).
MIX, NORM, ROUTER, KEEP, ALONE, DROP, FLAT, OPAQUE = "mix", "norm", "router", "keep", "alone", "drop", "flat", "opaque"


class Leaf(NamedTuple):
    """A layer of a chain, and where it is registered."""

    name: str  #: its path in the model
    module: Any  #: an nn.Module, of whatever kind its ``kind`` says
    parent: nn.Sequential
    key: str

    @property
    def kind(self) -> str:
        return kind(self.module)


def is_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether its forward calls its children one after the other and does nothing else."""
    forward = type(module).forward
    return (
        isinstance(module, nn.Sequential)
        and (forward is nn.Sequential.forward or getattr(forward, "is_a_sequence", False))
        and "forward" not in module.__dict__
        and is_pristine(type(module))
    )


def leaves(sequence: nn.Sequential, name: str = "") -> Iterator[Leaf]:
    """The layers of a Sequential and of the Sequentials in it, in the order of their calls."""
    for key, child in sequence._modules.items():
        path = f"{name}.{key}" if name else key
        if child is None:
            continue
        if is_sequence(child) and may_be_read(child):
            yield from leaves(child, path)
        else:
            yield Leaf(path, child, sequence, key)


def opened(sequence: nn.Sequential) -> Iterator[nn.Sequential]:
    """The Sequential itself, and all in it that ``leaves`` opens."""
    yield sequence
    for child in sequence._modules.values():
        if child is not None and is_sequence(child) and may_be_read(child):
            yield from opened(child)


def sequences(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Sequential]]:
    """The outermost Sequentials of a model, with their paths."""
    if is_sequence(model):
        yield name, model
        for leaf in leaves(model, name):
            yield from sequences(leaf.module, leaf.name)
    else:
        for key, child in model.named_children():
            yield from sequences(child, f"{name}.{key}" if name else key)


def kind(module: nn.Module) -> str:
    """One of MIX, NORM, ROUTER, KEEP, ALONE, DROP, FLAT; OPAQUE for what is none of these, or has to be called."""
    exact = type(module)
    if not may_be_read(module):
        return OPAQUE
    if isinstance(module, TaskRouter):
        return ROUTER if exact.forward is TaskRouter.forward else OPAQUE
    if exact is nn.Conv2d:
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
    if exact in _DROPOUTS:
        return DROP
    if exact is nn.Flatten:
        return FLAT if module.start_dim == 1 and module.end_dim == -1 else OPAQUE
    return OPAQUE


def written_into(chain: Sequence[Leaf], n: int) -> Leaf | None:
    """The layer behind router n that writes in place into what an activation before it gave, once the router is gone.

    The activation's gradient reads its output. None: there is no such layer.
    """

    def passes(leaf: Leaf) -> bool:
        return leaf.kind in (ROUTER, FLAT, DROP) or type(leaf.module) is nn.Identity

    before = next((leaf for leaf in reversed(chain[:n]) if not passes(leaf)), None)
    if before is None or before.kind not in (KEEP, ALONE):
        return None
    behind = (leaf for leaf in chain[n + 1 :] if getattr(leaf.module, "inplace", False) or not passes(leaf))
    found = next(behind, None)
    return found if found is not None and getattr(found.module, "inplace", False) else None


def is_known(module: nn.Module) -> bool:
    """Whether its class alone does not make it OPAQUE."""
    exact = type(module)
    return is_sequence(module) or exact in _KEEP_ZERO or exact in _ALONE or exact in _OTHERS


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
    if isinstance(module, nn.Conv2d):
        return 4
    name = type(module).__name__
    return int(name[-2]) + 2 if name[-1] == "d" and name[-2].isdigit() else None


def is_spatial(module: nn.Module) -> bool:
    """Whether a layer that treats channels alone needs axes behind them."""
    return rank(module) is not None or isinstance(module, nn.Upsample)


def is_flat(chain: list[Leaf]) -> bool:
    """Whether the layers, one after the other, are known to give [B, features]."""
    for leaf in reversed(chain):
        if leaf.kind == FLAT:
            return True
        if leaf.kind == OPAQUE and type(leaf.module) not in (nn.PReLU, nn.GroupNorm, *FEATURE_NORMS):
            return False
    return False


class Step(NamedTuple):
    """What a live chain runs next."""

    kind: str
    layer: Any  #: an nn.Module of this kind
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
        if leaf.kind == ROUTER and leaf.module.unit_count == units and (leaf.module.axis == 1 or axes == 2):
            return norm, leaf.module
        if leaf.kind not in (KEEP, ALONE) or rank(leaf.module) not in (None, axes):
            break
        if axes == 2 and is_spatial(leaf.module):
            break
    return None, None
