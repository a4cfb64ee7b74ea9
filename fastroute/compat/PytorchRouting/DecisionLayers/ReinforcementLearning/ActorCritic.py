"""Actor and critic."""

from fastroute import networks

from .REINFORCE import REINFORCE


class ActorCritic(REINFORCE, networks.ActorCritic):
    """``fastroute.networks.ActorCritic`` with the critic's target max Q' - r."""
