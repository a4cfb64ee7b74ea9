"""Actor and critic."""

from fastroute import networks

from ..._upstream import callable_as_its_class
from .REINFORCE import REINFORCE


class ActorCritic(REINFORCE, networks.ActorCritic):
    """``fastroute.networks.ActorCritic`` with the critic's target max Q' - r."""


callable_as_its_class(__name__)
