"""The base of rewards for a sample's outcome."""

from fastroute import networks

from ..._names import ModulesOwnNames
from ..._upstream import Literal


class BaseReward(ModulesOwnNames, Literal, networks.BaseReward):
    """``fastroute.networks.BaseReward`` that takes no notice of ``scale``."""
