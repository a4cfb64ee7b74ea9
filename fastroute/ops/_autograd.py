"""Calls of autograd functions."""

from __future__ import annotations

from typing import Any

import torch


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, without its search for torch.func's leftovers where torch.func is not at work.

    It looks at every argument in Python, and there may be a parameter of every module among them.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
