"""A module per action."""

from fastroute import networks

from .._upstream import Named


class Selection(Named, networks.Selection):  # type: ignore[misc]
    """``fastroute.networks.Selection`` of (xs, mxs, actions, mask=None)."""

    _fastroute_marks = "_recipe"
