"""Modules and their names without what was put around them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

#: Children of what torch.compile, activation checkpointing and the older FSDP put around a module.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrapped(model: nn.Module, name: str) -> str:
    """A module's, parameter's or buffer's name in the model that was wrapped, for devices or processes too."""
    parts, inside = [], model
    for part in name.split(".") if name else ():
        if part not in _WRAPPERS and not isinstance(inside, (DistributedDataParallel, nn.DataParallel)):
            parts.append(part)
        inside = getattr(inside, part, inside)
    return ".".join(parts)


def inside(m: nn.Module) -> nn.Module:
    """The module that others were put around, which call it with what they are called with."""
    while True:
        if isinstance(m, (DistributedDataParallel, nn.DataParallel)):
            inner: nn.Module | None = m.module
        else:
            inner = next((m._modules[name] for name in _WRAPPERS if name in m._modules), None)
        if inner is None:
            return m
        m = inner
