"""The task label as the action."""

from fastroute import networks

from ..._upstream import Named, callable_as_its_class


class PerTaskAssignment(Named, networks.PerTaskAssignment):  # type: ignore[misc]
    """``fastroute.networks.PerTaskAssignment`` of (xs, mxs, and whatever else decisions are given)."""


callable_as_its_class(__name__)
