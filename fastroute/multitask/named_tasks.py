"""State that goes by the names of tasks, not by their order.

Axes: T tasks.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..modules.names import TakenNames
from ..modules.wrapped import unwrapped

_KEY = "task_names"
_PARAMETRIZED = "parametrizations"  #: the name that PyTorch gives them


def encoded(tasks: Sequence[str]) -> Tensor:
    """Names as bytes of JSON: what every format of state dicts can hold."""
    return torch.tensor(list(json.dumps(tasks).encode()), dtype=torch.uint8, device="cpu")


def decoded(names: Tensor) -> list[str]:
    """The names in such a tensor, of whatever dtype a state was cast to; none if that is not what it holds."""
    try:
        found = json.loads(bytes(names.to(torch.uint8).tolist()))
    except ValueError:
        return []
    return [str(name) for name in found] if isinstance(found, list) else []


class Axis(NamedTuple):
    """An axis of a tensor that begins with as many entries for every task, one task after the other."""

    dim: int
    rest: int = 0  #: entries at its end that are no task's


class NamedTasks(TakenNames, nn.Module):
    """A module with parts for tasks. If those have names, a state dict gives each task what has its name.

    The names are in the state dict, as the entry ``task_names``. Another order of the same tasks is put right when a
    state is loaded; other tasks are an error, or with ``strict=False`` left out. A state dict without that entry is
    loaded by position.

    That holds for parametrized and pruned tensors, and with ``weight_norm`` and ``spectral_norm``, too. Where the
    entries of a task cannot be told from the shapes, another order is an error.
    """

    tasks: tuple[str, ...] | None
    task_names: Tensor

    def _keep_names(self, device: torch.device | str | None) -> None:
        """Register what the state dict has of them."""
        if self.tasks is not None:
            names = encoded(self.tasks)
            self.register_buffer(_KEY, torch.empty(names.shape, dtype=names.dtype, device=device).copy_(names))

    def reset_parameters(self) -> None:
        """Set what the state dict has of the tasks' names."""
        if self.tasks is not None and _KEY in self._buffers:
            with torch.inference_mode(self.task_names.is_inference()), torch.no_grad():
                self.task_names.copy_(encoded(self.tasks))

    def _save_to_state_dict(self, *args: Any) -> None:
        """With the names that the tasks have: whoever averages all of a state dict writes to the buffer."""
        NamedTasks.reset_parameters(self)
        super()._save_to_state_dict(*args)

    def _task_axes(self) -> dict[str, tuple[Axis, ...]]:
        """Of every parameter and buffer with entries for tasks, by name, the axes that have them."""
        raise NotImplementedError

    def _task_lists(self) -> dict[str, int]:
        """Of every list of modules, by name, how many of them each task has, one task after the other."""
        return {}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _, _, missing_keys, unexpected_keys, errors = args
        key = prefix + _KEY
        saved = state_dict.pop(key, None)
        if self.tasks is not None and _KEY in self._buffers:
            if saved is not None and not saved.is_meta:
                place = {name: k for k, name in enumerate(decoded(saved))}
                missing_keys += [f"{key}[{name!r}]" for name in self.tasks if name not in place]
                unexpected_keys += [f"{key}[{name!r}]" for name in place if name not in self.tasks]
                if [*place] != [*self.tasks]:
                    errors += self._by_name(state_dict, prefix, self.tasks, place)
            device = self.task_names.device if saved is None else saved.device
            state_dict[key] = encoded(self.tasks).to(device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _by_name(self, state_dict: Any, prefix: str, tasks: Sequence[str], place: Mapping[str, int]) -> Iterator[str]:
        """Bring entries into the order of ``tasks``; those of a task that has no ``place`` there stay as they are.

        Gives what cannot be brought into it.
        """
        mine = [k for k, name in enumerate(tasks) if name in place]
        theirs = [place[tasks[k]] for k in mine]

        def ordered(saved: Tensor, own: Tensor, axes: Sequence[Axis]) -> Tensor:
            made, at = saved, []
            for dim, rest in axes if saved.dim() == own.dim() else ():
                n, left = divmod(saved.shape[dim] - rest, len(place) or 1)
                if left or n * len(tasks) + rest != own.shape[dim]:
                    return saved  # a mismatch, which the module reports
                made = made.index_select(dim, _entries(theirs, n, rest, saved.shape[dim], saved.device))
                at.append((dim, _entries(mine, n, rest, own.shape[dim], saved.device)))
            return made if len(mine) == len(tasks) else _put(own.detach().to(saved), at, made)

        axes_of = self._task_axes()
        found: set[str] = set()
        for whole in wholes(self):
            name = unwrapped(self, whole.name)
            if name not in axes_of:
                continue
            found.add(name)
            before, after, told, value = {}, {}, True, whole.value()
            for inner, own in whole.tensors.items():
                keys = [prefix + inner, prefix + unwrapped(self, inner)]
                key = next((key for key in keys if key in state_dict), None)
                if key is None:
                    continue
                axes = _axes_in(own.shape, value.shape, axes_of[name])
                told = told and axes is not None
                before[inner] = state_dict[key]
                after[inner] = state_dict[key] = ordered(state_dict[key], own, axes or ())
            if told and not isinstance(whole.source, Tensor) and len(before) == len(whole.tensors):
                told = _is_near(whole.value(after), ordered(whole.value(before), value, axes_of[name]))
            if not told:
                yield _untold(prefix + name)
        yield from (_untold(prefix + name) for name in axes_of if name not in found)
        for name, n in self._task_lists().items():
            start = f"{prefix}{name}."
            number = {str(theirs[j] * n + i): mine[j] * n + i for j in range(len(mine)) for i in range(n)}
            for key, value in [(key, state_dict.pop(key)) for key in list(state_dict) if key.startswith(start)]:
                old, _, inner = key[len(start) :].partition(".")
                if old in number:
                    state_dict[f"{start}{number[old]}.{inner}"] = value


class Whole(NamedTuple):
    """A tensor of a module as it is used, and the parameters and buffers, by name, that it is made of."""

    name: str
    tensors: dict[str, Tensor]
    source: Tensor | nn.Module  #: itself, or the parametrizations that make it

    def value(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """It, or, where a parametrization makes it, what that makes of others than its own."""
        if isinstance(self.source, Tensor):
            return self.source
        start = len(f"{self.name}.{_PARAMETRIZED}.")  # as long as "path.parametrizations.name."
        own = {name[start:]: t.detach().clone() for name, t in (tensors or self.tensors).items()}
        with torch.no_grad():
            made: Tensor = torch.func.functional_call(copy.deepcopy(self.source).eval(), own, ())
        return made


def wholes(model: nn.Module) -> Iterator[Whole]:
    """All tensors of a module: what parametrizations, or hooks of the old style, make of others is one of them."""
    inside: list[str] = []
    for path, m in model.named_modules():
        if any(f"{path}.".startswith(start) for start in inside):
            continue
        at = f"{path}." if path else ""
        for name, make in getattr(m, _PARAMETRIZED, nn.ModuleDict()).items() if parametrize.is_parametrized(m) else ():
            inside.append(start := f"{at}{_PARAMETRIZED}.{name}.")
            yield Whole(at + name, {start + k: t for k, t in (*make.named_parameters(), *make.named_buffers())}, make)
        hooked = {name: t for name, t in vars(m).items() if isinstance(t, Tensor)} if m._forward_pre_hooks else {}
        owned = {name: t for name, t in (*m._parameters.items(), *m._buffers.items()) if t is not None}
        for name, value in hooked.items():
            parts = {part: owned.pop(part) for part in [*owned] if part.startswith(f"{name}_")}
            if parts:
                yield Whole(at + name, {at + part: t for part, t in parts.items()}, value)
        yield from (Whole(at + name, {at + name: t}, t) for name, t in owned.items())


def _axes_in(part: torch.Size, whole: torch.Size, axes: Sequence[Axis]) -> Sequence[Axis] | None:
    """The axes for tasks in what a tensor is made of, by the shapes of both; None: they do not tell."""
    if part == whole or not axes:
        return axes
    if len(part) == len(whole) and all(a in (1, b) for a, b in zip(part, whole, strict=True)):  # a norm
        return [axis for axis in axes if part[axis.dim] == whole[axis.dim]]
    if part.numel() == 1:
        return ()
    rows, columns = whole[0], math.prod(whole[1:])
    if len(axes) == 1 and axes[0] in (Axis(0), Axis(-len(whole))) and rows not in (*whole[1:], columns):
        if part == (rows,):  # singular vectors of [rows, columns]
            return (Axis(0),)
        if part == (columns,):
            return ()
    return None


def _is_near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if a.is_meta or not a.is_floating_point():
        return True
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a, b, tolerance, tolerance, equal_nan=True)


def _untold(name: str) -> str:
    return (
        f"{name}: expected a tensor with entries for each task, to be put in the order of their names, but what it is "
        "made of does not tell which; load into a module with the tasks in the order of the state dict"
    )


def _entries(tasks: Sequence[int], n: int, rest: int, size: int, device: torch.device) -> Tensor:
    """The part of some tasks along an axis with n entries for every task; the rest belongs to no task."""
    found = [t * n + i for t in tasks for i in range(n)]
    return torch.tensor([*found, *range(size - rest, size)], dtype=torch.int64, device=device)


def _put(own: Tensor, axes: Sequence[tuple[int, Tensor]], part: Tensor) -> Tensor:
    """A part of ``own``, told by indices along some axes, replaced."""
    if not axes:
        return part
    (dim, at), *rest = axes
    return own.index_copy(dim, at, _put(own.index_select(dim, at), rest, part))
