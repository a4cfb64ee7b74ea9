"""Capsule routing: layers that route sequences of vectors to sequences of vectors."""

from .chunks import VectorChunks as VectorChunks
from .credit import credit_assignment as credit_assignment
from .definable import DefinableVectorRouting as DefinableVectorRouting
from .slots import SlotAttention as SlotAttention
from .vector import EfficientVectorRouting as EfficientVectorRouting
