"""The weighted policy learner."""

from fastroute import networks

from .ActorCritic import ActorCritic


class WPL(ActorCritic, networks.WPL):
    """``fastroute.networks.WPL`` with its steps taken on log-probabilities."""
