"""SARSA."""

from fastroute import networks

from ..._upstream import callable_as_its_class
from .QLearning import QLearning


class SARSA(QLearning, networks.SARSA):
    """``fastroute.networks.SARSA`` with the current state's value of the next action as the target."""


callable_as_its_class(__name__)
