"""Pictures of what a router does. Drawn without pyplot, so they need no display and change no global state.

Every function returns a ``matplotlib.figure.Figure``, and writes it where ``path`` says.

Examples:
    >>> figure = fastroute.plots.credit(torch.rand(2, 8, 8), torch.randn(2, 8, 8), labels=[3, 7])
    >>> figure.savefig("credit.png")  # doctest: +SKIP
"""

from .channel_masks import masks
from .credit_maps import credit
from .model_graph import graph
from .rooflines import roofline
from .routing_maps import actions, routing, routing_over_time
from .weight_curves import weights

__all__ = ["actions", "credit", "graph", "masks", "roofline", "routing", "routing_over_time", "weights"]
