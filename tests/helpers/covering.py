"""Fewer cases than a cross product has, in which all values of any two axes still meet."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest


def pairs(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases, a value of each axis in each, such that every two values of different axes are together in one.

    The same in every run: of the cross product, the case that has most pairs that are not there yet comes next.
    """
    values = [list(axis) for axis in axes]

    def met(case: tuple[int, ...]) -> Iterator[Any]:
        return itertools.combinations(enumerate(case), 2)

    left = list(itertools.product(*(range(len(axis)) for axis in values)))
    missing, chosen = {pair for case in left for pair in met(case)}, []
    while missing:
        best = max(left, key=lambda case: sum(pair in missing for pair in met(case)))
        missing.difference_update(met(best))
        chosen.append(best)
    return [tuple(axis[k] for axis, k in zip(values, case, strict=True)) for case in sorted(chosen)]


def in_pairs(*, indirect: Sequence[str] = (), **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """``pytest.mark.parametrize`` over ``pairs``; a mapping's keys are the names of its values."""
    named = [axis.items() if isinstance(axis, Mapping) else [(str(x), x) for x in axis] for axis in axes.values()]
    cases = [
        pytest.param(*(value for _, value in case), id="-".join(name for name, _ in case)) for case in pairs(*named)
    ]
    return pytest.mark.parametrize(list(axes), cases, indirect=list(indirect))
