"""Task routers for a model that has none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..ops.arguments import Count, checked
from .layer_chain import Leaf, channels, leaves, sequences
from .masks import Sigma
from .router import TaskRouter


@checked
def route(
    model: nn.Module,
    task_count: Count,
    sigma: Sigma,
    *,
    generator: torch.Generator | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    **options: Any,
) -> nn.Module:
    """Puts a TaskRouter after every convolution of a model, or after the BatchNorm that follows it.

    This is upstream's placement (conv, [BatchNorm], router, ReLU). Convolutions have to be children of Sequentials, at
    any depth: a Sequential says what runs next. Everything else in the model stays as it is. Sequentials with numbers
    for names are renumbered, so a torchvision VGG's ``features`` get the keys of the routed VGG; others keep their
    names, and a router is ``taskrouter_<name of its layer>``. Masks are drawn in the order of the layers.

    Args:
        model: changed in place.
        task_count: T.
        sigma: of every router: an int is units off, a float a fraction of them.
        generator: of the masks; None for NumPy's global one, as upstream.
        where: (path, convolution or Linear) -> whether a router follows it; None for all convolutions. A network whose
            last convolution makes the result would leave that one out. After a Linear the router is over the last axis
            (``axis=-1``), where the features are.
        options: for every TaskRouter.

    Returns:
        ``model``. ``live(model)`` makes it compute live channels only.

    Raises:
        ValueError: a convolution is not in a Sequential, is used in two places or has a router already, or
            there is none; the message names the layer. Nothing is changed then.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> for layer in fastroute.route(net, task_count=4, sigma=0.5):
        ...     print(layer)
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
        BatchNorm2d(8, ...)
        TaskRouter(unit_count=8, task_count=4, sigma=0.5, name='taskrouter_1', inplace=False)
        ReLU()
    """
    chosen: list[tuple[Leaf, int, bool]] = []
    for name, sequence in sequences(model):
        chain = list(leaves(sequence, name))
        if any(isinstance(leaf.module, TaskRouter) for leaf in chain):
            raise ValueError(f"model: expected a model without routers, got {_where(name, sequence)} with one")
        for this, after in zip(chain, [*chain[1:], None], strict=True):
            if not _is_chosen(this, where):
                continue
            normed = after is not None and isinstance(after.module, _BatchNorm)
            place = after if normed and after is not None else this
            chosen.append((place, channels(this.module), isinstance(this.module, nn.Linear)))
    _check_all_found(model, where)
    if not chosen:
        raise ValueError(f"model: expected a convolution in a Sequential, got none in {type(model).__name__}")
    routers = []
    for leaf, units, is_linear in chosen:
        own = {"axis": -1 if is_linear else 1, **options}
        routers.append(TaskRouter(units, task_count, sigma, f"taskrouter_{leaf.name}", generator=generator, **own))
    added: dict[nn.Sequential, dict[str, TaskRouter]] = {}
    for (leaf, *_), router in zip(chosen, routers, strict=True):
        router.train(leaf.module.training)
        reference = next(leaf.module.parameters(), None)
        if reference is not None:
            router.to(reference.device)
        added.setdefault(leaf.parent, {})[leaf.key] = router
    for parent, new in added.items():
        _insert(parent, new)
    return model


def _where(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _is_chosen(leaf: Leaf, where: Callable[[str, nn.Module], bool] | None) -> bool:
    if where is None:
        return isinstance(leaf.module, _ConvNd)
    return isinstance(leaf.module, (_ConvNd, nn.Linear)) and where(leaf.name, leaf.module)


def _check_all_found(model: nn.Module, where: Callable[[str, nn.Module], bool] | None) -> None:
    in_chain = {leaf.name for name, sequence in sequences(model) for leaf in leaves(sequence, name)}
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not _is_chosen(Leaf(name, module, nn.Sequential(), ""), where):
            continue
        if name not in in_chain:
            path = name.rpartition(".")[0]
            owner = model.get_submodule(path)
            raise ValueError(
                f"model: expected every convolution in a Sequential, got {_where(name, module)} in "
                f"{_where(path, owner)}: "
                "its forward does not say what follows; put a TaskRouter there by hand, or leave it out with where="
            )
        if id(module) in seen:
            raise ValueError(
                f"model: expected every convolution in one place, got {_where(name, module)}, which is also "
                f"{seen[id(module)]}"
            )
        seen[id(module)] = name


def _insert(parent: nn.Sequential, new: dict[str, TaskRouter]) -> None:
    numbered = all(key == str(i) for i, key in enumerate(parent._modules))
    made: OrderedDict[str, Any] = OrderedDict()
    for key, child in parent._modules.items():
        made[str(len(made)) if numbered else key] = child
        if key in new:
            made[str(len(made)) if numbered else f"taskrouter_{key}"] = new[key]
    parent._modules.clear()
    parent._modules.update(made)
