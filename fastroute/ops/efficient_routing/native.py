"""All iterations in one call of C++ a pass (csrc/cpu/efficient_routing): inputs without mask and lengths, in one dtype.

The ops are on the CPU's dispatch key: no Python is between a call and its kernels.
Axes: B batch, n input vectors, m output vectors, d width of an input vector, h width of an output vector.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..registry import library, register_fake
from .contract import Parameters

NAMES = ("x", *(name for name in Parameters._fields if not name.startswith("bias_")))
_INPUTS = f"{', '.join(f'Tensor {name}' for name in NAMES)}, int n_iters, bool normalize"
library.define(f"_efficient_routing_native({_INPUTS}) -> (Tensor, Tensor)")
library.define(
    f"_efficient_routing_native_backward({_INPUTS}, Tensor dout, Tensor kept, bool want_x, bool want_rows) -> Tensor[]"
)

#: Of these gradients there are none unless ``want_rows``: their parameters have a row per input vector.
ROWS = ("W_A", "B_A", "W_S", "B_S", "beta_use", "beta_ign")


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    """x_out [B, m, h]; and in one block the gates [B, n] and each iteration's M [m, d], p [m] and y [m, h] of B."""
    x, w, n_iters = args[0], dict(zip(NAMES, args, strict=False)), args[-2]
    (B, n, d), m, h = x.shape, w["W_F1"].shape[0], w["W_F2"].shape[1]
    return x.new_empty(B, m, h), x.new_empty(B * n + n_iters * B * m * (d + 1 + h))


def _backward(*args: Any) -> list[Tensor]:
    """Gradients of x and the parameters but ``prior``, in their order."""
    want_x, want_rows = args[-2:]
    unwanted = {name for name, wanted in (("x", want_x), *((k, want_rows) for k in ROWS)) if not wanted}
    given = zip(NAMES[:-1], args, strict=False)
    return [t.new_empty((0, *t.shape[1:]) if k in unwanted else t.shape) for k, t in given]


register_fake("_efficient_routing_native", _forward)
register_fake("_efficient_routing_native_backward", _backward)


def parts(kept: Tensor, x: Tensor, w: Parameters, n_iters: int) -> list[Tensor]:
    """Views of what forward keeps: gates [B, n], M [T, B, m, d], p [T, B, m] and y [T, B, m, h]."""
    (B, n, d), m, h = x.shape, w.W_F1.shape[0], w.W_F2.shape[1]
    shapes = (B, n), (n_iters, B, m, d), (n_iters, B, m), (n_iters, B, m, h)
    pieces = kept.split([math.prod(shape) for shape in shapes])
    return [t.view(shape) for t, shape in zip(pieces, shapes, strict=True)]


#: Beyond that many parameters of an output the library's products, which are made for wide matrices, are faster:
#: ``bench/calibrate_routing.py`` has the data.
WIDEST = 1 << 16


def takes(x: Tensor, w: Parameters) -> bool:
    """Whether these ops take a call without mask and lengths, and are the fastest: by dtype, layout and m d alone."""
    dtype = x.dtype
    if (dtype != torch.float32 and dtype != torch.float64) or w.bias_use is not None or w.W_F1.numel() > WIDEST:
        return False
    return all(t.dtype == dtype and t.is_contiguous() for t in w if t is not None)
