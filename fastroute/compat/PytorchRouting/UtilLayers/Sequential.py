"""A routed network as a list of modules."""

from fastroute.networks import Sequential

__all__ = ["Sequential"]
