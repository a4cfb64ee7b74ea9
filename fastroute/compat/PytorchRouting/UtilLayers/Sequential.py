"""A routed network as a list of modules."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from torch import Tensor

from fastroute import networks

from .._samples import Samples

__all__ = ["Sequential"]


class Sequential(networks.Sequential):
    """``fastroute.networks.Sequential``, whose trajectory is a list."""

    def forward(self, x: Tensor, tasks: SequenceOf[Any] | Tensor = ()) -> tuple[Tensor, Samples]:
        """(the last batch, a list of its samples)."""
        y, mxs = super().forward(x, tasks)
        return y, Samples.of(mxs)
