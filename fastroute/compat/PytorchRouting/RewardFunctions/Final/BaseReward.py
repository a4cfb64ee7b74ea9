"""The base of rewards for a sample's outcome."""

from fastroute import networks

from ..._upstream import Literal


class BaseReward(Literal, networks.BaseReward):
    """``fastroute.networks.BaseReward`` that takes no notice of ``scale``."""
