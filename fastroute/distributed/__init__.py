"""Every family on ``torch.distributed``: parallel styles, checkpoints, agreement of ranks."""

from .agreement import agree
from .capsules import RowShardedCapsules
from .checkpoints import Checkpoints, full_state_dict, load_full_state_dict
from .data_parallel import ddp, prepare, shard
from .dispatchers import AllToAll, Dispatcher, Local, Place
from .experts import ExpertParallel, expert_parameters, whole_state_dict

__all__ = [
    "AllToAll",
    "Checkpoints",
    "Dispatcher",
    "ExpertParallel",
    "Local",
    "Place",
    "RowShardedCapsules",
    "agree",
    "ddp",
    "expert_parameters",
    "full_state_dict",
    "load_full_state_dict",
    "prepare",
    "shard",
    "whole_state_dict",
]
