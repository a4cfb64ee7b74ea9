"""Which units a task uses: random masks, one per task, drawn once.

Axes: T tasks, C units (channels).
"""

from __future__ import annotations

from numbers import Real
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray

from ..ops import checks, host

#: Units off: how many, or which fraction; ``units_off`` checks it.
Sigma = Annotated[int | float, None]


def units_off(unit_count: int, sigma: object) -> int:
    """How many of C units a task does without: sigma itself if it is an int, that fraction of them if it is a float.

    Raises:
        ValueError: a negative int, or a float outside [0, 1].
        TypeError: no number.
    """
    if isinstance(sigma, Real) and not isinstance(sigma, bool):
        if not hasattr(sigma, "__index__"):
            fraction = float(sigma)
            if not 0.0 <= fraction <= 1.0:
                raise ValueError(f"sigma: expected a fraction of units off from 0.0 to 1.0, got {sigma}")
            return int(unit_count * fraction)
        off = checks.integer("sigma", sigma)
        if off < 0:
            raise ValueError(f"sigma: expected 0 or more units off, got {off}")
        return min(off, unit_count)
    raise TypeError(f"sigma: expected an int (units off) or a float (fraction of units off), got {sigma!r}")


def draws(task_count: int, unit_count: int, generator: torch.Generator | None) -> NDArray[np.float64]:
    """[T, C] numbers in [0, 1): from NumPy's global generator, row by row, or from a torch.Generator."""
    if generator is None:
        return np.random.rand(task_count, unit_count)
    with host.unseen():  # fake tensors have no numbers
        made = torch.rand(task_count, unit_count, dtype=torch.float64, device=generator.device, generator=generator)
        return np.asarray(made.to("cpu"))


def keep_largest(numbers: NDArray[np.float64], off: int) -> NDArray[np.bool_]:
    """[T, C]: in every row all but the first ``off`` in rising order, as a slice understands ``off``."""
    kept = np.ones(numbers.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(numbers, axis=1, kind="stable")[:, :off], False, axis=1)
    return kept


def keep_balanced(numbers: NDArray[np.float64], off: int) -> NDArray[np.bool_]:
    """[T, C]: task after task keeps the units that were used least so far, those with the largest numbers among equals.

    Used counts then never differ by more than one: a unit is used twice only after all have been used once.
    """
    kept = np.empty(numbers.shape, dtype=bool)
    used = np.zeros(numbers.shape[1])
    for t, row in enumerate(numbers):
        kept[t] = keep_largest((row - used)[None], off)[0]
        used += kept[t]
    return kept


def adopt_orphans(kept: NDArray[np.bool_], numbers: NDArray[np.float64]) -> None:
    """Give every unit that no task uses the place of one that several do, in place.

    It takes the place that was kept most narrowly: the one with the smallest number. No task's count changes.
    """
    used = kept.sum(0)
    for orphan in np.flatnonzero(used == 0):
        places = np.where(kept & (used > 1), numbers, np.inf)
        t, c = np.unravel_index(np.argmin(places), places.shape)
        kept[t, c], kept[t, orphan] = False, True
        used[c] -= 1
        used[orphan] = 1


def draw(
    unit_count: int,
    task_count: int,
    off: int,
    generator: torch.Generator | None = None,
    *,
    no_orphans: bool = False,
    balanced: bool = False,
) -> NDArray[np.bool_]:
    """[T, C] True where task t uses unit c. C T numbers are drawn whatever the options.

    Raises:
        ValueError: ``no_orphans`` with fewer places, T (C - off), than units.
    """
    places = task_count * (unit_count - off)
    if no_orphans and places < unit_count:
        raise ValueError(
            f"no_orphans: expected room for all {unit_count} units, got {places} places "
            f"({task_count} tasks of {unit_count - off} units)"
        )
    numbers = draws(task_count, unit_count, generator)
    if balanced:
        return keep_balanced(numbers, off)
    kept = keep_largest(numbers, off)
    if no_orphans:
        adopt_orphans(kept, numbers)
    return kept
