"""Multi-task models from a list of dicts: a graph of layers that is checked and scheduled once."""

from .model import MTLModel
from .wrapping import Add, Concat, Lambda, Multiply, SimpleSelect, SliceSelect, Split
from .wrapping import Stack as Stack  # not in __all__: fastroute.Stack is that of fastroute.networks

__all__ = ["Add", "Concat", "Lambda", "MTLModel", "Multiply", "SimpleSelect", "SliceSelect", "Split"]
