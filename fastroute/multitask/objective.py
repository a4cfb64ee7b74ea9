"""What a model minimises: its tasks' losses, weighted as it was told to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .loss import task_losses
from .weighting import Weighting
from .weighting.base import in_order


def by_task(argument: str, given: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """What users give per task, a dict or a list in the order of ``tasks``, by name. A name twice counts once."""
    if given is None:
        return {}
    if isinstance(given, Tensor):
        if len(tasks) != 1:
            raise TypeError(f"{argument}: expected a dict by task or a list, got a tensor {list(given.shape)}")
        return {tasks[0]: given}
    if isinstance(given, Mapping):
        in_order(argument, given, list(dict.fromkeys(tasks)))
        return dict(given)
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """(total, losses by task), see ``MTLModel.loss``.

    Args:
        tasks: the names of the outputs, in their order.
        losses, weights: by task, used where ``y_hat`` does not bring its own.
        y_hat, y, mask: what the model gave and what it should have, in the forms that ``MTLModel.loss`` takes.
        weighting: without one, the sum of losses times ``weights``.

    Raises:
        ValueError: no task has both a loss and a target.
    """
    if is_triple(y_hat):
        outputs, own_losses, own_weights = (by_task("y_hat", part, tasks) for part in y_hat)
    else:
        outputs, own_losses, own_weights = by_task("y_hat", y_hat, tasks), dict(losses), dict(weights)
    found, present = task_losses(outputs, by_task("y", y, tasks), own_losses, by_task("mask", mask, tasks))
    if not found:
        raise ValueError("y: expected a target for a task with a loss, got none")
    if weighting is not None:
        return weighting(found, None if all(p is True for p in present.values()) else present), found
    return _weighted(found, [own_weights.get(name) for name in found]), found


def _weighted(found: Mapping[str, Tensor], weights: Sequence[Any]) -> Tensor:
    """sum_i w_i L_i. A weight of None is 1; learned ones [1] lose their axis."""
    values = list(found.values())
    numbers = [1 if w is None else w for w in weights]
    if all(not isinstance(w, Tensor) and w == numbers[0] for w in numbers):
        total = torch.stack(values).sum()
        return total if numbers[0] == 1 else total * numbers[0]
    return torch.stack([
        v * (w.reshape(()) if isinstance(w, Tensor) else w) for v, w in zip(values, numbers, strict=True)
    ]).sum()  # fmt: skip
