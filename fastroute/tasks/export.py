"""One task's network on its own, and how much tasks share."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops._arguments import checked
from ..ops._modules import why_called
from .active import task_index
from .chain import ALONE, DROP, FLAT, KEEP, MIX, NORM, Leaf
from .flow import flow
from .layers import _shape
from .router import TaskRouter


class Overlap(NamedTuple):
    """How much pairs of tasks share."""

    routers: dict[str, Tensor]  #: [T, T] float64 of every router, by its path
    overall: Tensor  #: [T, T] float64 of all units of all routers together


def routers_of(model: nn.Module) -> dict[str, TaskRouter]:
    """The routers of a model by their paths.

    Raises:
        ValueError: there are none, or they are for different numbers of tasks.
    """
    found = {name or "router": m for name, m in model.named_modules() if isinstance(m, TaskRouter)}
    if not found:
        raise ValueError(f"model: expected a model with TaskRouters, got none in {type(model).__name__}")
    counts = {name: router.task_count for name, router in found.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"model: expected routers for one number of tasks, got {counts}")
    return found


@checked
def mask_overlap(model: nn.Module, measure: str = "jaccard") -> Overlap:
    """What share of their units tasks have in common, pair by pair.

    Args:
        model: with TaskRouters, or one.
        measure: "jaccard", units of both tasks / units of either; or "shared", units of both / units of the row's task.
            Tasks without units share nothing: 0.

    Raises:
        ValueError: naming the argument.
    """
    if measure not in ("jaccard", "shared"):
        raise ValueError(f'measure: expected "jaccard" or "shared", got {measure!r}')
    both, single = {}, {}
    for name, router in routers_of(model).items():
        kept = (router._unit_mapping.detach() != 0).to("cpu", torch.float64)
        both[name], single[name] = kept @ kept.T, kept.sum(1)

    def share(common: Tensor, units: Tensor) -> Tensor:
        row = units.unsqueeze(1)
        total = row + units - common if measure == "jaccard" else row
        return common / total.clamp(min=1)

    overall = share(torch.stack(list(both.values())).sum(0), torch.stack(list(single.values())).sum(0))
    return Overlap({name: share(both[name], single[name]) for name in both}, overall)


@checked
def extract_task(model: nn.Module, task: int) -> nn.Sequential:
    """The network of one task, without the channels that are off, in torch.nn modules only.

    Its outputs are those of the routed model in eval mode up to rounding. Layers keep their names: the result is a
    Sequential of Sequentials with the routed model's keys, without the routers'. It shares no memory with the
    model, has
    its mode (train or eval) and can be trained on, saved and loaded by torch alone.

    Args:
        model: routed Sequentials (``route``, ``live``), a ``VGG``, or a module whose forward calls layers one
        after the other,
            as torch.fx sees it.
        task: which.

    Raises:
        IndexError: no such task.
        ValueError: naming the layer through which channels cannot be followed, or where a branch is.
    """
    counted = next(iter(routers_of(model).values())).task_count
    task = _checked(task, counted)
    layers = flow(model, task)
    made: list[tuple[str, nn.Module]] = []
    held: _Kept | None = None  # the channels that are left of the model's
    for n, leaf in enumerate(layers):
        made_layer, held = _slim(leaf, layers[n + 1 :], held, task)
        if made_layer is not None:
            made.append((leaf.name, made_layer))
    if held is not None:
        raise ValueError(
            f"{layers[-1].name}: expected a layer after the last router that reads all channels (a convolution, "
            "a Linear), "
            f"got the end of the model, whose outputs would be fewer; use fold"
        )
    return _nested(made, model.training)


class _Kept(NamedTuple):
    left: Tensor  #: the channels that are left, [L]
    width: int  #: how many there are in the model
    flat: bool = False  #: features [B, ...]: every channel is as many of them as the next layer says
    masked: bool = False  #: the router has been passed, so the channels that are missing are zero


def _slim(leaf: Leaf, rest: list[Leaf], held: _Kept | None, task: int) -> tuple[nn.Module | None, _Kept | None]:
    """The layer on the channels that are left, or None for a router; and the channels left behind it."""
    module, kind = leaf.module, leaf.kind
    if isinstance(module, TaskRouter):
        kept = _kept(module, task)
        if held is None and len(kept.left) == kept.width:
            return None, None
        if held is None or held.width != kept.width or not torch.equal(held.left, kept.left):
            raise ValueError(
                f"{leaf.name}: expected a convolution or Linear before the router, whose outputs it can thin out"
            )
        return None, held._replace(masked=True)
    if kind == MIX:
        router = _router_behind(rest, module)
        behind = None if router is None else _kept(router, task)
        if behind is not None and len(behind.left) == behind.width:
            behind = None
        made = _slim_mix(leaf, None if held is None else _inputs(leaf, held), behind)
        return made, None if behind is None else behind._replace(flat=isinstance(module, nn.Linear))
    if held is None:
        return _copied(leaf), None
    if kind == FLAT and held.masked:
        return _copied(leaf), held._replace(flat=True)
    if kind in (KEEP, DROP) or (kind == ALONE and not held.masked):
        return _copied(leaf), held
    if kind == NORM and not held.masked:
        return _slim_norm(leaf, held), held
    raise ValueError(
        f"{leaf.name}: expected layers that treat channels alone and make 0 of 0 between a router and the "
        "Conv2d or Linear "
        f"that reads it, got {type(module).__name__}{_because(module)}"
    )


def _because(module: nn.Module) -> str:
    """Why a layer of a class that could be followed cannot be."""
    why = why_called(module)
    if why is None and getattr(module, "groups", 1) != 1:
        why = f"groups={module.groups}"
    return "" if why is None else f" with {why}"


def _kept(router: TaskRouter, task: int) -> _Kept:
    width = router.unit_count
    if not router.use_routing:
        return _Kept(torch.arange(width, device=router._unit_mapping.device), width)
    live = router._unit_mapping[task] != 0
    order = live.to(torch.int8).argsort(descending=True, stable=True)
    index = order[: int(live.sum())]
    if not len(index):
        raise ValueError(
            f"task: expected a task with units in every router, got {task}, which has none in {router.name}"
        )
    return _Kept(index, width)


def _router_behind(rest: list[Leaf], layer: nn.Module) -> TaskRouter | None:
    """The router that masks a layer's outputs, if what is between gives each channel its own."""
    for leaf in rest:
        if isinstance(leaf.module, TaskRouter):
            units = _shape(layer)[0]
            return leaf.module if leaf.module.unit_count == units else None
        if leaf.kind not in (NORM, KEEP, ALONE, DROP):
            return None
    return None


