"""The weighted policy learner."""

from fastroute import networks

from ..._upstream import callable_as_its_class
from .ActorCritic import ActorCritic


class WPL(ActorCritic, networks.WPL):
    """``fastroute.networks.WPL`` with its steps taken on log-probabilities."""


callable_as_its_class(__name__)
