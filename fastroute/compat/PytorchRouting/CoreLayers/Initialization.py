"""The first module of a routed network."""

from fastroute.networks import Initialization

__all__ = ["Initialization"]
