"""The task routing layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastroute import tasks
from fastroute.functional import task_mask
from fastroute.ops import checks
from fastroute.ops.arguments import renamed
from fastroute.ops.host import has_numbers
from fastroute.tasks.active_task import Task, on_device

__all__ = ["TaskRouter"]


def _are_binary(masks: Tensor) -> bool:
    return bool(((masks == 0) | (masks == 1)).all())


def __getattr__(name: str) -> Any:
    if name == "device":  # to which upstream moves its masks; here they are where the module is
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class TaskRouter(tasks.TaskRouter):
    """``fastroute.tasks.TaskRouter`` with upstream's ways.

    * ``sigma`` is an int, the number of units off; a negative one counts from the other end: -2 leaves two on.
    * ``_unit_mapping`` is a Parameter, so that a list of parameters, and an optimizer's state dict, are upstream's. It
      never has a gradient. (DistributedDataParallel objects to that: use ``fastroute.tasks`` there.)
    * Masks are what ``_unit_mapping`` holds: units are multiplied by it where weight decay has shrunk it, or a
      checkpoint has such numbers. (Writing into ``_unit_mapping.data``, behind autograd's back, goes unnoticed.)
    * ``forward`` writes into the caller's tensor behind autograd's back and returns it. The gradient is that of the
      identity: right if a ReLU follows, wrong for units that are off if anything else does.
    * ``fold`` and ``extract_task``, which can only zero units, refuse masks of such numbers.
    * ``set_active_task`` takes anything; a fraction is cut off. Only ``forward`` says IndexError.
    """

    _binary: tuple[int, int] | None = None  #: version and address of masks that are zeros and ones

    def __init__(self, unit_count: int, task_count: int, sigma: int, name: str = "TaskRouter", **options: Any) -> None:
        if options.get("axis", 1) != 1:
            raise ValueError(f"axis: upstream's router has axis 1, got {options['axis']!r}; fastroute.tasks has others")
        super().__init__(unit_count, task_count, sigma, name, **options)
        if sigma == 0:
            self.use_knockout = False

    def _plan(self, sigma: int | float) -> tuple[int, bool]:
        units = checks.integer("sigma", sigma)
        return min(units, self.unit_count) if units >= 0 else max(self.unit_count + units, 0), units != 0

    def _register(self, mapping: Tensor, persistent: bool) -> None:
        if persistent:
            self._unit_mapping = nn.Parameter(mapping)
        else:
            super()._register(mapping, persistent)
        self._is_binary(looks=True)

    def _is_binary(self, looks: bool = False) -> bool:
        """Whether masks are known to be zeros and ones. Looked at where they have changed, on a GPU only if told to."""
        if torch.compiler.is_compiling():
            return False
        mapping = self._unit_mapping
        try:
            written = mapping._version, mapping.data_ptr()
        except RuntimeError:  # an inference tensor has no version, a fake one no address
            return False
        if written != self._binary:
            masks = mapping.detach()
            looks = (looks or masks.is_cpu) and has_numbers(masks)
            self._binary = written if looks and _are_binary(masks) else None
        return written == self._binary

    def _scales(self) -> bool:
        masks = self._unit_mapping.detach()
        return has_numbers(masks) and not _are_binary(masks)

    def _apply(self, fn: Any, recurse: bool = True) -> TaskRouter:
        is_binary = self._is_binary()
        super()._apply(fn, recurse)
        if is_binary:  # so they are elsewhere
            self._is_binary(looks=True)
        return self

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._is_binary(looks=True)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._is_binary(looks=True)

    def _refuses(self, given: Tensor) -> str | None:
        decayed = given.shape == self._unit_mapping.shape and has_numbers(given.detach())
        return None if decayed and bool(given.isfinite().all()) else super()._refuses(given)

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {name: value for name, value in state.items() if name != "_binary"}
        if "_active" in state:
            super().__setstate__(state)
            return
        # a whole model that TaskRouting's own classes pickled
        super().__setstate__({name: value for name, value in state.items() if name != "active_task"})
        mapping = self._unit_mapping
        self.task_count, self.sigma, self.inplace = len(mapping), int((mapping[0] == 0).sum()), False
        if self.__dict__.pop("_unit_mapping", None) is not None:  # no parameter where nothing is off
            self._register(mapping, persistent=False)
        self.set_active_task(state["active_task"])

    def set_active_task(self, active_task: Any) -> Any:
        """Stores the task and returns it."""
        whole = active_task.long() if isinstance(active_task, Tensor) else int(active_task)
        self._set(active_task, on_device(whole, self._device()))
        return active_task

    @renamed(x="input")
    def forward(self, input: Tensor, task: Task | None = None) -> Tensor:
        """``input`` itself, times the masks: with zeros where units are off.

        Args:
            input: [B, C, ...]; its memory is written to.
            task: as in ``fastroute.tasks``; by default the active one.

        Raises:
            IndexError: a task out of range; ValueError, TypeError: naming the argument.
        """
        checks.tensor("input", input, "a tensor [B, C, ...]")
        if not self.use_routing:
            return input
        self._check_units(input)
        checks.together(("the masks", self._unit_mapping), {"input": input})
        if task is None and (task := self._given()) is None:
            if torch.compiler.is_compiling():  # a tensor, so that the graph depends on no number
                task = self._shown_id
            else:
                task = self._active_id if isinstance(self._active, Tensor) else int(self._active)
        task_mask(input.data, self._unit_mapping, task, inplace=True)
        if not self._is_binary():
            known = task if isinstance(task, Tensor) else torch.full((), task, device=input.device)
            index = known.reshape(-1).long().clamp(0, self.task_count - 1)
            rows = self._unit_mapping.detach().index_select(0, index)
            input.data.mul_(rows[(...,) + (None,) * (input.dim() - 2)])
        return input
