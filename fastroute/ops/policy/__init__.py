"""``policy``: a discrete choice per row."""

from .op import policy as policy
