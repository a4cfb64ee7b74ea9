"""State that goes by the names of tasks, not by their order.

Axes: T tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modules.reading import name_before

_KEY = "task_names"


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


class NamedTasks(nn.Module):
    """A module with parts for tasks. If those have names, a state dict gives each task what has its name.

    The names are in the state dict, as the entry ``task_names``. Another order of the same tasks is put right when a
    state is loaded; other tasks are an error, or with ``strict=False`` left out. A state dict without that entry is
    loaded by position.
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
            self.task_names.copy_(encoded(self.tasks))

    def _task_axes(self) -> dict[str, tuple[Axis, ...]]:
        """Of every parameter and buffer with entries for tasks, by name, the axes that have them."""
        raise NotImplementedError

    def _task_lists(self) -> dict[str, int]:
        """Of every list of modules, by name, how many of them each task has, one task after the other."""
        return {}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _, _, missing_keys, unexpected_keys, _ = args
        key = prefix + _KEY
        saved = state_dict.pop(key, None)
        if self.tasks is not None and _KEY in self._buffers:
            if saved is not None and not saved.is_meta:
                place = {name: k for k, name in enumerate(decoded(saved))}
                missing_keys += [f"{key}[{name!r}]" for name in self.tasks if name not in place]
                unexpected_keys += [f"{key}[{name!r}]" for name in place if name not in self.tasks]
                if [*place] != [*self.tasks]:
                    self._by_name(state_dict, prefix, self.tasks, place)
            device = self.task_names.device if saved is None else saved.device
            state_dict[key] = encoded(self.tasks).to(device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _by_name(self, state_dict: Any, prefix: str, tasks: Sequence[str], place: Mapping[str, int]) -> None:
        """Bring entries into the order of ``tasks``; those of a task that has no ``place`` there stay as they are."""
        mine = [k for k, name in enumerate(tasks) if name in place]
        theirs = [place[tasks[k]] for k in mine]
        axes_of = self._task_axes()
        for name, own in (*self.named_parameters(), *self.named_buffers()):
            axes, saved = axes_of.get(name_before(name), ()), state_dict.get(prefix + name)
            if saved is None or saved.dim() != own.dim():
                continue
            made, at = saved, []
            for dim, rest in axes:
                n, left = divmod(saved.shape[dim] - rest, len(place) or 1)
                if left or n * len(tasks) + rest != own.shape[dim]:
                    break  # a mismatch, which the module reports
                made = made.index_select(dim, _entries(theirs, n, rest, saved.shape[dim], saved.device))
                at.append((dim, _entries(mine, n, rest, own.shape[dim], saved.device)))
            else:
                state_dict[prefix + name] = made if len(mine) == len(tasks) else _put(own.detach().to(saved), at, made)
        for name, n in self._task_lists().items():
            start = f"{prefix}{name}."
            number = {str(theirs[j] * n + i): mine[j] * n + i for j in range(len(mine)) for i in range(n)}
            for key, value in [(key, state_dict.pop(key)) for key in list(state_dict) if key.startswith(start)]:
                old, _, inner = key[len(start) :].partition(".")
                if old in number:
                    state_dict[f"{start}{number[old]}.{inner}"] = value


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
