"""Policy gradients."""

from fastroute import networks

from ..._upstream import callable_as_its_class
from ..Decision import Decision


class REINFORCE(Decision, networks.REINFORCE):
    """``fastroute.networks.REINFORCE``."""


class REINFORCEBl1(Decision, networks.REINFORCEBl1):
    """``fastroute.networks.REINFORCEBl1`` with output 0 of its network as the baseline."""


class REINFORCEBl2(REINFORCEBl1, networks.REINFORCEBl2):
    """``fastroute.networks.REINFORCEBl2`` with output 0 of its network as the baseline."""


class EGreedyREINFORCE(REINFORCE, networks.EGreedyREINFORCE):
    """``fastroute.networks.EGreedyREINFORCE`` with weights that multiply the sum over all samples."""


callable_as_its_class(__name__)
