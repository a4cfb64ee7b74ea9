"""Which channels of a router are live, as indices, and compact activations that hold nothing else.

Axes: B samples, C channels, T tasks, G tasks present in a batch, L live channels (of the task that has most).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules.reading import Memo
from ..ops.host import has_numbers, is_hollow, memory, on_host, unseen, version_of
from ..ops.recomputation import keeps_results
from .active_task import Task, is_mapped, traced
from .router import TaskRouter


class Units(NamedTuple):
    """The channels that tasks keep.

    A task that keeps fewer than L of them (masks drawn with ``no_orphans``, or by hand) has dead ones at the end of
    its row, no channel twice. Those are masked like before.
    """

    live: Tensor  #: [T, L] int64, rising within the kept ones
    dead: Tensor  #: [T, C - L] int64: all others
    padded: bool  #: whether some rows have dead channels in ``live``


class _Seen(NamedTuple):
    """The masks that a router's channels were read from."""

    mapping: Tensor  #: kept, so that no other tensor is taken for it
    version: int
    at: int  #: its address
    table: Any  #: [T, C], its memory on a CPU; None where there are no numbers to compare
    copy: Any  #: [T, C]: what it held

    @staticmethod
    def of(mapping: Tensor) -> _Seen:
        table = memory(mapping) if has_numbers(mapping) else None
        at, table = (0, None) if table is None else (mapping.data_ptr(), table if mapping.is_cpu else ())
        return _Seen(mapping, version_of(mapping), at, table, None if table is None else memory(mapping).copy())

    def holds(self, tasks: Collection[int] | None) -> bool:
        """Whether the masks of these tasks (None: of all) are what they were."""
        if self.mapping.data_ptr() != self.at:
            return False
        now = self.table if self.mapping.is_cpu else memory(self.mapping)
        if tasks is None:
            return bool(now.tobytes() == self.copy.tobytes())
        return all(now[t].tobytes() == self.copy[t].tobytes() for t in tasks if 0 <= t < len(now))


def prove(router: TaskRouter, tasks: Collection[int] | None) -> None:
    """Have a router's masks read again if those of the tasks at hand (None: of all) are others than were read.

    Not every change has a version: those by ``data``, NumPy, collectives, other processes, and of inference tensors.
    So a CPU compares numbers. Elsewhere that would wait: there ``look_again`` does, when modes are set.
    """
    if torch.compiler.is_compiling():
        return
    seen = _seen(router)
    if seen is None or seen.mapping is not router._buffers.get("_unit_mapping"):
        units(router)
    elif seen.table is not None and seen.mapping.is_cpu and not seen.holds(tasks):
        renew(router)


def look_again(router: TaskRouter) -> None:
    """As ``prove`` on any device, for all tasks, where the masks have been read."""
    seen = None if torch.compiler.is_compiling() else _seen(router)
    if seen is not None and seen.table is not None and not seen.holds(None):
        renew(router)


def _seen(router: TaskRouter) -> _Seen | None:
    memo: Memo | None = getattr(router, "_live_memo", None)
    return None if memo is None else memo.known


def tasks_of(task: Task) -> Collection[int] | None:
    """The tasks that a task names, each once; None where that would wait."""
    if not isinstance(task, Tensor):
        return (task,)
    known: Any = on_host(task)
    return known if known is None else set(known) if task.dim() else (known,)


def units(router: TaskRouter) -> Units:
    """The channels of a router, which keeps them: read again where its masks have another version, see ``prove``.

    They are buffers of the router that are not saved. Under torch.compile they are taken as they are, for how many
    there are: which, ``live_of`` and ``dead_of`` read from the masks. Loading a checkpoint renews them.
    """
    if not torch.compiler.is_compiling():
        mapping, seen = router._buffers.get("_unit_mapping"), _seen(router)  # found faster
        mapping = router._unit_mapping if mapping is None else mapping
        if seen is None or seen.mapping is not mapping or seen.version != version_of(mapping):
            _read(router, mapping)
    return Units._make((router._buffers["_live"], router._buffers["_dead"], router._live_padded))


