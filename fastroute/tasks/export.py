"""One task's network on its own, and how much tasks share."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..modules.reading import may_be_read, why_called
from ..ops.arguments import checked
from .active_task import task_index
from .layer_chain import (
    ALONE,
    BATCH_NORMS,
    CONVOLUTIONS,
    DROP,
    FEATURE_NORMS,
    FLAT,
    INSTANCE_NORMS,
    KEEP,
    Leaf,
    channels,
    is_flat,
    is_spatial,
    rank,
    written_into,
)
from .router import TaskRouter
from .traced_chain import flow


class Overlap(NamedTuple):
    """How much pairs of tasks share.

    Examples:
        >>> net = fastroute.route(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), 4, 0.5)
        >>> overlap = fastroute.mask_overlap(net)
        >>> list(overlap.routers), overlap.overall.shape
        (['1', '4'], torch.Size([4, 4]))
    """

    routers: dict[str, Tensor]  #: [T, T] float64 of every router, by its path
    overall: Tensor  #: [T, T] float64 of all units of all routers together


def routers_of(model: nn.Module) -> dict[str, TaskRouter]:
    """The routers of a model by their paths.

    Raises:
        ValueError: there are none, or they are for different numbers of tasks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    found = {name or "router": m for name, m in model.named_modules() if isinstance(m, TaskRouter)}
    if not found:
        raise ValueError(f"model: expected a model with TaskRouters, got none in {type(model).__name__}")
    counts = {name: router.task_count for name, router in found.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"model: expected routers for one number of tasks, got {counts}")
    return found


def task_count_of(model: nn.Module) -> int:
    """The number of tasks of a model's routers, which all mask and do nothing else.

    Raises:
        ValueError: there are none, they are for different numbers of tasks, or one does something else.
    """
    routers = routers_of(model)
    for name, router in routers.items():
        why = why_called(router)
        if why is None and not type(router).forward.__module__.startswith("fastroute."):
            why = "a forward of its own"
        if why is None and router._scales():
            why = "masks of other numbers than 0 and 1"
        if why is not None and router.use_routing:
            raise ValueError(
                f"{name}: expected a router that masks and does nothing else, got a {type(router).__name__}: {why}"
            )
    return next(iter(routers.values())).task_count


@checked
def mask_overlap(model: nn.Module, measure: str = "jaccard") -> Overlap:
    """What share of their units tasks have in common, pair by pair. A unit is a task's where its mask is not 0.

    Args:
        model: with TaskRouters, or one.
        measure: "jaccard", units of both tasks / units of either; or "shared", units of both / units of the row's task.
            Tasks without units share nothing: 0.

    Raises:
        ValueError: naming the argument.

    Examples:
        >>> router = fastroute.TaskRouter(8, 3, 0.5, generator=torch.Generator().manual_seed(0))
        >>> fastroute.mask_overlap(router).overall.diagonal()
        tensor([1., 1., 1.], dtype=torch.float64)
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
    Sequential of Sequentials with the routed model's keys, without the routers'. It shares no memory with the model,
    has its mode (train or eval) and can be trained on, saved and loaded by torch alone.

    Channels are followed through convolutions of every kind, transposed ones too, and Linear, and between them through
    BatchNorm, InstanceNorm, GroupNorm whose groups are kept as a whole, PReLU, activations, pooling and Flatten. A
    grouped (depthwise) convolution stays one where its groups keep equal numbers of channels; elsewhere it becomes a
    dense one with zeros between groups, with the same outputs and more work.

    A router over axis 1 after a Linear is taken for one of [B, features]: a Flatten in its place refuses inputs of
    more axes, whose axis 1 the router would have masked. ``axis=-1`` is for those.

    Args:
        model: routed Sequentials (``route``, ``live``), a ``VGG``, or a module whose forward calls layers one
            after the other, as torch.fx sees it.
        task: which.

    Raises:
        IndexError: no such task.
        ValueError: naming the layer through which channels cannot be followed, or where a branch is.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 16), fastroute.TaskRouter(16, 4, 0.5), nn.ReLU(), nn.Linear(16, 2)).eval()
        >>> small = fastroute.extract_task(net, 3)
        >>> small[0], small[3]
        (Linear(in_features=8, out_features=8, bias=True), Linear(in_features=8, out_features=2, bias=True))
        >>> x = torch.randn(5, 8)
        >>> fastroute.set_task(net, 3)
        >>> torch.allclose(small(x), net(x), atol=1e-6)
        True
    """
    counted = task_count_of(model)
    task = _checked(task, counted)
    layers = flow(model, task)
    made: list[tuple[str, nn.Module]] = []
    held: _Kept | None = None  # the channels that are left of the model's
    writes = [written_into(layers, n) for n, leaf in enumerate(layers) if isinstance(leaf.module, TaskRouter)]
    for n, leaf in enumerate(layers):
        slim, held = _slim(leaf, layers[:n], layers[n + 1 :], held, task)
        if any(leaf is found for found in writes):
            slim[-1].inplace = False  # type: ignore[assignment]
        made += [(leaf.name if layer is slim[-1] else f"{leaf.name}_flat", layer) for layer in slim]
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
    axes: int = 2  #: 2: they are features, by a Linear or flattened; else those that the convolution gives
    last: bool = False  #: features that may be the last axis of several: [B, ..., L]
    masked: bool = False  #: the router has been passed, so the channels that are missing are zero


