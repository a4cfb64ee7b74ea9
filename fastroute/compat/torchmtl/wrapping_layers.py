"""Functions as nodes."""

from fastroute.multitask import Concat, SimpleSelect, SliceSelect

__all__ = ["Concat", "SimpleSelect", "SliceSelect"]
