"""``trajectory_loss`` for the dispatcher, on each compiled backend: schemas and fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import sums
from ..registry import define_compiled, library, register_fake

#: f [B], then what ``op.laid_out`` makes -> (loss [B], slopes [C, B])
SCHEMA = (
    "(Tensor f, Tensor[]? columns, Tensor[]? others, Tensor[]? masks, int[] layout, float gamma, bool normalize, "
    "bool want_slopes) -> (Tensor, Tensor)"
)


def _fake(f: Tensor, columns: Sequence[Tensor], others: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    *_, want_slopes = args
    B, dtype = f.shape[0], sums(f, *columns, *others)
    return f.new_empty(B, dtype=dtype), f.new_empty(len(columns) if want_slopes else 0, B, dtype=dtype)


def _fake_rewarded(losses: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake(losses, *args[7:]), torch.empty_like(losses)


#: as ``SCHEMA``, of losses instead of f, and with what rewards are made of, see ``kernels.Rewards`` -> (.., .., f [B])
_REWARDED = SCHEMA.replace(
    "Tensor f",
    "Tensor losses, float scale, Tensor? scores, Tensor? truth, Tensor? table, Tensor? actions, int[] places, "
    "float? ratio",
).replace("-> (Tensor, Tensor)", "-> (Tensor, Tensor, Tensor)")
library.define("_trajectory_loss_rewarded_triton" + _REWARDED, tags=(torch.Tag.needs_fixed_stride_order,))
register_fake("_trajectory_loss_rewarded_triton", _fake_rewarded)
define_compiled("_trajectory_loss_{}", SCHEMA, _fake, tags=(torch.Tag.needs_fixed_stride_order,))
library.define("_trajectory_loss_native_backward(Tensor grad, Tensor slopes) -> Tensor[]")


def _fake_backward(grad: Tensor, slopes: Tensor) -> list[Tensor]:
    return [torch.empty_like(slope) for slope in slopes.unbind()]


register_fake("_trajectory_loss_native_backward", _fake_backward)