def _slim(
    leaf: Leaf, before: list[Leaf], rest: list[Leaf], held: _Kept | None, task: int
) -> tuple[list[nn.Module], _Kept | None]:
    """The layer on the channels that are left (none for a router), and the channels left behind it."""
    module, kind = leaf.module, leaf.kind
    if isinstance(module, TaskRouter):
        kept = _kept(module, task)
        if held is None and len(kept.left) == kept.width:
            return [], None
        if held is None or held.width != kept.width or not torch.equal(held.left, kept.left):
            last = next((b for b in reversed(before) if b.kind not in (KEEP, ALONE, DROP)), None)
            got = "nothing" if last is None else f"{last.name}, a {type(last.module).__name__}{_because(last.module)}"
            raise ValueError(
                f"{leaf.name}: expected a convolution or Linear before the router, whose outputs it can thin out, and "
                f"nothing between that mixes them, got {got}"
            )
        return _only_flat(before) if held.axes == 2 and not held.last else [], held._replace(masked=True)
    if is_mixing(module):
        router = router_behind(rest, module)
        behind = None if router is None else _kept(router, task)
        if behind is not None and len(behind.left) == behind.width:
            behind = None
        made = _slim_mix(leaf, None if held is None else _inputs(leaf, held), None if behind is None else behind.left)
        if behind is None or router is None:
            return [made], None
        return [made], behind._replace(axes=rank(module) or 0, last=rank(module) == 2 and router.axis == -1)
    if held is None:
        return [_copied(leaf)], None
    if held.axes != 2 or not is_spatial(module):
        if kind == FLAT and held.masked:
            return [_copied(leaf)], held._replace(axes=2)
        if kind in (KEEP, DROP) or (kind == ALONE and not held.masked):
            return [_copied(leaf)], held
    if _is_per_channel(module, held):
        return [*(_only_flat(before) if held.axes == 2 else []), _slim_per_channel(leaf, held)], held
    raise ValueError(
        f"{leaf.name}: expected layers that treat channels alone{' and make 0 of 0' if held.masked else ''} between a "
        f"{'router and the layer that reads it' if held.masked else 'layer and its router'}, got "
        f"{type(module).__name__}{_because(module)}"
    )


def _only_flat(before: list[Leaf]) -> list[nn.Module]:
    """Refuses inputs of more axes than [B, features], where axis 1 would not be that of features."""
    return [] if is_flat(before) else [nn.Flatten(1).train(before[-1].module.training)]


