"""Capsule routing: layers that route sequences of vectors to sequences of vectors."""

from .chunks import VectorChunks as VectorChunks
from .compose import Add as Add
from .compose import Concatenate as Concatenate
from .compose import Residual as Residual
from .credit import credit as credit
from .credit import credit_assignment as credit_assignment
from .credit import record as record
from .credit import trace as trace
from .credit_map import Credit as Credit
from .definable import DefinableVectorRouting as DefinableVectorRouting
from .matrix import GenerativeMatrixRouting as GenerativeMatrixRouting
from .slots import SlotAttention as SlotAttention
from .vector import EfficientVectorRouting as EfficientVectorRouting
