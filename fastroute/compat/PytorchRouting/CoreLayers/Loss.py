"""The loss of a routed network."""

from fastroute import networks

from .._upstream import Literal


class Loss(Literal, networks.Loss):
    """``fastroute.networks.Loss`` that takes no notice of ``discounting``."""
