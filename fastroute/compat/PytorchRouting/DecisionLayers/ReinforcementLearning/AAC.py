"""Advantage actor-critics."""

from fastroute import networks

from ..._upstream import callable_as_its_class
from ..Decision import Decision


class AAC(Decision, networks.AAC):
    """``fastroute.networks.AAC`` with the critic's loss as a mean over samples."""


class BootstrapAAC(AAC, networks.BootstrapAAC):
    """``fastroute.networks.BootstrapAAC``; upstream's raises an error."""


class EGreedyAAC(networks.EGreedyAAC, AAC):  # in this order: that one is no subclass of fastroute's AAC
    """``fastroute.networks.EGreedyAAC`` with weights that multiply the sum over all samples."""


callable_as_its_class(__name__)
