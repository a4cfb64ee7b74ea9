"""One task's masks as zeros in the weights before them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..ops._arguments import checked
from ..ops._modules import why_called
from .chain import DROP, KEEP, Leaf, leaves, sequences
from .export import _checked, routers_of
from .live import LiveSequential
from .router import TaskRouter
from .vgg import VGG

#: What a router's zeros can be moved into.
_FOLDED: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)


@checked
def fold(model: nn.Module, task: int) -> nn.Module:
    """A copy of the model for one task, whose masks are zeros in weights and biases: masking then costs nothing.

    A router is folded into the convolution, Linear or BatchNorm before it and replaced by an Identity, so all
    other keys
    stay. Outputs are those of the routed model, in training and eval. Unlike ``extract_task`` it keeps all shapes, and
    follows no channels further than to the layer before a router. In training what was folded is no longer masked: zero
    weights may move.

    Args:
        model: with TaskRouters in Sequentials; not changed.
        task: which.

    Raises:
        IndexError: no such task.
        ValueError: naming a router that nothing before it can take in.
    """
    task = _checked(task, next(iter(routers_of(model).values())).task_count)
    for name, sequence in sequences(model):
        chain = list(leaves(sequence, name))
        for n, leaf in enumerate(chain):
            if isinstance(leaf.module, TaskRouter) and leaf.module.use_routing:
                _layer_before(chain, n)  # which says what is wrong before anything is copied
    model = copy.deepcopy(model)
    for name, sequence in list(sequences(model)):
        chain = list(leaves(sequence, name))
        for n, leaf in enumerate(chain):
            if isinstance(leaf.module, TaskRouter) and leaf.module.use_routing:
                _into(_layer_before(chain, n), leaf, leaf.module._unit_mapping[task] == 0)
        for leaf in chain:
            if isinstance(leaf.module, TaskRouter):
                leaf.parent._modules[leaf.key] = nn.Identity()
    for name, router in routers_of(model).items() if _has_routers(model) else ():
        raise ValueError(f"{name}: expected routers in Sequentials, got one in another module ({router.name})")
    if isinstance(model, VGG):
        model.set_active_task(task)
    return _plain(model)


def _has_routers(model: nn.Module) -> bool:
    return any(isinstance(m, TaskRouter) for m in model.modules())


def _layer_before(chain: list[Leaf], n: int) -> nn.Module:
    """What a router's zeros can be moved into: m f(x) = f(m x) where f gives every channel its own and 0 for 0."""
    for leaf in reversed(chain[:n]):
        if isinstance(leaf.module, (_ConvNd, nn.Linear, _BatchNorm)):
            why = why_called(leaf.module)
            if why is None and type(leaf.module) not in _FOLDED:
                why = "a subclass"
            if why is not None:
                raise ValueError(
                    f"{leaf.name}: expected a layer before the router whose weights say what it does, got a "
                    f"{type(leaf.module).__name__}: {why}"
                )
            return leaf.module
        if leaf.kind not in (KEEP, DROP):
            break
    raise ValueError(
        f"{chain[n].name}: expected a convolution, Linear or BatchNorm before the router, with nothing between "
        "that makes "
        f"something of 0, got {type(chain[n - 1].module).__name__ if n else 'nothing'}"
    )


@torch.no_grad()
def _into(layer: nn.Module, router: Leaf, off: Tensor) -> None:
    if isinstance(layer, _BatchNorm) and not layer.affine:
        layer.affine = True
        like: Any = router.module._unit_mapping if layer.running_mean is None else layer.running_mean
        layer.weight = nn.Parameter((~off).to(like.dtype))
        layer.bias = nn.Parameter(torch.zeros_like(layer.weight))
        return
    weight: Any = layer.weight
    axis = int(isinstance(layer, _ConvTransposeNd))
    if len(off) != weight.shape[axis] or (axis and layer.groups != 1):
        raise ValueError(f"{router.name}: expected {len(off)} outputs of the layer before, got {weight.shape[axis]}")
    weight.masked_fill_(off.view(*[1] * axis, -1, *[1] * (weight.dim() - 1 - axis)), 0)
    if layer.bias is not None:
        layer.bias.masked_fill_(off, 0)  # type: ignore[operator]


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
