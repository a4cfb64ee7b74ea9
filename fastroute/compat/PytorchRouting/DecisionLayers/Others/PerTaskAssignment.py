"""The task label as the action."""

from fastroute import networks

from ..._upstream import Named


class PerTaskAssignment(Named, networks.PerTaskAssignment):  # type: ignore[misc]
    """``fastroute.networks.PerTaskAssignment`` of (xs, mxs, and whatever else decisions are given)."""
