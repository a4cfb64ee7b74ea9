"""Modules whose buffers are made of many small parts: sums, means, an optimizer's moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Accumulating(nn.Module):
    """Its buffers follow it to a device. A cast makes none of them coarser: ``.to(torch.bfloat16)`` leaves float32."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or new.dtype == torch.promote_types(old.dtype, new.dtype):
                continue
            if not (old.dtype == torch.float64 and new.device.type == "mps"):  # which has no float64
                self._buffers[name] = old.to(new.device)
        return self
