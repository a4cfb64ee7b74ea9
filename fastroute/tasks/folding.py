"""One task's masks as zeros in the weights before them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..modules.reading import may_be_read, why_called
from ..ops.arguments import checked
from .export import _checked, routers_of, task_count_of
from .layer_chain import (
    BATCH_NORMS,
    CONVOLUTIONS,
    DROP,
    FEATURE_NORMS,
    INSTANCE_NORMS,
    KEEP,
    ROUTER,
    Leaf,
    channels,
    is_flat,
    is_spatial,
    kind,
    leaves,
    rank,
    sequences,
    written_into,
)
from .layers import RoutedConv2d, RoutedLinear
from .live_model import LiveSequential
from .router import TaskRouter
from .vgg import VGG

#: What a router's zeros can be moved into: it has a weight (or none) for each channel.
_FOLDED: tuple[type[nn.Module], ...] = (
    *(*CONVOLUTIONS, nn.Linear, *BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, *FEATURE_NORMS),
)


@checked
def fold(model: nn.Module, task: int) -> nn.Module:
    """A copy of the model for one task, whose masks are zeros in weights and biases: masking then costs nothing.

    A router is folded into the convolution, Linear or norm before it (BatchNorm, GroupNorm, InstanceNorm; over the
    last axis LayerNorm, RMSNorm) and replaced by an Identity, so all other keys stay. Outputs are those of the routed
    model, in training and eval. Unlike ``extract_task`` it keeps all shapes, and follows no channels further than to
    the layer before a router. In training what was folded is no longer masked: zero weights may move. RoutedConv2d and
    RoutedLinear become plain layers, with zeros for their routers, too.

    A router over axis 1 after a Linear is taken for one of [B, features]: a Flatten in its place refuses or flattens
    inputs of more axes, whose axis 1 it would have masked. ``axis=-1`` is for those.

    Args:
        model: with TaskRouters in Sequentials; not changed.
        task: which.

    Raises:
        IndexError: no such task.
        ValueError: naming a router that nothing before it can take in, or a layer whose zeros would be others' too.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 16), fastroute.TaskRouter(16, 4, 0.5), nn.ReLU(), nn.Linear(16, 2)).eval()
        >>> folded = fastroute.fold(net, 3)
        >>> folded[1], int((folded[0].weight.abs().sum(1) > 0).sum())
        (Flatten(start_dim=1, end_dim=-1), 8)
    """
    task = _checked(task, task_count_of(model))
    uses = _uses(model)
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedConv2d | RoutedLinear):
            _check_routed(name, layer, uses)
    for name, sequence in sequences(model):
        chain = list(leaves(sequence, name))
        for n, leaf in enumerate(chain):
            if isinstance(leaf.module, TaskRouter) and leaf.module.use_routing:
                at = _layer_before(chain, n)  # which says what is wrong before anything is copied
                _check_own(at, uses)
    model = copy.deepcopy(model)
    uses = _uses(model)
    for name, sequence in list(sequences(model)):
        chain = list(leaves(sequence, name))
        instead: list[nn.Module] = []
        for n, leaf in enumerate(chain):
            if isinstance(leaf.module, TaskRouter):
                flat = True
                if leaf.module.use_routing:
                    at, off = _layer_before(chain, n), leaf.module._unit_mapping[task] == 0
                    layer = at.module
                    _into(layer, off, _dtype_at(chain, n))
                    _make_finite(chain[: chain.index(at) + 1], leaf.module, off, uses)
                    flat = _axis(layer) == leaf.module.axis or is_flat(chain[:n])
                instead.append(nn.Identity() if flat else nn.Flatten(1).train(leaf.module.training))
        for n, leaf in enumerate(chain):
            if isinstance(leaf.module, TaskRouter):
                if (writes := written_into(chain, n)) is not None:
                    writes.module.inplace = False
                leaf.parent._modules[leaf.key] = instead.pop(0)
    for name, router in routers_of(model).items() if _has_routers(model) else ():
        raise ValueError(f"{name}: expected routers in Sequentials, got one in another module ({router.name})")
    if isinstance(model, VGG):
        model.set_active_task(task)
    return _plain(model, task)


def _uses(model: nn.Module) -> Counter[int]:
    """In how many places a module, or a parameter, is; by its id."""
    every = (model.named_parameters(remove_duplicate=False), model.named_modules(remove_duplicate=False))
    return Counter(id(found) for named in every for _, found in named)


def _check_own(leaf: Leaf, uses: Counter[int]) -> None:
    places = max(uses[id(found)] for found in (leaf.module, *leaf.module.parameters(recurse=False)))
    if places > 1:
        raise ValueError(
            f"{leaf.name}: expected a layer of its own before the router, got one that is used, or whose parameters "
            f"are, in {places} places"
        )


def _check_routed(name: str, layer: RoutedConv2d | RoutedLinear, uses: Counter[int]) -> None:
    """Refuses a layer whose routers' zeros cannot be moved into its weight."""
    places = max(uses[id(found)] for found in (layer, *layer.parameters()))
    why = None
    if type(layer) not in (RoutedConv2d, RoutedLinear):
        why = "a subclass"
    elif layer.compact_input or layer.compact_output:
        why = "compact ends"
    elif places > 1:
        why = f"parameters that are used in {places} places"
    elif any(r is not None and kind(r) != ROUTER for r in (layer.input_router, layer.output_router)):
        why = "a router with hooks or a forward of its own"
    else:
        why = why_called(layer)
    if why is not None:
        raise ValueError(f"{name}: expected a {type(layer).__name__} that zeros in its weight can stand for, got {why}")


def _has_routers(model: nn.Module) -> bool:
    return any(isinstance(m, TaskRouter) for m in model.modules())