def _inputs(leaf: Leaf, held: _Kept) -> Tensor:
    """The columns of a layer's weight that are left."""
    width = _shape(leaf.module)[1]
    positions, over = divmod(width, held.width)
    if over or (positions != 1 and not held.flat) or held.flat != isinstance(leaf.module, nn.Linear):
        raise ValueError(f"{leaf.name}: expected a multiple of the router's {held.width} units as inputs, got {width}")
    if positions == 1:
        return held.left
    return (held.left.unsqueeze(1) * positions + torch.arange(positions, device=held.left.device)).flatten()


def _picked(t: Tensor | None, index: Tensor | None, axis: int = 0) -> Tensor | None:
    if t is None:
        return None
    return (t.detach() if index is None else t.detach().index_select(axis, index)).clone()


def _set(layer: nn.Module, name: str, value: Tensor | None) -> None:
    if value is not None:
        old = getattr(layer, name)
        new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        setattr(layer, name, new)


def _slim_mix(leaf: Leaf, inp: Tensor | None, kept: _Kept | None) -> nn.Module:
    old: Any = leaf.module
    out = None if kept is None else kept.left
    weight = _picked(_picked(old.weight, inp, 1), out)
    assert isinstance(weight, Tensor)
    options: dict[str, Any] = {"bias": old.bias is not None, "device": weight.device, "dtype": weight.dtype}
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(weight.shape[1], weight.shape[0], **options)
    else:
        new = nn.Conv2d(
            weight.shape[1], weight.shape[0], old.kernel_size, old.stride, old.padding, old.dilation, **options
        )
    _set(new, "weight", weight)
    _set(new, "bias", _picked(old.bias, out))
    return new.train(old.training)


def _slim_norm(leaf: Leaf, held: _Kept) -> nn.Module:
    old: Any = leaf.module
    if old.num_features != held.width:
        raise ValueError(
            f"{leaf.name}: expected a BatchNorm over the router's {held.width} units, got {old.num_features}"
        )
    new = copy.deepcopy(old)
    new.num_features = len(held.left)
    for name in ("weight", "bias", "running_mean", "running_var"):
        _set(new, name, _picked(getattr(old, name), held.left))
    return new  # type: ignore[no-any-return]


def _copied(leaf: Leaf) -> nn.Module:
    foreign = [type(m).__name__ for m in leaf.module.modules() if not type(m).__module__.startswith("torch.nn.")]
    reasons = [why for m in leaf.module.modules() if (why := why_called(m)) is not None]
    if foreign or reasons:
        raise ValueError(f"{leaf.name}: expected modules of torch.nn without hooks, got {(foreign or reasons)[0]}")
    return copy.deepcopy(leaf.module)


def _nested(layers: list[tuple[str, nn.Module]], training: bool) -> nn.Sequential:
    """Sequentials in Sequentials, by the dots in the names; a part called twice, with others between, gets a "
    "new name."""
    top: OrderedDict[str, Any] = OrderedDict()
    for name, layer in layers:
        *path, key = name.split(".")
        inner = top
        for part in path:
            last = next(reversed(inner), None)
            if last != part or not isinstance(inner[part], OrderedDict):
                part = _free(part, inner)
                inner[part] = OrderedDict()
            inner = inner[part]
        inner[_free(key, inner)] = layer

    def build(parts: OrderedDict[str, Any]) -> nn.Sequential:
        made = nn.Sequential(OrderedDict((k, build(v) if isinstance(v, OrderedDict) else v) for k, v in parts.items()))
        made.training = training  # layers have their own mode
        return made

    return build(top)


def _free(key: str, taken: OrderedDict[str, Any]) -> str:
    while key in taken:
        key += "_"
    return key


def _checked(task: object, task_count: int) -> int:
    index = task_index(task, task_count)
    if isinstance(index, Tensor):
        raise TypeError(f"task: expected an int, got a tensor {list(index.shape)}")
    return index
