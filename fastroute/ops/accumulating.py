"""Modules whose buffers are made of many small parts: sums, means, an optimizer's moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def materialized(module: nn.Module, state_dict: Any, local_metadata: Any) -> bool:
    """Before a load with ``assign=True``: memory for buffers on meta that no checkpoint has. Whether there are any."""
    if not local_metadata.get("assign_to_params_buffers"):
        return False
    given = next((t for t in state_dict.values() if isinstance(t, Tensor)), None)
    device = torch.get_default_device() if given is None else given.device
    buffers = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
    bare = {name: t for name, t in buffers.items() if t is not None and t.is_meta}
    for name, t in bare.items():
        module._buffers[name] = torch.empty_like(t, device=device)
    return bool(bare)


class Accumulating(nn.Module):
    """Its buffers follow it to a device. A cast makes none of them coarser: ``.to(torch.bfloat16)`` leaves float32."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if materialized(self, state_dict, local_metadata):
            self._set_unsaved()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _set_unsaved(self) -> None:
        """Set the buffers that are not saved; the others are about to be loaded."""
        self.reset_parameters()  # type: ignore[operator]

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
