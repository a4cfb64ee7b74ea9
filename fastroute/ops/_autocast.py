"""What torch.autocast asks for.

torch.amp.is_autocast_available would be the question, but Dynamo of torch 2.11 cannot trace it. Of the devices on which
torch by itself makes tensors, "meta" alone has no autocast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives products on this device; None where it is off or does not exist."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """Where autocast changes no dtype on this device. Where it is off anyway, exported graphs have no trace of it."""
    is_off = device_type == "meta" or not torch.is_autocast_enabled(device_type)
    return nullcontext() if is_off else torch.autocast(device_type, enabled=False)
