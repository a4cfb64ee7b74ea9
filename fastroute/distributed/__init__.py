"""Every family on ``torch.distributed``: parallel styles, checkpoints, agreement of ranks."""

from .agreement import agree
from .capsules import RowShardedCapsules
from .checkpoints import Checkpoints, full_state_dict, load_full_state_dict

__all__ = ["Checkpoints", "RowShardedCapsules", "agree", "full_state_dict", "load_full_state_dict"]
