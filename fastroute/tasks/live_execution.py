"""Through a chain of layers with compact activations between routers, for one task or several."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..modules.reading import Memo
from ..ops.host import is_lent, others_write
from . import live_products
from .active_task import Task, aware_parts, given, held
from .layer_chain import DROP, FLAT, KEEP, MIX, ROUTER, Step, is_spatial, rank
from .live_batch_norm import eval_scale, live_batch_norm, uses_batch
from .live_channels import (
    CompactGroups,
    ExpandGroups,
    Sorted,
    Units,
    axis_of,
    dead_of,
    expand,
    live_of,
    row,
    spread,
    units,
)
from .router import TaskRouter

#: Positions per task below which a convolution is faster channels-first on a CPU: its weights are most of its reading.
#: A VGG-11's training step takes 4 to 20 % more with one layout everywhere (1 to 20 tasks, AMD EPYC, 2026-11-29).
_FEW = 512


class Held(NamedTuple):
    """What the activations at hand are."""

    router: TaskRouter | None = None  #: outside whose live channels they are zero; None if nothing is known
    compact: bool = False  #: whether only those channels are there
    positions: int = 1  #: features that each channel was flattened to
    pending: bool = False  #: compact, but the router is still to come


class Way(Protocol):
    """Strategy for running a chain: ``index`` gives a router's live channels, [L] or [G, L]."""

    tasks: int  #: how many there are in the batch
    turned: bool  #: whether the images were made channels-last for speed

    def index(self, router: TaskRouter) -> Tensor: ...
    def favours(self, step: Step, x: Tensor, held: Held) -> bool: ...
    def compact(self, x: Tensor, index: Tensor, axis: int = 1) -> Tensor: ...
    def expand(self, x: Tensor, index: Tensor, width: int, axis: int = 1) -> Tensor: ...
    def begin(self, x: Tensor) -> Tensor: ...
    def end(self, x: Tensor) -> Tensor: ...
    def mix(self, step: Step, x: Tensor, out: Tensor | None, inp: Tensor | None) -> Tensor: ...
    def mask(self, x: Tensor, router: TaskRouter, index: Tensor) -> Tensor: ...
    def route(self, x: Tensor, router: TaskRouter) -> tuple[Tensor, Held]: ...
    def call(self, x: Tensor, layer: nn.Module) -> Tensor: ...


def called(layer: nn.Module, x: Tensor, task: Task | None) -> Tensor:
    """A layer of a chain, with its routers, or itself if it is one, at work on a task (None: on their active tasks)."""
    if isinstance(layer, TaskRouter):
        return layer(x) if task is None else layer(x, task=task)
    inside = [] if task is None else aware_parts(layer)[0]
    tasks = {part: part._task(task) for part in inside}
    moved = {p: t.to(p._active_id.device) if isinstance(t, Tensor) else t for p, t in tasks.items()}
    if not torch.compiler.is_compiling():
        with given(moved):
            return layer(x)  # type: ignore[no-any-return]
    with held(inside):
        for part, t in moved.items():
            part._hold(t, t if isinstance(t, Tensor) else None)
        return layer(x)  # type: ignore[no-any-return]


def is_idle(router: TaskRouter) -> bool:
    """Whether it lets everything through, for every task; in a graph, whatever masks are loaded."""
    if not router.use_routing:
        return True
    if router._is_drawn and torch.compiler.is_compiling():
        return False
    found = units(router)
    return not found.padded and found.dead.shape[1] == 0


def walk(steps: list[Step], x: Tensor, way: Way) -> Tensor:
    """Run the steps; the result has its full width."""
    held = Held()

    def full() -> Tensor:
        if not held.compact or held.router is None:
            return x
        index = spread(way.index(held.router), held.positions)
        return way.expand(x, index, held.router.unit_count * held.positions, axis_of(held.router, x))

    for n, step in enumerate(steps):
        kind, layer = step.kind, step.layer
        if kind == ROUTER and step.router is not None:
            before = x
            if is_idle(step.router):
                pass
            elif held.pending and held.router is step.router:
                x, held = way.mask(x, step.router, way.index(step.router)), held._replace(pending=False)
            else:
                x = full()
                x, held = way.route(x, step.router)
            if x is before and step.router.use_routing and not step.router.inplace and _is_overwritten(steps, n):
                x = x.clone()  # as the router would
        elif kind == MIX and x.dim() >= (rank(layer) or 0):
            axis = x.dim() - 1 if rank(layer) == 2 else 1  # which it mixes
            if step.router is not None and (is_idle(step.router) or axis_of(step.router, x) != axis):
                step = step._replace(router=None)
            router, inner = step.router, held.router
            if inner is not None and (
                axis_of(inner, x) != axis
                or inner.unit_count * held.positions != live_products.weight_of(layer).shape[1]
            ):
                x, held, inner = full(), Held(), None  # of other channels, or the layer is to say what is wrong
            if (router is None and inner is None) or not way.favours(step, x, held):
                x = layer(full())
                x, held = x if step.norm is None else step.norm(x), Held()
                continue
            if not held.compact:
                x = way.begin(x)
            out = None if router is None else way.index(router)
            inp = None if inner is None else spread(way.index(inner), held.positions)
            if inp is not None and not held.compact:
                x = way.compact(x, inp, axis)
            if way.turned and x.dim() == 4 and math.prod(x.shape[2:]) * x.shape[0] < _FEW * way.tasks:
                x = x.contiguous()
            x = way.mix(step, x, out, inp)
            held = Held() if router is None else Held(router, compact=True, pending=True)
        elif held.pending or (
            kind == KEEP and rank(layer) in (None, x.dim()) and not (_is_last(held, x) and is_spatial(layer))
        ):
            x = layer(x)
        elif kind == FLAT and not _is_last(held, x):
            held = held._replace(positions=held.positions * math.prod(x.shape[2:]))
            x = layer(x)
        elif kind == DROP:
            if layer.training:
                x, held = full(), held._replace(compact=False)
            x = layer(x)
        else:
            x, held = way.call(full(), layer), Held()
    return way.end(full())


