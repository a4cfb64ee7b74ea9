"""What every weighting has: its tasks by name, and losses in their order.

Axes: T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...modules import watching
from ...ops.accumulating import Accumulating
from ...ops.arguments import Tasks, checked
from ...ops.checks import MOST, flag, floating, integer, no_more, together
from ...ops.processes import Processes
from ..named_tasks import Axis, NamedTasks, wholes

Losses = Mapping[str, Tensor | None] | Sequence[Tensor | None] | Tensor
Present = Mapping[str, Tensor | bool | None] | Sequence[Tensor | bool | None] | Tensor


def names_of(tasks: Tasks) -> tuple[str, ...]:
    """The tasks' names: those given, or "0", "1", ..."""
    if isinstance(tasks, Sequence) and not isinstance(tasks, str):
        names = tuple(tasks)
    else:
        try:
            count = integer("tasks", tasks)
        except TypeError:
            raise TypeError(f"tasks: expected a list of names or how many there are, got {tasks!r}") from None
        names = tuple(map(str, range(no_more("tasks", count, MOST))))
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"tasks: expected names, got {name!r}")
    if not names:
        raise ValueError(f"tasks: expected at least one, got {tasks!r}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"tasks: expected every name once, got {twice!r} twice")
    return names


def unknown(argument: str, name: object, known: Sequence[str]) -> ValueError:
    """An error for a name that nobody has, with the nearest one that somebody has."""
    near = get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(map(repr, known))}"
    return ValueError(f"{argument}: there is no task {name!r}; {hint}")


def in_order(argument: str, given: Mapping[str, Any] | Sequence[Any] | Tensor, tasks: Sequence[str]) -> list[Any]:
    """One thing per task, from a dict by name (what is not there is None) or from a list in the tasks' order."""
    if isinstance(given, Mapping):
        for name in given:
            if name not in tasks:
                raise unknown(argument, name, tasks)
        return [given.get(name) for name in tasks]
    if isinstance(given, Tensor):
        if given.shape != (len(tasks),):
            raise ValueError(f"{argument}: expected a tensor [{len(tasks)}], got {list(given.shape)}")
        return list(given.unbind())
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{argument}: expected a dict by task, a list or a tensor, got {type(given).__name__}")
    if len(given) != len(tasks):
        raise ValueError(f"{argument}: expected one for each of the {len(tasks)} tasks, got {len(given)}")
    return list(given)


def numbers(
    argument: str, given: Mapping[str, float] | Sequence[float], tasks: Sequence[str], default: float | None = None
) -> list[float]:
    """One number per task; ``default`` where a dict has none."""
    found = []
    for name, value in zip(tasks, in_order(argument, given, tasks), strict=True):
        number = default if value is None else value
        if number is None:
            raise ValueError(f"{argument}: expected a number for {name!r}, got none")
        found.append(float(number))
    return found


def fill(t: Tensor, values: Sequence[float]) -> None:
    """Copy numbers into a tensor on any device."""
    with torch.no_grad():
        t.copy_(torch.tensor(values, dtype=t.dtype, device="cpu"))


def memory_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Of what a weighting remembers: float32 at least."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


