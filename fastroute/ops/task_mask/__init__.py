"""``task_mask``: a binary mask of channels for every task."""

from .op import task_mask as task_mask
