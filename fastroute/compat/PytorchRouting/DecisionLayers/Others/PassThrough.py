"""Action 0 for all."""

from fastroute import networks

from ..._upstream import callable_as_its_class
from ..Decision import Decision
from ._fixed import Fixed


@Decision.register
class PassThrough(Fixed, networks.PassThrough):  # type: ignore[misc]
    """``fastroute.networks.PassThrough`` of (xs, mxs, and whatever else decisions are given)."""


callable_as_its_class(__name__)
