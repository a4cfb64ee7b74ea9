"""Advantages and a state value."""

from fastroute import networks

from ..._upstream import callable_as_its_class
from ..Decision import Decision


class AdvantageLearning(Decision, networks.AdvantageLearning):
    """``fastroute.networks.AdvantageLearning``."""


class BootstrapAdvantageLearning(AdvantageLearning, networks.BootstrapAdvantageLearning):
    """``fastroute.networks.BootstrapAdvantageLearning`` without discounting, with the final reward at the end."""


class SurpriseLearning(AdvantageLearning, networks.SurpriseLearning):
    """``fastroute.networks.SurpriseLearning`` without discounting."""


callable_as_its_class(__name__)