def _read(router: TaskRouter, mapping: Any) -> None:
    if mapping.is_meta and "_live" in router._buffers:
        return
    seen = _Seen.of(mapping)  # before they are read: what changes meanwhile is not in it
    with unseen() if seen.table is not None else nullcontext():
        _renew(router, mapping)
    memo: Memo = getattr(router, "_live_memo", None) or Memo()
    memo.known = seen
    object.__setattr__(router, "_live_memo", memo)


def _renew(router: TaskRouter, mapping: Tensor) -> None:
    with torch.no_grad(), torch.inference_mode(False):
        kept = mapping != 0
        if is_hollow(mapping):  # as many as were drawn
            most = fewest = mapping.shape[1] - router._off
        else:
            counts = kept.sum(1)
            most, fewest = int(counts.max()), int(counts.min())
        most = max(most, 1)
        order = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        if "_live" not in router._buffers:
            router.register_load_state_dict_post_hook(renew)
        router.register_buffer("_live", order[:, :most].contiguous(), persistent=False)
        router.register_buffer("_dead", order[:, most:].contiguous(), persistent=False)
    object.__setattr__(router, "_live_padded", fewest < most)


def renew(router: Any, *_: Any) -> None:
    """Read the masks again, if it has been asked for its channels."""
    object.__setattr__(router, "_live_memo", None)
    units(router)


def has_units(router: TaskRouter) -> bool:
    """Whether its masks can be read, or need not be: not those that vmap maps over."""
    return not is_mapped(router._unit_mapping)


def row(table: Tensor, task: Task) -> Tensor:
    """[T, L], an int or 0-d -> [L]. A tensor's task out of range is an IndexError on a CPU; a GPU takes the nearest."""
    if not isinstance(task, Tensor):
        return table[task]
    known: Any = on_host(task)
    if known is not None and not 0 <= known < len(table):
        raise IndexError(f"task: expected a task from 0 to {len(table) - 1}, got {known}")
    return table.index_select(0, task.to(table.device, torch.int64).clamp(0, len(table) - 1).reshape(1))[0]


def live_of(router: TaskRouter, task: Task) -> Tensor:
    """[L]: the channels of one task.

    Under torch.compile they are read from the masks that the graph is given, which may be others than those of the
    trace, as long as L stays.
    """
    found = units(router)
    if not torch.compiler.is_compiling():
        return row(found.live, task)
    L = found.live.shape[1]
    kept = row(router._unit_mapping, task) != 0
    count = kept.sum()
    torch._assert_async(count <= L if found.padded else count == L, _OTHER_MASKS)
    return _rank(kept).topk(L).indices


def dead_of(router: TaskRouter, task: Task) -> Tensor:
    """[C - L]: the channels that are not in ``live_of``."""
    dead = units(router).dead
    if not torch.compiler.is_compiling():
        return row(dead, task)
    return _rank(row(router._unit_mapping, task) != 0).topk(dead.shape[1], largest=False).indices


def _rank(kept: Tensor) -> Tensor:
    """[C] numbers that fall from the first kept channel to the last, and on through the others."""
    C = len(kept)
    return kept * C - torch.arange(C, device=kept.device)


_OTHER_MASKS = (
    "task: expected masks with as many live channels as when the live model was compiled or exported, got another "
    "number; compile or export it again"
)


def axis_of(router: TaskRouter | None, x: Tensor) -> int:
    """The axis of x that a router's units are."""
    return x.dim() - 1 if router is not None and router.over_features(x) else 1


def spread(index: Tensor, times: int) -> Tensor:
    """Channels [..., L] -> the features [..., L times] that they are after flattening ``times`` positions each."""
    if times == 1:
        return index
    return (index.unsqueeze(-1) * times + torch.arange(times, device=index.device)).flatten(-2)


