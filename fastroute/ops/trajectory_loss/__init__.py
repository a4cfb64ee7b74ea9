"""``trajectory_loss``: the routing loss of a trajectory."""

from .op import trajectory_loss as trajectory_loss
