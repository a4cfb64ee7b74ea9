"""Q-learning."""

from fastroute import networks

from ..Decision import Decision


class QLearning(Decision, networks.QLearning):
    """``fastroute.networks.QLearning`` with the target max q' - r."""
