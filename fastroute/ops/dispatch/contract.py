"""What passes between ``dispatch``, its backends and the users of a plan."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Plan(NamedTuple):
    """Entries sorted by module, in their own order within one; those that match no module come last."""

    order: Tensor  #: [N] int64, the sorted entries
    offsets: Tensor  #: [K + 1] int64, module k has order[offsets[k]:offsets[k + 1]]
    beyond: Tensor  #: [1] int64, how many actions were K or more: those are dropped like negative ones
    bounds: list[int] | None = None  #: the offsets as numbers, where reading them costs nothing
    samples: Tensor | None = None  #: [N] int64, the sample of each sorted entry; None where that is ``order``
    per_sample: int = 1  #: k
