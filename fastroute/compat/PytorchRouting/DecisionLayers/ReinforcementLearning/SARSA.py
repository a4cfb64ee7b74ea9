"""SARSA."""

from fastroute import networks

from .QLearning import QLearning


class SARSA(QLearning, networks.SARSA):
    """``fastroute.networks.SARSA`` with the current state's value of the next action as the target."""
