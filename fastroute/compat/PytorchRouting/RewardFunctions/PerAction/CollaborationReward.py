"""Rewards for what others do."""

from __future__ import annotations

from fastroute import networks

from ..._upstream import Literal
from .PerActionBaseReward import PerActionBaseReward


class _Counting(Literal, PerActionBaseReward):
    """Upstream's names of what subclasses read."""

    @property
    def _reward_ratio(self) -> float:
        ratio: float = self.reward_ratio  # type: ignore[attr-defined]
        return ratio

    @property
    def _num_actions(self) -> int | None:
        count: int | None = self.num_actions  # type: ignore[attr-defined]
        return count


class CollaborationReward(_Counting, networks.CollaborationReward):
    """``fastroute.networks.CollaborationReward`` times ``reward_ratio`` once more."""


class RunningAverageCollaborationReward(_Counting, networks.RunningAverageCollaborationReward):
    """``fastroute.networks.RunningAverageCollaborationReward``."""
