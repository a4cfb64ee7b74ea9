"""Action 0 for all."""

from fastroute import networks

from ..._upstream import Named, callable_as_its_class


class PassThrough(Named, networks.PassThrough):  # type: ignore[misc]
    """``fastroute.networks.PassThrough`` of (xs, mxs, and whatever else decisions are given)."""


callable_as_its_class(__name__)
