"""What decisions leave behind for a whole batch: their records, and what users add to samples' steps.

Axes: B samples, K choices of a decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops.checks import given
from ..ops.dispatch.contract import Plan
from ..ops.host import may_look, version_of
from ..ops.recomputation import is_recomputation
from .decision_record import Mixture, Record

if TYPE_CHECKING:
    from .sample_view import SampleMetaInformation


def labels(tasks: Any) -> int:
    """How many task labels there are; of ``len(tensor)`` torch.export makes a constant."""
    if isinstance(tasks, Tensor) and tasks.dim():
        return tasks.shape[0]
    try:
        count = len(tasks)
    except TypeError:
        count = None
    if count is None or isinstance(tasks, Mapping | Set):  # which have no order by sample
        raise TypeError(f"tasks: expected a list or a tensor of labels, one per sample, got {given(tasks)}")
    return count


def _whole(label: Any) -> int:
    number = int(label)
    if number != label and not isinstance(label, str):
        raise ValueError("a fraction")
    return number


class Given(NamedTuple):
    """A tensor that others have as well, its version, and a copy of what it was."""

    tensor: Tensor
    version: int
    copy: Tensor

    @classmethod
    def of(cls, t: Tensor, copy: Tensor) -> Given:
        return cls(t, version_of(t), copy)

    def is_still(self, t: Tensor) -> bool:
        """Whether it is that very tensor, unchanged. NumPy's changes to a CPU tensor leave its version as it is."""
        return self.tensor is t and self.version == version_of(t) and (not may_look(t) or torch.equal(self.copy, t))


class RecordedBatch:
    """What all views of one batch share."""

    def __init__(self, size: int, tasks: Sequence[Any] | Tensor | None) -> None:
        own: Any = tasks
        copied = own.clone() if isinstance(own, Tensor) else own.copy() if hasattr(own, "copy") else own
        self.size, self.tasks = size, copied
        self.records: list[Record] = []
        self.mixtures: list[Mixture] = []
        self.mixed: list[tuple[Given, Tensor]] = []  # their actions and weights, as the layers gave them
        self.remixed: list[tuple[Given, Tensor]] = []  # likewise, of gatings made again since weights were read
        self.is_remixed_read = False
        self.is_remade = is_recomputation()  # the batch itself is of a forward pass made again
        self.without_graph = False  # whether something was recorded without gradients
        self.is_read = False  # whether somebody asked for losses
        self.samples: dict[int, SampleMetaInformation] = {}
        self.is_left = False  # whether samples have gone on in another batch
        #: what a user put into a recorded step of a sample: (record, sample) -> name -> value
        self.extras: dict[tuple[int, int], dict[str, Any]] = {}
        #: steps that a user began: sample -> (how many records came before, the step)
        self.foreign: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        #: rewards added to a whole step: record -> [size]
        self.added: dict[int, Tensor] = {}
        #: how many records came before, for which samples (None: all), and the modules that their last actions chose
        self.pointers: list[tuple[int, frozenset[int] | None, Any]] = []
        self.plans: list[tuple[Given, int, Plan]] = []  # agents, and how many there are
        self.final_reward: Tensor | None = None
        self._task_tensor: Tensor | None = None

    def task_tensor(self, device: torch.device) -> Tensor:
        if self.tasks is None:
            raise ValueError("tasks: expected task labels, got none (pass tasks= to Initialization)")
        if self._task_tensor is None or self._task_tensor.device != device:
            tasks = self.tasks
            try:
                made = (
                    tasks if isinstance(tasks, Tensor) else torch.as_tensor([_whole(t) for t in tasks], device=device)
                )
                if made.is_complex() or (made.is_floating_point() and may_look(made) and bool((made % 1 != 0).any())):
                    raise ValueError("fractions")
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"tasks: expected integers to choose agents or modules by, got {given(tasks)}"
                ) from error
            self._task_tensor = made.reshape(-1).to(device, torch.int64)
        return self._task_tensor

    def is_again(self) -> bool:
        """Whether what is made now has been recorded already: a forward pass is made again for backward.

        Raises:
            RuntimeError: the first time it was recorded without gradients, which are wanted now.
        """
        if self.is_remade or not is_recomputation():
            self.without_graph |= not torch.is_grad_enabled()
            return False
        if self.without_graph and self.is_read and torch.is_grad_enabled():
            raise RuntimeError(
                "meta: expected the losses of decisions to be read where they have gradients, got those of a "
                "trajectory from outside of torch.utils.checkpoint with use_reentrant=True, which records without; "
                "use use_reentrant=False, or make and read the trajectory within"
            )
        return True

    def is_active(self, record: int, sample: int) -> bool:
        active = self.records[record].active
        return active is None or bool(active[sample])

    def pointed(self, sample: int) -> dict[int, Any]:
        """By record, the modules that a sample's action chose among. What it was left out of chose nothing again."""
        found: dict[int, Any] = {}
        for count, rows, modules in self.pointers:
            if rows is None or sample in rows:
                last = next((t for t in reversed(range(count)) if self.is_active(t, sample)), -1)
                if last == count - 1 or last not in found:
                    found[last] = modules
        return found
