"""Rewards for a sample's outcome."""

from .CorrectClassifiedReward import CorrectClassifiedReward
from .NegLossReward import NegLossReward

__all__ = ["CorrectClassifiedReward", "NegLossReward"]
