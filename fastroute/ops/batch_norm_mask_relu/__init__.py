"""``batch_norm_mask_relu``: batch norm, a task's mask and ReLU."""

from .op import batch_norm_mask_relu as batch_norm_mask_relu