def expand(x: Tensor, index: Tensor, width: int, axis: int = 1) -> Tensor:
    """Compact [B, L, ...] -> [B, width, ...] with zeros elsewhere, in x's memory format."""
    if keeps_results():
        made = x.new_zeros((*x.shape[:axis], width, *x.shape[axis + 1 :])).index_copy(axis, index, x)
        turned = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return made.contiguous(memory_format=torch.channels_last) if turned else made
    full = x.new_empty((*x.shape[:axis], width, *x.shape[axis + 1 :]))
    if axis != 1 or (traced() and not torch.compiler.is_compiling()):  # vmap knows no memory formats
        return full.zero_().index_copy(axis, index, x)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        full = full.contiguous(memory_format=torch.channels_last)
    return full.zero_().index_copy(1, index, x) if traced() else full.zero_().index_copy_(1, index, x)


class Groups(NamedTuple):
    """The tasks present in a sorted batch: samples bounds[g] to bounds[g + 1] are of task tasks[g]."""

    tasks: Tensor  #: [G] int64
    member: Tensor  #: [B] int64, rising: every sample's group
    bounds: list[int]

    @property
    def number(self) -> int:
        return len(self.bounds) - 1


class Sorted(NamedTuple):
    """A batch's order by task."""

    order: Tensor  #: [B]: sample of every place
    place: Tensor  #: [B]: place of every sample
    task: Tensor  #: [B], rising
    groups: Groups


def same_for_all(tasks: Sequence[Task], x: Tensor) -> Tensor | None:
    """The tasks [B] that all routers are at, one for each sample of x; None where there are none, or others.

    None also where to look would wait for a device, or torch.compile is active.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    first, *rest = tasks
    if not isinstance(first, Tensor) or not first.dim() or first.shape[0] != x.shape[0] or not x.shape[0]:
        return None
    same = all(t is first or (isinstance(t, Tensor) and torch.equal(t.to(first.dtype), first)) for t in rest)
    return first if same else None


def sort(task: Tensor, task_count: int) -> Sorted | None:
    """The tasks of a batch [B], sorted; None where that would wait for a device, or torch.compile is active.

    Raises:
        IndexError: a task out of range.
    """
    task = task.to(torch.int64)
    if on_host(task[:0]) is None:
        return None
    ordered, order = task.sort(stable=True)
    tasks, member, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    found = on_host(tasks) or []
    if found and (found[0] < 0 or found[-1] >= task_count):
        wrong = found[0] if found[0] < 0 else found[-1]
        raise IndexError(f"task: expected tasks from 0 to {task_count - 1}, got {wrong}")
    bounds = [0, *(on_host(counts.cumsum(0)) or [])]
    return Sorted(order, order.argsort(), ordered, Groups(tasks, member, bounds))


class ExpandGroups(torch.autograd.Function):
    """Compact [B, L, ...] with a row of channels [G, L] per group -> [B, width, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, bounds: list[int], width: int) -> Tensor:
        """[B, width, ...] with zeros elsewhere."""
        ctx.save_for_backward(rows)
        ctx.bounds = bounds
        if keeps_results():
            each = [(row, x[a:b]) for row, (a, b) in zip(rows, pairwise(bounds), strict=True)]
            return torch.cat(
                [part.new_zeros((len(part), width, *x.shape[2:])).index_copy(1, row, part) for row, part in each]
            )
        full = x.new_zeros((x.shape[0], width, *x.shape[2:]))
        for g, (a, b) in enumerate(pairwise(bounds)):
            full[a:b].index_copy_(1, rows[g], x[a:b])
        return full

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None, None, None]:
        return CompactGroups.apply(dy[0], *ctx.saved_tensors, ctx.bounds), None, None, None


class CompactGroups(torch.autograd.Function):
    """[B, C, ...] -> the channels [G, L] of each sample's group, [B, L, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, bounds: list[int]) -> Tensor:
        """[B, L, ...]"""
        ctx.save_for_backward(rows)
        ctx.bounds, ctx.width = bounds, x.shape[1]
        made = x.new_empty((x.shape[0], rows.shape[1], *x.shape[2:]))
        for g, (a, b) in enumerate(pairwise(bounds)):
            made[a:b] = x[a:b].index_select(1, rows[g])
        return made

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None, None]:
        return ExpandGroups.apply(dy[0], *ctx.saved_tensors, ctx.bounds, ctx.width), None, None
