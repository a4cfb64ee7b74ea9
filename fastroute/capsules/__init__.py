"""Capsule routing: layers that route sequences of vectors to sequences of vectors.

Examples:
    >>> Routing = fastroute.EfficientVectorRouting
    >>> net = nn.Sequential(Routing(-1, 16, 8, 8), Routing(16, 10, 8, 1))
    >>> net(torch.randn(4, 100, 8)).shape
    torch.Size([4, 10, 1])
"""

from .attribution import credit, credit_assignment, record, trace
from .chunks import VectorChunks
from .compose import Add, Concatenate, Residual
from .credit_map import Credit
from .definable import DefinableVectorRouting
from .matrix import GenerativeMatrixRouting
from .slots import SlotAttention
from .vector import EfficientVectorRouting

__all__ = [
    "Add",
    "Concatenate",
    "Credit",
    "DefinableVectorRouting",
    "EfficientVectorRouting",
    "GenerativeMatrixRouting",
    "Residual",
    "SlotAttention",
    "VectorChunks",
    "credit",
    "credit_assignment",
    "record",
    "trace",
]
