"""What a model minimises: its tasks' losses, weighted as it was told to."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..modules import watching
from ..modules.names import TakenNames
from ..ops.arguments import renamed
from ..ops.checks import given as shown
from ..ops.masked import only
from ..ops.processes import Processes
from .loss import task_losses
from .schedule import Anchors
from .sharing import feature_names, shared_parameters, task_parameters
from .weighting import UNBOUNDED, WEIGHTINGS, Weighting, as_weighting
from .weighting.base import in_order, unknown

_as_weighting = renamed(kind="weighting")(as_weighting)


def by_task(argument: str, given: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """What users give per task, a dict or a list in the order of ``tasks``, by name. A name twice counts once."""
    if given is None and argument != "y_hat":
        return {}
    if isinstance(given, Tensor):
        if len(tasks) != 1:
            raise TypeError(f"{argument}: expected a dict by task or a list, got a tensor {list(given.shape)}")
        return {tasks[0]: given}
    if isinstance(given, Mapping):
        in_order(argument, given, list(dict.fromkeys(tasks)))
        return dict(given)
    if isinstance(given, (str, bytes, np.ndarray, Set)) or not isinstance(given, Iterable):
        raise TypeError(f"{argument}: expected a dict by task or a list, got {shown(given)}")
    made: dict[str, Any] = {}
    for name, value in zip(tasks, in_order(argument, list(given), tasks), strict=True):
        made.setdefault(name, value)
    return made


def is_triple(y_hat: Any) -> bool:
    """Whether it is what ``forward`` returns: outputs, losses and weights."""
    return isinstance(y_hat, tuple) and len(y_hat) == 3 and all(isinstance(part, list) for part in y_hat)


def objective(
    tasks: Sequence[str],
    losses: Mapping[str, Any],
    weights: Mapping[str, Any],
    y_hat: Any,
    y: Any,
    mask: Any = None,
    weighting: Weighting | None = None,
    apart: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(total, losses by task), see ``MTLModel.loss``.

    Args:
        tasks: the names of the outputs, in their order.
        losses, weights: by task, used where ``y_hat`` does not bring its own.
        y_hat, y, mask: what the model gave and what it should have, in the forms that ``MTLModel.loss`` takes.
        weighting: without one, the sum of losses times ``weights``.

    Raises:
        ValueError: no task has both a loss and a target; among several processes, no task has a loss.
    """
    if is_triple(y_hat):
        outputs, own_losses, own_weights = (by_task("y_hat", part, tasks) for part in y_hat)
    else:
        outputs, own_losses, own_weights = by_task("y_hat", y_hat, tasks), dict(losses), dict(weights)
    found, present = task_losses(outputs, by_task("y", y, tasks), own_losses, by_task("mask", mask, tasks), apart=apart)
    rest: list[Any] = []
    for name, y in outputs.items():
        if name not in found and (loss := own_losses.get(name)) is not None:
            rest += (y, own_weights.get(name), *(loss.parameters() if isinstance(loss, nn.Module) else ()))
    if not found and Processes.of() is not None:  # of whom others may have a target, and wait
        found = {n: y.new_zeros(()) for n, y in outputs.items() if own_losses.get(n) is not None and torch.is_tensor(y)}
        present = dict.fromkeys(found, False)
    if not found:
        raise ValueError("y: expected a target for a task with a loss, got none")
    if weighting is not None:
        total = weighting(found, None if all(p is True for p in present.values()) else present)
        return _with_the_rest(total, rest), found
    used = [own_weights.get(name) for name in found]
    if any(isinstance(w, nn.Parameter) for w in used) and not torch.compiler.is_compiling():
        warnings.warn(UNBOUNDED, UserWarning, stacklevel=3)
    return _with_the_rest(_weighted(found, list(map(_weight, found, used))), rest), found


def _with_the_rest(total: Tensor, rest: Sequence[Any]) -> Tensor:
    """The total, which among several processes also depends on what is of tasks without a target, by zero.

    Another process may have a target for them, and all wait for each other's gradients of every parameter.
    """
    for t in rest if Processes.of() is not None else ():
        if isinstance(t, Tensor) and t.requires_grad:
            nothing = only(t, torch.zeros(t.shape[:1], dtype=torch.bool, device=t.device))
            total = total + nothing.sum().to(total)
    return total


def _weight(name: str, weight: Any) -> Any:
    """A ``loss_weight`` as a number or a tensor without axes; None is 1, learned ones [1] lose their axis."""
    if weight is None:
        return 1
    if isinstance(weight, Tensor) and weight.numel() == 1:
        return weight.reshape(())
    if not isinstance(weight, Real):
        expected = "expected a number, a tensor of one element or None"
        raise TypeError(f"loss_weight of {name!r}: {expected}, got {shown(weight)}")
    return weight


def _weighted(found: Mapping[str, Tensor], numbers: Sequence[Any]) -> Tensor:
    """sum_i w_i L_i."""
    values = list(found.values())
    if all(not isinstance(w, Tensor) and w == numbers[0] for w in numbers):
        total = torch.stack(values).sum()
        return total if numbers[0] == 1 else total * numbers[0]
    return torch.stack([v * w for v, w in zip(values, numbers, strict=True)]).sum()


