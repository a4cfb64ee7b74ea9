"""What a layer with an output per task gives: a tuple, or a dict by name, for ``SimpleSelect`` to pick from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops.arguments import Tasks
from ..ops.checks import several

ByTask = tuple[Tensor, ...] | dict[str, Tensor]


def task_names(tasks: Tasks) -> tuple[int, tuple[str, ...] | None]:
    """(T, the names), from a number (no names) or from names.

    Raises:
        ValueError, TypeError: fewer than one, a name twice, no names.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        if isinstance(tasks, str):
            raise TypeError(f"tasks: expected a number or a list of names, got the str {tasks!r}")
        return several("tasks", tasks), None
    names = tuple(tasks)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"tasks: expected a number or a list of one or more names, got {tasks!r}")
    twice = [name for k, name in enumerate(names) if name in names[:k]]
    if twice:
        raise ValueError(f"tasks: expected different names, got {twice[0]!r} twice")
    return len(names), names


def by_task(outputs: Sequence[Tensor], names: tuple[str, ...] | None) -> ByTask:
    """Outputs in the order of tasks, as the layer gives them."""
    return tuple(outputs) if names is None else dict(zip(names, outputs, strict=True))
