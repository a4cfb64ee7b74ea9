"""Rewards for a sample's outcome."""

from fastroute import networks

from .BaseReward import BaseReward


class NegLossReward(BaseReward, networks.NegLossReward):
    """``fastroute.networks.NegLossReward`` that takes no notice of ``scale``."""


class CorrectClassifiedReward(BaseReward, networks.CorrectClassifiedReward):
    """``fastroute.networks.CorrectClassifiedReward`` that takes no notice of ``scale``."""


__all__ = ["CorrectClassifiedReward", "NegLossReward"]
