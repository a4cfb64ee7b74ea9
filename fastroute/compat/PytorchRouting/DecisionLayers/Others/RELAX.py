"""RELAX."""

from fastroute import networks

from ..._upstream import callable_as_its_class
from ..Decision import Decision


class RELAX(Decision, networks.RELAX):
    """``fastroute.networks.RELAX`` with upstream's estimate, whose gradients come with ``backward()``."""


callable_as_its_class(__name__)
