"""Matrix products of what is per output, by the faster of torch's two libraries, as in ``csrc/common/gemm.h``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .backends import extension
from .registry import library

library.define("_prefers_onednn() -> bool")


@cache
def prefers_onednn() -> bool:
    """MKL, which torch's matmul uses for float32 on x86, runs at half of oneDNN's speed on AMD's AVX-512 processors."""
    return extension()[0] is not None and bool(torch.ops.fastroute._prefers_onednn())


def _onednn_takes(a: Tensor, b: Tensor, multiplications: int) -> bool:
    return (
        2 * multiplications > 1 << 22
        and a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and prefers_onednn()
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [..., k] times b [k, m]."""
    if not _onednn_takes(a, b, a.numel() * b.shape[-1]):
        return a @ b
    # oneDNN adds the terms of a sum one by one; in runs of 256, added up afterwards, it is as accurate as MKL.
    # By a matrix with gaps between its rows it multiplies a hundred times slower.
    made: Tensor | None = None
    for a_part, b_part in zip(a.split(256, -1), b.split(256, -2), strict=True):
        part = torch.ops.mkldnn._linear_pointwise(a_part, b_part.contiguous().mT, None, "none", [], "")
        made = part if made is None else made.add_(part)
    assert made is not None
    return made


def products(a: Tensor, b: Tensor) -> Tensor:
    """a [B, r, k] times b [B, k, m], sample by sample."""
    if _onednn_takes(a, b, a[:1].numel() * b.shape[-1]):
        return torch.stack([product(x, y) for x, y in zip(a, b, strict=True)])
    return torch.bmm(a, b)
