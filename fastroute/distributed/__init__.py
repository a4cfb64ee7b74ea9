"""Every family on ``torch.distributed``: parallel styles, checkpoints, agreement of ranks."""

from .agreement import agree
from .dispatchers import AllToAll, Dispatcher, Local, Place
from .experts import ExpertParallel, expert_parameters, whole_state_dict

__all__ = [
    "AllToAll",
    "Dispatcher",
    "ExpertParallel",
    "Local",
    "Place",
    "agree",
    "expert_parameters",
    "whole_state_dict",
]
