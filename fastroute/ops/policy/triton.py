"""The Triton backend of ``policy`` as implementations of its compiled ops.

Triton is imported by the first call. Importing this module registers the implementations.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from ..registry import implement


@cache
def _kernels() -> Any:
    from ...kernels import policy

    return policy


def _policy(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels().forward(*args)


def _policy_backward(*args: Any) -> Tensor:
    return _kernels().backward(*args)


implement("_policy_triton", _policy, anywhere=True)
implement("_policy_triton_backward", _policy_backward, anywhere=True)
