"""The base of rewards for single actions, and the default: none."""

from fastroute.networks import PerActionBaseReward

__all__ = ["PerActionBaseReward"]
