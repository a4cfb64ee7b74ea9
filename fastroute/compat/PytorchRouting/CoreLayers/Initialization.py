"""The first module of a routed network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastroute import networks

from .._samples import Samples

__all__ = ["Initialization"]


class Initialization(networks.Initialization):
    """``fastroute.networks.Initialization``, whose trajectory is a list."""

    def forward(self, xs: Tensor, tasks: Sequence[Any] | Tensor = ()) -> tuple[Tensor, Samples, None]:
        """(xs, a list of its samples, None: no actions yet)."""
        xs, mxs, actions = super().forward(xs, tasks)
        return xs, Samples.of(mxs), actions
