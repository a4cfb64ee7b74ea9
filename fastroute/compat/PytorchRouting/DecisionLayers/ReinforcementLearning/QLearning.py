"""Q-learning."""

from fastroute import networks

from ..._upstream import callable_as_its_class
from ..Decision import Decision


class QLearning(Decision, networks.QLearning):
    """``fastroute.networks.QLearning`` with the target max q' - r."""


callable_as_its_class(__name__)
