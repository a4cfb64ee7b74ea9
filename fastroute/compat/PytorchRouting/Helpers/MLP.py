"""A multi-layer perceptron."""

from fastroute.networks import MLP

__all__ = ["MLP"]