def _is_overwritten(steps: list[Step], n: int) -> bool:
    """Whether what comes to step n, where it may be somebody else's, is written to by a later one."""
    if n and steps[n - 1].kind == MIX:
        return False
    for step in steps[n + 1 :]:
        if step.kind == MIX:
            return False
        if getattr(step.layer, "inplace", False):
            return True
    return False


def _is_last(held: Held, x: Tensor) -> bool:
    """Whether what is known of x is of its last axis, and that is not axis 1."""
    return held.router is not None and held.router.over_features(x)


class _Steps:
    """What tells one step of an optimizer from the next: fused ones, and some from elsewhere, change no version."""

    last: object = None


@cache
def _steps() -> type[_Steps]:
    def tell(*_: object) -> None:
        _Steps.last = object()  # not a number: a compiled step would be guarded by it

    register_optimizer_step_post_hook(tell)
    return _Steps


def _has_stamp(t: Tensor) -> bool:
    """Whether it is a parameter that tells when it changes."""
    return type(t) is nn.Parameter and not t.is_inference() and not others_write(t) and not is_lent(t)


class Single:
    """One task."""

    tasks = 1
    turned = False

    def __init__(self, tasks: dict[int, Task], exact: bool, kept: dict[int, Any], given: Task | None = None) -> None:
        self._tasks, self._exact, self._kept, self._given = tasks, exact, kept, given
        self._index: dict[int, Tensor] = {}

    def index(self, router: TaskRouter) -> Tensor:
        if id(router) not in self._index:
            self._index[id(router)] = live_of(router, self._tasks[id(router)])
        return self._index[id(router)]

    def favours(self, step: Step, x: Tensor, held: Held) -> bool:
        return step.norm is None or x.dim() == rank(step.layer)  # BatchNorm of [B, L, D] is over L

    def compact(self, x: Tensor, index: Tensor, axis: int = 1) -> Tensor:
        return x.index_select(axis, index)

    def expand(self, x: Tensor, index: Tensor, width: int, axis: int = 1) -> Tensor:
        return expand(x, index, width, axis)

    def begin(self, x: Tensor) -> Tensor:
        return x

    def end(self, x: Tensor) -> Tensor:
        return x

    def mix(self, step: Step, x: Tensor, out: Tensor | None, inp: Tensor | None) -> Tensor:
        layer: live_products.Mixing = step.layer
        weight, bias = self._gathered(layer, out, inp)
        y = live_products.apply(layer, x, weight, bias)
        if step.norm is None:
            return y
        if out is None:
            return step.norm(y)
        dead = None
        if self._exact and step.router is not None and uses_batch(step.norm) and step.norm.running_mean is not None:
            dead = dead_of(step.router, self._tasks[id(step.router)])
            dead = dead if len(dead) else None
        y_dead = None
        if dead is not None:
            with torch.no_grad():
                W, b = (
                    live_products.gather_weight(live_products.weight_of(layer), dead, inp),
                    live_products.gather_bias(layer.bias, dead),
                )
                y_dead = live_products.apply(layer, x, W, b)
        return live_batch_norm(step.norm, y, out, y_dead, dead)

    def _gathered(
        self, layer: live_products.Mixing, out: Tensor | None, inp: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Kept where nothing is trained; what changes one of these changes what they say."""
        W, b = live_products.weight_of(layer), layer.bias
        keep = not (layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if not keep or not _has_stamp(W) or not (b is None or _has_stamp(b)):
            return live_products.gather_weight(W, out, inp), live_products.gather_bias(b, out)
        stamp: list[Any] = [
            None if t is None else (t.untyped_storage()._cdata, t._version, t.storage_offset(), t.dtype)
            for t in (W, b, out, inp)
        ]
        if W.requires_grad or W.grad is not None or (b is not None and (b.requires_grad or b.grad is not None)):
            stamp.append(_steps().last)
        memo = self._kept.get(id(layer))
        if not isinstance(memo, Memo):
            memo = self._kept[id(layer)] = Memo()
        known = memo.known
        if known is None or known[0] != stamp:
            # A storage that is referred to, weakly too, keeps its address to itself.
            held = [StorageWeakRef(t.untyped_storage()) for t in (W, b, out, inp) if t is not None]
            known = stamp, live_products.gather_weight(W, out, inp), live_products.gather_bias(b, out), held
            memo.known = known
        return known[1], known[2]

    def mask(self, x: Tensor, router: TaskRouter, index: Tensor) -> Tensor:
        if not units(router).padded:
            return x
        off = row(router._unit_mapping, self._tasks[id(router)]).index_select(0, index) == 0
        return x.masked_fill(off.view(-1, *[1] * (x.dim() - 1 - axis_of(router, x))), 0)

    def route(self, x: Tensor, router: TaskRouter) -> tuple[Tensor, Held]:
        axis = axis_of(router, x)
        if x.dim() < 2 or x.shape[axis] != router.unit_count:
            return router(x, self._tasks[id(router)]), Held()  # which says what is wrong
        index = self.index(router)
        return self.mask(self.compact(x, index, axis), router, index), Held(router, compact=True)

    def call(self, x: Tensor, layer: nn.Module) -> Tensor:
        return called(layer, x, self._given)


class Mixed:
    """A task per sample. Samples are put in order of their tasks when a layer first needs it."""

    turned = False

    def __init__(self, order: Sorted, task: Tensor) -> None:
        self._order, self._groups, self._given, self._task = order, order.groups, task, task
        self.tasks = order.groups.number
        self._is_sorted = False
        self._index: dict[int, Tensor] = {}

    def index(self, router: TaskRouter) -> Tensor:
        if id(router) not in self._index:
            self._index[id(router)] = units(router).live.index_select(0, self._groups.tasks)
        return self._index[id(router)]

    def favours(self, step: Step, x: Tensor, held: Held) -> bool:
        layer: live_products.Mixing = step.layer
        if (
            (step.norm is not None and uses_batch(step.norm))
            or not live_products.can_group(layer)
            or x.dim() != rank(layer)
        ):
            return False
        (O, I), elements = live_products.weight_of(layer).shape[:2], live_products.weight_of(layer).shape[2:].numel()
        lo = O if step.router is None else _width(units(step.router))
        li = I if held.router is None else _width(units(held.router)) * held.positions
        positions, tasks = live_products.positions(layer, x), self._groups.number
        return live_products.grouped_is_cheaper(positions, tasks, (O, I), (lo, li), elements)

    def compact(self, x: Tensor, index: Tensor, axis: int = 1) -> Tensor:
        return CompactGroups.apply(x, index, self._groups.bounds)

    def expand(self, x: Tensor, index: Tensor, width: int, axis: int = 1) -> Tensor:
        return ExpandGroups.apply(x, index, self._groups.bounds, width)

    def begin(self, x: Tensor) -> Tensor:
        if not self._is_sorted:
            self._is_sorted, self._task = True, self._order.task
            x = x.index_select(0, self._order.order)
            if self.turned and x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
        return x

    def end(self, x: Tensor) -> Tensor:
        return x.index_select(0, self._order.place) if self._is_sorted else x

    def mix(self, step: Step, x: Tensor, out: Tensor | None, inp: Tensor | None) -> Tensor:
        y = live_products.grouped(step.layer, x, out, inp, self._groups)
        if step.norm is None:
            return y
        if out is None:
            return step.norm(y)
        scale, shift = (self._per_sample(t, y) for t in eval_scale(step.norm, out))
        return torch.addcmul(shift, scale, y).to(y.dtype)

    def _per_sample(self, channels: Tensor, y: Tensor) -> Tensor:
        """[G, L] -> [B, L, 1, ...]: those of each sample's group."""
        return channels.index_select(0, self._groups.member).view(y.shape[0], -1, *[1] * (y.dim() - 2))

    def mask(self, x: Tensor, router: TaskRouter, index: Tensor) -> Tensor:
        if not units(router).padded:
            return x
        off = router._unit_mapping.index_select(0, self._groups.tasks).gather(1, index) == 0
        return x.masked_fill(self._per_sample(off, x), 0)

    def route(self, x: Tensor, router: TaskRouter) -> tuple[Tensor, Held]:
        router._check_units(x)
        return router.masked(x, self._task, self._task), Held(router)

    def call(self, x: Tensor, layer: nn.Module) -> Tensor:
        """With samples in the order of the batch: a layer, or who looks at it, may know others of them."""
        x = self.end(x)
        self._is_sorted, self._task = False, self._given
        return called(layer, x, self._given)


def _width(found: Units) -> int:
    return found.live.shape[1]
