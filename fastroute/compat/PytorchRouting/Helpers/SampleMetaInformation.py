"""One sample's history."""

from fastroute.networks import SampleMetaInformation

__all__ = ["SampleMetaInformation"]
