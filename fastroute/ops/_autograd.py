"""Calls of autograd functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, without its search for torch.func's leftovers where torch.func is not at work.

    It looks at every argument in Python, and there may be a parameter of every module among them.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def own(output: Tensor) -> Tensor:
    """What a function's ``forward`` returns: a tensor that is none of its intermediate results.

    Dynamo of torch 2.11 makes all of them outputs of the function, and an output's gradient is lost, silently, where
    one is the same tensor: after an operation in place, or a cast to the dtype that it has.
    """
    return output.clone() if _LOSES_GRADIENTS and torch.compiler.is_compiling() else output


_LOSES_GRADIENTS = torch.__version__ < "2.12"  # a TorchVersion: it compares numbers
