"""Rewards for single actions."""

from .CollaborationReward import CollaborationReward, RunningAverageCollaborationReward
from .ManualReward import ManualReward

__all__ = ["CollaborationReward", "ManualReward", "RunningAverageCollaborationReward"]
