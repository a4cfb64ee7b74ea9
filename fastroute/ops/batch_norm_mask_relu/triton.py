"""The Triton backend of ``batch_norm_mask_relu`` as implementations of its compiled ops.

Triton is imported by the first call. Importing this module registers the implementations.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from ..backends import Case
from ..registry import implement


@cache
def _kernels() -> Any:
    from ...kernels import batch_norm_mask_relu

    return batch_norm_mask_relu


def refuses(case: Case) -> str | None:
    """Why the kernels would not take a case."""
    return _kernels().unsupported(case.device, case.dtype)


def _batch_norm(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels().forward(*args)


def _batch_norm_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels().backward(*args)


implement("_batch_norm_mask_relu_triton", _batch_norm, anywhere=True)
implement("_batch_norm_mask_relu_triton_backward", _batch_norm_backward, anywhere=True)
