"""The task label as the action."""

from fastroute import networks

from ..._upstream import callable_as_its_class
from ..Decision import Decision
from ._fixed import Fixed


@Decision.register
class PerTaskAssignment(Fixed, networks.PerTaskAssignment):  # type: ignore[misc]
    """``fastroute.networks.PerTaskAssignment`` of (xs, mxs, and whatever else decisions are given)."""


callable_as_its_class(__name__)
