"""What torch.autocast asks for, and the precision of matrix products.

torch.amp.is_autocast_available would be the question, but Dynamo of torch 2.11 cannot trace it. Of the devices on which
torch by itself makes tensors, "meta" alone has no autocast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives products on this device; None where it is off or does not exist."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """Where autocast changes no dtype on this device. Where it is off anyway, exported graphs have no trace of it."""
    is_off = device_type == "meta" or not torch.is_autocast_enabled(device_type)
    return nullcontext() if is_off else torch.autocast(device_type, enabled=False)


def precision_of(x: Tensor, autocast: str) -> str:
    """The precision of the products: autocast's, or else torch's setting for float32 matrix products."""
    if autocast:
        return autocast
    if x.dtype != torch.float32:
        return "ieee"
    # not allow_tf32, which raises where somebody has used the newer setting
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = getattr(torch.backends, "fp32_precision", "none")
    return "tf32" if setting == "tf32" else "ieee"


def autocast_precision(device_type: str) -> str:
    """What torch.autocast asks for on this device, "bf16" or "fp16"; outside it, ""."""
    dtype = autocast_dtype(device_type)
    return "" if dtype is None else "fp16" if dtype == torch.float16 else "bf16"