class Weighting(NamedTasks, Accumulating):
    """The losses of several tasks to the one number that is minimised.

    ``weighting(losses)`` is that number. The methods below it are there in every weighting, so that one training loop
    does for all: ``step()`` at the end of an epoch, ``update(losses)`` after the optimizer's step. Most need neither.

    What a weighting learns or remembers is in its state dict, with the tasks on the last axis in the order of
    ``tasks``. Where tasks have names, it is loaded by these, see :class:`NamedTasks`.

    Args:
        tasks: names, or how many.
        device, dtype: of what it learns or remembers; what it remembers is in float32 at least.

    Attributes:
        tasks: tuple of names.
        stateless: of the class: whether it neither learns nor remembers.
        processes: a group of processes that all call it at once. Losses are then the group's means (over those
            that have the task), also where they are remembered, with the gradient of the own ones: the mean of the
            processes' gradients is that of the total of the means. ``fastroute.distributed.prepare`` sets it.

    Examples:
        >>> class Worst(fastroute.Weighting):
        ...     stateless = True
        ...     def combine(self, losses, present):
        ...         return losses.amax()
        >>> float(Worst(["price", "kind"])(torch.tensor([4.0, 1.0])))
        4.0
    """

    stateless: ClassVar[bool] = False
    processes: Processes | None = None
    tasks: tuple[str, ...]

    @checked
    def __init__(
        self,
        tasks: Tasks,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tasks = names_of(tasks)
        if isinstance(tasks, Sequence) and not self.stateless:
            self._keep_names(device)

    def reset_parameters(self) -> None:
        """Set what it learns or remembers, and every other tensor, to what it is in a new one."""
        super().reset_parameters()

    def _task_axes(self) -> dict[str, tuple[Axis, ...]]:
        own = (t for t in wholes(self) if "." not in t.name)
        return {t.name: (Axis(-1),) for t in own if t.value().shape[-1:] == (len(self.tasks),)}

    def extra_repr(self) -> str:
        return f"tasks={len(self.tasks)}"

    def forward(self, losses: Losses, present: Present | None = None) -> Tensor:
        """The total of some losses.

        Args:
            losses: a dict by task, a list in the order of ``tasks``, or a tensor [T]; each of one element. None, or no
                entry in the dict, is a task without a loss: the total is what it would be without that task.
            present: which losses count, in the same form, bool; absent ones have exactly zero for a gradient. It is
                for what only the device knows: that no sample of the batch has a label of the task.

        Returns:
            A tensor without axes. Sums are made in float32 at least.

        Raises:
            ValueError, TypeError: names or a length that are not those of ``tasks``; a loss of several elements; no
                loss at all.
        """
        values, here = self.gather(losses, present)
        total = self.combine(values, here)
        watching.tell(self, "losses", self.tasks, values, total)
        return total

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        """The total of losses [T], 0 where ``present`` [T] is False."""
        raise NotImplementedError

    def step(self) -> None:
        """The end of an epoch."""

    def update(self, losses: Losses, present: Present | None = None) -> None:
        """The losses of the same batch after the optimizer's step."""

    def gather(self, losses: Losses, present: Present | None = None) -> tuple[Tensor, Tensor | None]:
        """(losses [T] with 0 for absent ones, which are there [T] bool or None for all)."""
        given = in_order("losses", losses, self.tasks)
        first = next((t for t in given if t is not None), None)
        if first is None:
            raise ValueError("losses: expected one at least, got none of any task")
        for name, t in zip(self.tasks, given, strict=True):
            if t is not None and not (isinstance(t, Tensor) and t.numel() == 1):
                raise ValueError(f"losses: expected a tensor of one element for {name!r}, got {_shown(t)}")
            if t is not None and t.device != first.device:
                together(("the others", first), {f"losses[{name!r}]": t})
        flags = [None] * len(given) if present is None else in_order("present", present, self.tasks)
        for n, (name, f) in enumerate(zip(self.tasks, flags, strict=True)):
            if isinstance(f, Tensor) and f.numel() != 1:
                raise ValueError(f"present: expected a tensor of one element for {name!r}, got {_shown(f)}")
            if f is not None and f is not True and not isinstance(f, Tensor):
                flag(f"present[{name!r}]", f)
                flags[n] = bool(f)
        values = wide(torch.stack([first.new_zeros(()) if t is None else t.reshape(()) for t in given]))
        floating("losses", values)
        own = next(chain(self._parameters.values(), self._buffers.values()), None)
        together(("the weighting", values if own is None else own), {"losses": values})
        if all(t is not None for t in given) and all(f is None or f is True for f in flags):
            return self._of_group(values, None)
        here = torch.stack([
            f.reshape(()).to(values.device, torch.bool) if isinstance(f, Tensor) and t is not None
            else torch.full((), t is not None and f is not False, device=values.device)
            for t, f in zip(given, flags, strict=True)
        ])  # fmt: skip
        return self._of_group(torch.where(here, values, 0), here)

    def _of_group(self, values: Tensor, here: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.processes is None:
            return values, here
        own = values.detach()
        summed, count = self.processes.sum(
            torch.stack([own, own.new_ones(own.shape) if here is None else here.to(own)])
        )
        mean = torch.where(count > 0, summed / count.clamp(min=1), 0)
        return values + (mean - own), None if here is None else count > 0


def _shown(t: object) -> str:
    return f"one of shape {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__


def wide(t: Tensor) -> Tensor:
    """Half precision as float32: sums of many parts, exponentials."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def total(values: Tensor, present: Tensor | None) -> Tensor:
    """Their sum, absent ones left out."""
    return (values if present is None else torch.where(present, values, 0)).sum()


def softmax(logits: Tensor, present: Tensor | None) -> Tensor:
    """Over those that are there; 0 for the others."""
    if present is None:
        return logits.softmax(0)
    return torch.where(present, logits.masked_fill(~present, -torch.inf).softmax(0), 0)


def log(losses: Tensor) -> Tensor:
    """Logarithms, with the smallest number's for a loss of 0, and there a gradient of 0."""
    return torch.where(losses == 0, torch.finfo(losses.dtype).tiny, losses).log()
