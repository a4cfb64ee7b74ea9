"""Capsule routing: layers that route sequences of vectors to sequences of vectors."""

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
