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
    Leaf,
    channels,
    is_flat,
    is_spatial,
    leaves,
    rank,
    sequences,
)
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
    the layer before a router. In training what was folded is no longer masked: zero weights may move.

    A router over axis 1 after a Linear is taken for one of [B, features]: a Flatten in its place refuses or flattens
    inputs of more axes, whose axis 1 it would have masked. ``axis=-1`` is for those.

    Args:
        model: with TaskRouters in Sequentials; not changed.
        task: which.

    Raises:
        IndexError: no such task.
        ValueError: naming a router that nothing before it can take in.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 16), fastroute.TaskRouter(16, 4, 0.5), nn.ReLU(), nn.Linear(16, 2)).eval()
        >>> folded = fastroute.fold(net, 3)
        >>> folded[1], int((folded[0].weight.abs().sum(1) > 0).sum())
        (Flatten(start_dim=1, end_dim=-1), 8)
    """
    task = _checked(task, task_count_of(model))
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, sequence in sequences(model):
        chain = list(leaves(sequence, name))
        for n, leaf in enumerate(chain):
            if isinstance(leaf.module, TaskRouter) and leaf.module.use_routing:
                at = _layer_before(chain, n)  # which says what is wrong before anything is copied
                places = max((uses[id(p)] for p in at.module.parameters(recurse=False)), default=1)
                if places > 1:
                    raise ValueError(
                        f"{at.name}: expected a layer of its own before the router, got one whose parameters are used "
                        f"in {places} places"
                    )
    model = copy.deepcopy(model)
    for name, sequence in list(sequences(model)):
        chain = list(leaves(sequence, name))
        instead: list[nn.Module] = []
        for n, leaf in enumerate(chain):
            if isinstance(leaf.module, TaskRouter):
                flat = True
                if leaf.module.use_routing:
                    layer = _layer_before(chain, n).module
                    _into(layer, leaf.module._unit_mapping[task] == 0, _dtype_at(chain, n))
                    flat = _axis(layer) == leaf.module.axis or is_flat(chain[:n])
                instead.append(nn.Identity() if flat else nn.Flatten(1).train(leaf.module.training))
        for leaf in chain:
            if isinstance(leaf.module, TaskRouter):
                leaf.parent._modules[leaf.key] = instead.pop(0)
    for name, router in routers_of(model).items() if _has_routers(model) else ():
        raise ValueError(f"{name}: expected routers in Sequentials, got one in another module ({router.name})")
    if isinstance(model, VGG):
        model.set_active_task(task)
    return _plain(model)


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
    """That of the parameters before a router; the masks' own if there are none."""
    router: Any = chain[n].module
    tensors = (t for leaf in reversed(chain[:n]) for t in (*leaf.module.parameters(), *leaf.module.buffers()))
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


def _plain(model: nn.Module) -> nn.Module:
    """LiveSequentials have nothing live to look for any more."""
    if isinstance(model, LiveSequential):
        made = nn.Sequential()
        made.__dict__.update({name: value for name, value in model.__dict__.items() if name not in LiveSequential.OWN})
        model = made
    for key, child in model._modules.items():
        if child is not None:
            model._modules[key] = _plain(child)
    return model
