"""RELAX."""

from fastroute import networks

from ..Decision import Decision


class RELAX(Decision, networks.RELAX):
    """``fastroute.networks.RELAX`` with upstream's estimate, whose gradients come with ``backward()``."""
