"""Starting Triton kernels: the one place that turns a call into a launch, so that tests can record launches instead."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Multiprocessors assumed where no GPU can be asked (an H200 has 132).
SMS = 132

TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU: a property that torch keeps, asking for it does not synchronise."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else SMS


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **constants: Any) -> None:
    """Run ``kernel`` over ``grid`` on the current device."""
    kernel[grid](*args, num_warps=warps, num_stages=stages, **constants)



def power_of_2(value: int, at_least: int = 16) -> int:
    """The next power of two, at least what a tensor-core product needs."""
    return max(at_least, triton.next_power_of_2(value))


cdiv = triton.cdiv