def _is_per_channel(module: Any, held: _Kept) -> bool:
    """Whether a layer has parameters or statistics of each channel (axis 1), and needs no other channel's values."""
    exact = type(module)
    if not may_be_read(module):
        return False
    if exact is nn.PReLU:
        return True
    if held.masked:
        return False
    if exact in INSTANCE_NORMS:
        return held.axes > 2
    if exact is nn.GroupNorm:  # groups that are kept or left out as a whole
        size = module.num_channels // module.num_groups
        counts = (held.left // size).bincount()
        return bool(((counts == 0) | (counts == size)).all())
    return exact in BATCH_NORMS


def _because(module: Any) -> str:
    """Why a layer of a class that could be followed cannot be."""
    why = why_called(module)
    if why is None and type(module) is nn.GroupNorm:
        why = f"groups of {module.num_channels // module.num_groups} channels, which it mixes"
    if why is None and type(module) in FEATURE_NORMS:
        why = "features, which it mixes"
    if why is None and rank(module) is not None and type(module) not in CONVOLUTIONS:
        why = f"inputs of {rank(module)} axes"
    return "" if why is None else f" with {why}"


def _kept(router: TaskRouter, task: int) -> _Kept:
    width = router.unit_count
    if not router.use_routing:
        return _Kept(torch.arange(width, device=router._unit_mapping.device), width)
    live = router._unit_mapping[task] != 0
    index = live.to(torch.int8).argsort(descending=True, stable=True)[: int(live.sum())]
    if not len(index):
        raise ValueError(
            f"task: expected a task with units in every router, got {task}, which has none in {router.name}"
        )
    return _Kept(index, width)


def is_mixing(module: nn.Module) -> bool:
    """Whether it is a convolution or Linear whose parameters say what it does."""
    return type(module) in (*CONVOLUTIONS, nn.Linear) and may_be_read(module)


def router_behind(rest: list[Leaf], layer: nn.Module) -> TaskRouter | None:
    """The router that masks a layer's outputs, if what is between gives each channel its own."""
    axes = rank(layer)
    for leaf in rest:
        if isinstance(leaf.module, TaskRouter):
            fits = leaf.module.unit_count == channels(layer) and (leaf.module.axis == 1 or axes == 2)
            return leaf.module if fits else None
        exact = type(leaf.module)
        if leaf.kind in (KEEP, ALONE, DROP):
            if axes == 2 and is_spatial(leaf.module):
                return None
        elif exact not in (nn.PReLU, nn.GroupNorm, *BATCH_NORMS, *INSTANCE_NORMS) or not may_be_read(leaf.module):
            return None
    return None


def _inputs(leaf: Leaf, held: _Kept) -> Tensor:
    """The columns of a layer's weight that are left."""
    layer: Any = leaf.module
    linear = isinstance(layer, nn.Linear)
    if (held.axes == 2) != linear:
        raise ValueError(
            f"{leaf.name}: expected a convolution to read a convolution's channels, a Linear to read a Linear's or "
            f"flattened ones, got {type(layer).__name__}"
        )
    width = layer.in_features if linear else layer.in_channels
    times, over = divmod(width, held.width)
    if over or (times != 1 and not linear):
        raise ValueError(f"{leaf.name}: expected a multiple of the router's {held.width} units as inputs, got {width}")
    steps = torch.arange(times, device=held.left.device)
    by_channel: Tensor = held.left.unsqueeze(1) * times + steps
    if held.last:  # flattened behind other axes
        by_channel = steps.unsqueeze(1) * held.width + held.left
    return by_channel.flatten()


def _picked(t: Tensor | None, index: Tensor | None, axis: int = 0) -> Tensor | None:
    if t is None:
        return None
    return (t.detach() if index is None else t.detach().index_select(axis, index)).clone()


def _set(layer: nn.Module, name: str, value: Tensor | None) -> None:
    if value is not None:
        old = getattr(layer, name)
        new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        setattr(layer, name, new)


def _slim_mix(leaf: Leaf, inp: Tensor | None, out: Tensor | None) -> nn.Module:
    old: Any = leaf.module
    new: Any = copy.deepcopy(old)
    if isinstance(old, nn.Linear):
        weight: Any = _picked(_picked(old.weight, inp, 1), out)
        new.out_features, new.in_features = weight.shape
    else:
        weight, new.groups = _slim_groups(old, inp, out)
        new.in_channels = old.in_channels if inp is None else len(inp)
        new.out_channels = old.out_channels if out is None else len(out)
    _set(new, "weight", weight)
    _set(new, "bias", _picked(old.bias, out))
    return new


def _slim_groups(old: Any, inp: Tensor | None, out: Tensor | None) -> tuple[Tensor, int]:
    """(weight, groups) of a convolution on some of its channels.

    Groups stay where each keeps as many inputs and outputs as the others, or nothing. Elsewhere one group has all of
    them, with zeros between channels of different groups.
    """
    W, G = old.weight.detach(), old.groups
    device, turned = W.device, isinstance(old, _ConvTransposeNd)  # then W is [inputs, outputs of a group, ...]
    parts = []
    for index, total in ((inp, old.in_channels), (out, old.out_channels)):
        index = torch.arange(total, device=device) if index is None else index
        parts.append([index[index // (total // G) == g] % (total // G) for g in range(G)])
    pairs = [(i, o) for i, o in zip(*parts, strict=True) if len(i) or len(o)]
    blocks = []
    for g, (i, o) in enumerate(zip(*parts, strict=True)):
        if len(i) or len(o):
            of_group = W[g * len(W) // G : (g + 1) * len(W) // G]
            first, second = (i, o) if turned else (o, i)
            blocks.append(of_group.index_select(0, first).index_select(1, second))
    if len({(len(i), len(o)) for i, o in pairs}) == 1 and len(pairs[0][0]) and len(pairs[0][1]):
        return torch.cat(blocks).clone(), len(blocks)
    made = W.new_zeros(sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks), *W.shape[2:])
    row = column = 0
    for block in blocks:
        made[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return made, 1


def _slim_per_channel(leaf: Leaf, held: _Kept) -> nn.Module:
    old: Any = leaf.module
    names = {nn.PReLU: "num_parameters", nn.GroupNorm: "num_channels"}
    count = names.get(type(old), "num_features")
    if getattr(old, count) != held.width:
        raise ValueError(
            f"{leaf.name}: expected a {type(old).__name__} over the router's {held.width} units, "
            f"got {getattr(old, count)}"
        )
    new = copy.deepcopy(old)
    setattr(new, count, len(held.left))
    if isinstance(old, nn.GroupNorm):
        new.num_groups = len(held.left) // (old.num_channels // old.num_groups)
    for name in ("weight", "bias", "running_mean", "running_var"):
        _set(new, name, _picked(getattr(old, name, None), held.left))
    return new


def _copied(leaf: Leaf) -> nn.Module:
    for m in leaf.module.modules():
        why = why_called(m)
        if why is not None or not type(m).__module__.startswith("torch.nn."):
            got = f"{type(m).__name__}{'' if why is None else f' with {why}'}"
            raise ValueError(f"{leaf.name}: expected modules of torch.nn without hooks, got {got}")
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
