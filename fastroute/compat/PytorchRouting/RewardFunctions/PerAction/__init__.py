"""Rewards for single actions."""

from fastroute import networks
from fastroute.networks import ManualReward

from ..._upstream import Literal


class CollaborationReward(Literal, networks.CollaborationReward):
    """``fastroute.networks.CollaborationReward`` times ``reward_ratio`` once more."""


class RunningAverageCollaborationReward(Literal, networks.RunningAverageCollaborationReward):
    """``fastroute.networks.RunningAverageCollaborationReward``."""


__all__ = ["CollaborationReward", "ManualReward", "RunningAverageCollaborationReward"]
