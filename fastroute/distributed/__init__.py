"""Every family on ``torch.distributed``: parallel styles, checkpoints, agreement of ranks."""

from .agreement import agree
from .data_parallel import ddp, prepare, shard
from .dispatchers import AllToAll, Dispatcher, Local, Place
from .experts import ExpertParallel, expert_parameters, whole_state_dict

__all__ = [
    "AllToAll",
    "Dispatcher",
    "ExpertParallel",
    "Local",
    "Place",
    "agree",
    "ddp",
    "expert_parameters",
    "prepare",
    "shard",
    "whole_state_dict",
]
