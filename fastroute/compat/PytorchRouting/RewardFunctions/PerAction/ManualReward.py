"""A table of rewards."""

from __future__ import annotations

from torch import Tensor

from fastroute import networks

from .PerActionBaseReward import PerActionBaseReward


class ManualReward(PerActionBaseReward, networks.ManualReward):
    """``fastroute.networks.ManualReward``."""

    @property
    def _rewards(self) -> Tensor:
        return self.table
