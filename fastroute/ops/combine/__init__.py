"""``combine``: the weighted sum over a sample's entries."""

from .op import combine as combine
