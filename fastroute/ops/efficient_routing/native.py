"""All iterations in one call of C++ a pass (csrc/cpu/efficient_routing): float32, float64, and bfloat16 in float32.

The ops are on the CPU's dispatch key: no Python is between a call and its kernels.
Axes: B batch, n input vectors, m output vectors, d width of an input vector, h width of an output vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..registry import library, register_fake
from .contract import Parameters
from .passes import first_form

NAMES = ("x", *Parameters._fields, "mask", "lengths")
_MAY_BE_NONE = ("bias_use", "bias_ign", "mask", "lengths")
INPUTS = ", ".join(f"Tensor{'?' * (name in _MAY_BE_NONE)} {name}" for name in NAMES) + ", int n_iters, bool normalize"
library.define(f"_efficient_routing_native({INPUTS}) -> (Tensor, Tensor)")
library.define(
    f"_efficient_routing_native_backward({INPUTS}, Tensor dout, Tensor kept, bool want_x, bool want_rows) -> Tensor[]"
)

#: Of these there are no gradients unless ``want_rows``: the passes over the input vectors make them.
ROWS = ("W_A", "B_A", "W_S", "B_S", "beta_use", "beta_ign", "bias_use", "bias_ign")


def _shapes(x: Tensor, w: Parameters, mask: Tensor | None, n_iters: int) -> list[tuple[int, ...]]:
    """Of the gates, each iteration's M, p and y, and in Gram form G and g: what the forward pass keeps."""
    (B, n, d), m, h = x.shape, w.W_F1.shape[0], w.W_F2.shape[1]
    has_gram = first_form(w, whole=True, masked=mask is not None, n=n) == "gram"
    gram = ((B, d, d), (B, d + 1)) if has_gram else ((0,), (0,))
    return [(B, n), (n_iters, B, m, d), (n_iters, B, m), (n_iters, B, m, h), *gram]


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    """x_out [B, m, h], and in one block what is kept."""
    x, *w, mask, _, n_iters, _ = args
    shapes = _shapes(x, Parameters(*w), mask, n_iters)
    return w[0].new_empty(shapes[3][1:]), w[0].new_empty(sum(map(math.prod, shapes)))


def _backward(*args: Any) -> list[Tensor]:
    """Gradients of x and the parameters but ``prior``, in their order; [0] of those that there are not."""
    x, *w = args[: len(NAMES) - 3]
    want_x, want_rows = args[-2:]
    made = [x.new_empty(x.shape if want_x else (0, *x.shape[1:]))]
    for name, t in zip(Parameters._fields, w, strict=False):
        is_wanted = want_rows or name not in ROWS
        made.append(w[0].new_empty((0,) if t is None else t.shape if is_wanted else (0, *t.shape[1:])))
    return made


register_fake("_efficient_routing_native", _forward)
register_fake("_efficient_routing_native_backward", _backward)


def parts(kept: Tensor, x: Tensor, w: Parameters, mask: Tensor | None, n_iters: int) -> list[Tensor]:
    """Views of what forward keeps."""
    shapes = _shapes(x, w, mask, n_iters)
    pieces = kept.split([math.prod(shape) for shape in shapes])
    return [t.view(shape) for t, shape in zip(pieces, shapes, strict=True)]


#: Beyond that many parameters of an output the library's products, which are made for wide matrices, are faster:
#: ``bench/calibrate_routing.py`` has the data.
WIDEST = 1 << 16
#: The same of betas linear in x, which are two more products as wide: docs/vector_routing.md has the data.
WIDEST_LINEAR = 1 << 15


#: So many numbers of parameters with a row per input vector may be copied to be widened.
WIDENED = 1 << 22


def takes(x: Tensor, w: Parameters) -> bool:
    """Whether these ops take a call, and are the fastest: by dtype, layout and the parameters' sizes alone."""
    dtype = x.dtype
    if w.W_F1.numel() > (WIDEST if w.bias_use is None else WIDEST_LINEAR):
        return False
    if dtype == torch.bfloat16:
        if w.W_A.numel() + 4 * w.W_S.numel() > WIDENED:
            return False
        return all(t.dtype in (torch.bfloat16, torch.float32) and t.is_contiguous() for t in w if t is not None)
    if dtype != torch.float32 and dtype != torch.float64:
        return False
    return all(t.dtype == dtype and t.is_contiguous() for t in w if t is not None)


def widened(args: Sequence[Any]) -> Sequence[Any]:
    """The ops' arguments with parameters beside a bfloat16 x in float32: of x, they widen a tile at a time."""
    if args[0].dtype != torch.bfloat16:
        return args
    last = 1 + len(Parameters._fields)
    return args[0], *(None if t is None else t.float() for t in args[1:last]), *args[last:]


def narrowed(out: Tensor, args: Sequence[Any]) -> Tensor:
    """x_out in the promoted dtype of x and the parameters, given what ``widened`` was given."""
    return out if args[0].dtype == out.dtype else out.to(torch.promote_types(args[0].dtype, args[4].dtype))
