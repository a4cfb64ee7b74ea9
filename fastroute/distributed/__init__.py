"""Every family on ``torch.distributed``: parallel styles, checkpoints, agreement of ranks."""

from .agreement import agree
from .capsules import RowShardedCapsules

__all__ = ["RowShardedCapsules", "agree"]
