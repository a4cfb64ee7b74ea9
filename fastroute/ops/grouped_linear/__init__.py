"""``grouped_linear``: linear modules over a plan's entries."""

from .op import grouped_linear as grouped_linear
