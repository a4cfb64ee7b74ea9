"""``Processes``: a process group, and what its processes count together.

Axes: W processes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Processes(NamedTuple):
    """A process group, in what can be copied, saved and compiled."""

    name: str  #: as ``torch.ops._c10d_functional`` takes it
    rank: int  #: this process's place in it
    size: int  #: W

    @classmethod
    def of(cls, group: Any = None) -> Processes | None:
        """A group, None for all processes; None where there is one process alone."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        group = distributed.group.WORLD if group is None else group
        made = cls(str(group.group_name), int(group.rank()), int(group.size()))
        return made if made.size > 1 else None

    def sum(self, t: Tensor) -> Tensor:
        """The sum over processes, without a gradient."""
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(t.contiguous(), "sum", self.name))

    def gather(self, t: Tensor) -> Tensor:
        """[...] -> [W, ...], in the order of ranks, without a gradient."""
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_gather_into_tensor(t.contiguous()[None], self.size, self.name))
