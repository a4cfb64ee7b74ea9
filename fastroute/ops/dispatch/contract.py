"""What passes between ``dispatch``, its backends and the users of a plan."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..host import has_numbers, on_host


class Plan(NamedTuple):
    """Entries sorted by module, in their own order within one; those that match no module come last."""

    order: Tensor  #: [N] int64, the sorted entries
    offsets: Tensor  #: [K + 1] int64, module k has order[offsets[k]:offsets[k + 1]]
    beyond: Tensor  #: [1] int64, how many actions were K or more: those are dropped like negative ones
    bounds: list[int] | None = None  #: the offsets as numbers, where reading them costs nothing
    samples: Tensor | None = None  #: [N] int64, the sample of each sorted entry; None where that is ``order``
    per_sample: int = 1  #: k


def check_plan(order: Tensor | None, offsets: Tensor, rows: int) -> None:
    """Whether a plan of rows, made by hand, is one: looked at on a CPU, as the C++ does."""
    bounds = on_host(offsets)
    if bounds is not None and (bounds[0] != 0 or bounds[-1] > rows or any(a > b for a, b in pairwise(bounds))):
        raise ValueError(f"plan: expected offsets from 0, never falling, to at most {rows}, got {bounds}")
    if order is None or not order.is_cpu or not has_numbers(order) or not rows:
        return
    least, most = map(int, order.aminmax())
    if least < 0 or most >= rows or not bool(order.new_zeros(rows, dtype=torch.bool).index_fill_(0, order, True).all()):
        raise ValueError(f"plan: expected each of 0 to {rows - 1} once in order, got others, from {least} to {most}")