class Objective(TakenNames, nn.Module):
    """The half of a multi-task model that knows what its tasks are for: their loss, and which parameters serve them."""

    output_tasks: list[str]
    layer_names: list[str]
    weighting: Weighting | None
    _anchors: Anchors

    def _weigh(
        self,
        kind: str | Mapping[str, float] | Sequence[float] | Weighting | None,
        losses: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make the weighting of the outputs that have a loss; a child of that name if there is one."""
        if kind is None:
            if not hasattr(self, "weighting"):  # the name of a node, where that is allowed
                self.weighting = None
            return
        tasks = [name for name in dict.fromkeys(self.output_tasks) if losses.get(name) is not None]
        if not tasks:
            raise ValueError("weighting: expected an output with a loss, got none")
        self.weighting = _as_weighting(kind, tasks, device=device, dtype=dtype)

    def loss(
        self,
        y_hat: Any,
        y: Mapping[str, Any] | Sequence[Any] | Tensor,
        *,
        mask: Mapping[str, Tensor] | Sequence[Tensor | None] | Tensor | None = None,
        weighting: str | Mapping[str, float] | Sequence[float] | Weighting | None = None,
        apart: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised, and the losses that it is made of.

        Without a weighting the total is torchMTL's, the sum of ``loss_weight`` times ``loss`` (1 without a weight; a
        learned one, 'auto', warns that it has no bound).
        Outputs without a loss or a target are left out; an output that is listed twice counts once.

        A label may be missing: NaN in floating-point targets, ``ignore_index`` in class indices, False in ``mask``. It
        is left out of its task's mean, and its prediction has exactly zero for a gradient. A task without any label in
        the batch has a loss of 0 and, whatever the weighting, no gradient. See ``task_losses`` for the losses that can
        do that.

        Args:
            y_hat: what the model returned, or its first list, or a dict by task.
            y: targets in the order of ``output_tasks``, or a dict by task; None, or no entry, is a task without one.
                Its own layers then have no gradient; among several processes one of zeros, as a process may have a
                target where another has none, which may have none at all.
            mask: bool, True where there is a label, in the same form; of a target's shape or [B].
            weighting: instead of the model's own: a ``Weighting``, numbers by task or in the order of the tasks that
                have a loss, or the name of one that has nothing to remember ("equal", "rlw", "geometric").
            apart: compute every task's loss by itself, not those that are alike together: for methods that take the
                gradient of each, which then costs no more than it must.

        Returns:
            (total, losses by task, not weighted), tensors without axes.

        Raises:
            ValueError, TypeError: names that no task has, shapes that do not fit, no task with a loss and a target, a
                weighting whose state nobody would keep.
        """
        tasks = self.output_tasks
        losses, weights = self._held_losses()
        used = self._weighting_of(weighting, losses)
        total, found = objective(tasks, losses, weights, y_hat, y, mask, used, apart)
        if used is None or used is not self._own_weighting():  # which tells by itself
            watching.tell(self, "task losses", found, weights if used is None else None)
        return total, found

    def _held_losses(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """(losses, their weights) by the name of the node."""
        raise NotImplementedError

    def _refresh(self) -> None:
        """Before the outputs or the anchors are read: what users may have changed since."""

    def _own_weighting(self) -> Weighting | None:
        own = getattr(self, "weighting", None)
        return own if isinstance(own, Weighting) else None

    def _weighting_of(self, kind: Any, losses: Mapping[str, Any]) -> Weighting | None:
        if kind is None or isinstance(kind, Weighting):
            return self._own_weighting() if kind is None else kind
        if isinstance(kind, str) and kind in WEIGHTINGS and not WEIGHTINGS[kind].stateless:
            raise ValueError(
                f"weighting: {kind!r} learns or remembers; make it once, MTLModel(..., weighting={kind!r}), or give a "
                "Weighting"
            )
        return _as_weighting(kind, [n for n in dict.fromkeys(self.output_tasks) if losses.get(n) is not None])

    # ------------------------------------------------------------------------------- gradients of several tasks apart

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters of layers that several outputs depend on."""
        self._refresh()
        return shared_parameters(self._anchors, self.output_tasks, self._modules)

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """Parameters of layers that this output depends on and no other. (Weights of losses are not among them.)

        Raises:
            ValueError: there is no such output.
        """
        if task not in self.output_tasks:
            raise unknown("task", task, list(dict.fromkeys(self.output_tasks)))
        self._refresh()
        return task_parameters(self._anchors, self.output_tasks, self._modules, task)

    @property
    def feature_names(self) -> list[str]:
        """The nodes at which tasks part: several outputs depend on them, and each task's own layers take theirs."""
        return self._features()

    def _features(self) -> list[str]:
        self._refresh()
        return feature_names(self._anchors, self.output_tasks)

    def with_features(self, input: Any) -> tuple[list[Any], Any]:
        """Outputs along with what they have in common, for methods that work on each task's gradient.

        ``torchjd.autojac.mtl_backward(losses, features, ...)`` takes them: every path from a loss to
        ``shared_parameters()`` goes through ``features``.

        Args:
            input: as in ``forward``.

        Returns:
            (outputs of the nodes ``feature_names``, what ``forward`` returns).
        """
        names, outputs = self._features(), self.output_tasks
        other = copy.copy(self)  # the same layers with another schedule
        other.output_tasks = [*outputs, *names]
        made = other(input)
        count = len(outputs)
        return made[0][count:], tuple(part[:count] for part in made)
