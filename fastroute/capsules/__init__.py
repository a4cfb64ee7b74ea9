"""Capsule routing: layers that route sequences of vectors to sequences of vectors."""

from .credit import credit_assignment as credit_assignment
from .matrix import GenerativeMatrixRouting as GenerativeMatrixRouting
from .vector import EfficientVectorRouting as EfficientVectorRouting
