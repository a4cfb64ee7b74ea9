"""How the losses of several tasks become one, by name or by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...ops.arguments import Tasks, checked
from .base import Losses, Present, Weighting, unknown
from .fixed import RLW, EqualWeights, FixedWeights, GeometricMean
from .learned import IMTL, UNBOUNDED, LearnedWeights, Uncertainty
from .remembering import DWA, FAMO, STCH

WEIGHTINGS: dict[str, type[Weighting]] = {
    "equal": EqualWeights,
    "auto": LearnedWeights,
    "uncertainty": Uncertainty,
    "dwa": DWA,
    "rlw": RLW,
    "geometric": GeometricMean,
    "stch": STCH,
    "famo": FAMO,
    "imtl": IMTL,
}


@checked
def as_weighting(
    kind: str | Mapping[str, float] | Sequence[float] | Weighting, tasks: Tasks, **options: Any
) -> Weighting:
    """A weighting of these tasks from what users write for one.

    Args:
        kind: a name ("equal", "auto", "uncertainty", "dwa", "rlw", "geometric", "stch", "famo", "imtl"), numbers by
            task or in a list, or a ``Weighting``, which is returned as it is.
        tasks: names, or how many.
        options: those of the class.

    Raises:
        ValueError: no weighting has that name.

    Examples:
        >>> fastroute.as_weighting("uncertainty", ["price", "kind"])
        Uncertainty(tasks=2)
        >>> fastroute.as_weighting({"price": 0.5, "kind": 3.0}, ["price", "kind"]).tasks
        ('price', 'kind')
    """
    if isinstance(kind, Weighting):
        return kind
    if not isinstance(kind, str):
        return FixedWeights(kind, tasks, **options)
    if kind not in WEIGHTINGS:
        text = str(unknown("weighting", kind, list(WEIGHTINGS))).replace("there is no task", "there is no")
        raise ValueError(f"{text} (for fixed weights give the numbers)")
    return WEIGHTINGS[kind](tasks, **options)


__all__ = [
    "DWA",
    "FAMO",
    "IMTL",
    "RLW",
    "STCH",
    "UNBOUNDED",
    "WEIGHTINGS",
    "EqualWeights",
    "FixedWeights",
    "GeometricMean",
    "LearnedWeights",
    "Losses",
    "Present",
    "Uncertainty",
    "Weighting",
    "as_weighting",
]