def _axis(layer: Any) -> int:
    """Where the channels are that it has a weight for."""
    return -1 if isinstance(layer, (nn.Linear, *FEATURE_NORMS)) else 1


def _layer_before(chain: list[Leaf], n: int) -> Leaf:
    """What a router's zeros can be moved into: m f(x) = f(m x) where f gives every element its own and 0 for 0."""
    router: Any = chain[n].module
    pools = False  # some layer between needs axes behind the channels
    for leaf in reversed(chain[:n]):
        layer: Any = leaf.module
        if isinstance(layer, (_ConvNd, *_FOLDED)):
            why = _refuses(layer, router)
            if why is not None:
                raise ValueError(
                    f"{leaf.name}: expected a layer before the router whose weights say what it does, got a "
                    f"{type(layer).__name__}: {why}"
                )
            if pools and _axis(layer) == -1:
                break
            return leaf
        if leaf.kind not in (KEEP, DROP) and not (type(layer) is nn.PReLU and may_be_read(layer)):
            break
        pools = pools or (leaf.kind == KEEP and is_spatial(layer))
    raise ValueError(
        f"{chain[n].name}: expected a convolution, Linear or norm before the router, with nothing between "
        "that makes something of 0 or mixes features, got "
        f"{type(chain[n - 1].module).__name__ if n else 'nothing'}"
    )


def _refuses(layer: Any, router: TaskRouter) -> str | None:
    """Why a router's zeros cannot be moved into a layer."""
    exact = type(layer)
    if (why := why_called(layer)) is not None or exact not in _FOLDED:
        return why or "a subclass"
    if _axis(layer) != router.axis and (rank(layer) or 2) > 2 and exact is not nn.BatchNorm1d:
        return f"channels on axis 1, where a router with axis={router.axis} would mask positions"
    if exact in FEATURE_NORMS:
        units = layer.normalized_shape[0] if len(layer.normalized_shape) == 1 else None
    elif exact is nn.GroupNorm:
        units = layer.num_channels
    else:
        units = layer.num_features if exact in (*BATCH_NORMS, *INSTANCE_NORMS) else channels(layer)
    return None if units == router.unit_count else f"{units} outputs for a router of {router.unit_count}"


def _dtype_at(chain: list[Leaf], n: int) -> torch.dtype:
    """That of the parameters before a router; the masks' own if there are none. Masks may have another."""
    router: Any = chain[n].module
    layers = (leaf.module for leaf in reversed(chain[:n]) if not isinstance(leaf.module, TaskRouter))
    tensors = (t for layer in layers for t in (*layer.parameters(), *layer.buffers()))
    return next((t.dtype for t in tensors if t.is_floating_point()), router._unit_mapping.dtype)


@torch.no_grad()
def _into(layer: Any, off: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(layer, (_ConvNd, nn.Linear)) and layer.weight is None:
        affine = "elementwise_affine" if isinstance(layer, FEATURE_NORMS) else "affine"
        setattr(layer, affine, True)
        layer.weight = nn.Parameter((~off).to(dtype))
        if not isinstance(layer, nn.RMSNorm):
            layer.bias = nn.Parameter(torch.zeros_like(layer.weight))
        return
    if isinstance(layer, _ConvTransposeNd):  # [inputs, outputs of a group, ...]
        grouped = layer.weight.view(layer.groups, -1, *layer.weight.shape[1:])
        grouped.masked_fill_(off.view(layer.groups, 1, -1, *[1] * (grouped.dim() - 3)), 0)
    else:
        layer.weight.masked_fill_(off.view(-1, *[1] * (layer.weight.dim() - 1)), 0)
    if getattr(layer, "bias", None) is not None:
        layer.bias.masked_fill_(off, 0)


@torch.no_grad()
def _make_finite(chain: list[Leaf], router: TaskRouter, off: Tensor, uses: Counter[int]) -> None:
    """A norm, the chain's last layer, times zero is zero only where what it is given and its statistics are finite."""
    for leaf, before in zip(reversed(chain), [*reversed(chain[:-1]), None], strict=True):
        norm: Any = leaf.module
        if type(norm) not in (*BATCH_NORMS, *INSTANCE_NORMS):
            break
        for statistic, usual in ((norm.running_mean, 0.0), (norm.running_var, 1.0)):
            if statistic is not None:
                statistic.masked_fill_(off & ~statistic.isfinite(), usual)
        if before is None or type(before.module) not in _FOLDED or _refuses(before.module, router) is not None:
            break
        if not all(bool(p.isfinite().all()) for p in before.module.parameters()):
            _check_own(before, uses)
            _into(before.module, off, router._unit_mapping.dtype)


def _plain(model: nn.Module, task: int) -> nn.Module:
    """LiveSequentials, and layers between routers, have no task to look for any more."""
    made: Any = model
    if isinstance(model, LiveSequential):
        made = nn.Sequential()
    elif isinstance(model, RoutedConv2d | RoutedLinear):
        cls = nn.Linear if isinstance(model, nn.Linear) else nn.Conv2d
        made = cls.__new__(cls)
        for axis, router in enumerate((model.output_router, model.input_router)):
            if router is not None and router.use_routing:
                off = router._unit_mapping[task] == 0
                with torch.no_grad():
                    model.weight.masked_fill_(off.view(*[1] * axis, -1, *[1] * (model.weight.dim() - 1 - axis)), 0)
                    if axis == 0 and model.bias is not None:
                        model.bias.masked_fill_(off, 0)
    if made is not model:
        own: tuple[str, ...] = model.OWN  # type: ignore[assignment]
        made.__dict__.update({name: value for name, value in model.__dict__.items() if name not in own})
    for key, child in made._modules.items():
        if child is not None:
            made._modules[key] = _plain(child, task)
    return made  # type: ignore[no-any-return]
