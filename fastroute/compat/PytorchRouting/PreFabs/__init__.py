"""Cells with routed projections."""

from .RNNcells import RoutingLSTMCell

__all__ = ["RoutingLSTMCell"]
