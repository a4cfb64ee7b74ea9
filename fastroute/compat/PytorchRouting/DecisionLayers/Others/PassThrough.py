"""Action 0 for all."""

from fastroute import networks

from ..._upstream import Named


class PassThrough(Named, networks.PassThrough):  # type: ignore[misc]
    """``fastroute.networks.PassThrough`` of (xs, mxs, and whatever else decisions are given)."""
