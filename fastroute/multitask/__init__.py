"""Multi-task models from a list of dicts, and layers that divide a network among tasks."""

from .cross_stitch import CrossStitch
from .expert_bank import Experts
from .experts import CGC, PLE, MMoE

__all__ = ["CGC", "PLE", "CrossStitch", "Experts", "MMoE"]
