"""Multi-task models from a list of dicts: a graph of layers that is checked and scheduled once."""

from .model import MTLModel
from .wrapping import Add, Concat, Lambda, Multiply, SimpleSelect, SliceSelect, Split, Stack

__all__ = ["Add", "Concat", "Lambda", "MTLModel", "Multiply", "SimpleSelect", "SliceSelect", "Split", "Stack"]
