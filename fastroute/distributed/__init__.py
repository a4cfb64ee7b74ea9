"""Every family on ``torch.distributed``: parallel styles, checkpoints, agreement of ranks."""

from .agreement import agree

__all__ = ["agree"]
