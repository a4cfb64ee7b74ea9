"""Multi-task models from a list of dicts: a graph of layers that is checked and scheduled once."""

from .adapters import EachTask, OfTask, ToTasks, Unpack
from .cross_stitch import CrossStitch
from .expert_bank import Experts
from .experts import CGC, PLE, MMoE
from .model import MTLModel
from .wrapping import Add, Concat, Lambda, Multiply, SimpleSelect, SliceSelect, Split
from .wrapping import Stack as Stack  # not in __all__: fastroute.Stack is that of fastroute.networks

__all__ = [
    "CGC",
    "PLE",
    "Add",
    "Concat",
    "CrossStitch",
    "EachTask",
    "Experts",
    "Lambda",
    "MMoE",
    "MTLModel",
    "Multiply",
    "OfTask",
    "SimpleSelect",
    "SliceSelect",
    "Split",
    "ToTasks",
    "Unpack",
]
