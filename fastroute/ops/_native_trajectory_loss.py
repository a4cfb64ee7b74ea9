"""``trajectory_loss``'s ``native`` and ``triton`` backends: the schemas and fakes of csrc/cpu and kernels/ for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.trajectory_loss import sums
from ._registry import define, library, register_fake

#: f [B], then what ``reference.trajectory_loss.laid_out`` makes -> (loss [B], slopes [C, B])
SCHEMA = (
    "(Tensor f, Tensor[] columns, Tensor[] others, Tensor[] masks, int[] layout, float gamma, bool normalize, "
    "bool want_slopes) -> (Tensor, Tensor)"
)


def _fake(
    f: Tensor, columns: Sequence[Tensor], others: Sequence[Tensor], masks: Sequence[Tensor], layout: Sequence[int],
    gamma: float, normalize: bool, want_slopes: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, dtype = f.shape[0], sums(f, *columns, *others)
    return f.new_empty(B, dtype=dtype), f.new_empty(len(columns) if want_slopes else 0, B, dtype=dtype)


def _in_triton(
    f: Tensor, columns: Sequence[Tensor], others: Sequence[Tensor], masks: Sequence[Tensor], layout: Sequence[int],
    gamma: float, normalize: bool, want_slopes: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from ..kernels import trajectory_loss as kernels

    made: tuple[Tensor, Tensor] = kernels.forward(f, columns, others, masks, layout, gamma, normalize, want_slopes)
    return made


define("_trajectory_loss_triton", SCHEMA, _in_triton, _fake)


def _rewarded(
    losses: Tensor, scale: float, scores: Tensor | None, truth: Tensor | None, table: Tensor | None,
    actions: Tensor | None, places: Sequence[int], ratio: float | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from ..kernels import trajectory_loss as kernels

    rewards = kernels.Rewards(scale, scores, truth, table, actions, places, ratio, torch.empty_like(losses))
    loss, slopes = kernels.forward(losses, *rest, rewards)
    return loss, slopes, rewards.final


def _fake_rewarded(losses: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake(losses, *args[7:]), torch.empty_like(losses)


#: as ``SCHEMA``, of losses instead of f, and with what rewards are made of, see ``kernels.Rewards`` -> (.., .., f [B])
define(
    "_trajectory_loss_rewarded_triton",
    SCHEMA.replace(
        "Tensor f",
        "Tensor losses, float scale, Tensor? scores, Tensor? truth, Tensor? table, Tensor? actions, int[] places, "
        "float? ratio",
    ).replace("-> (Tensor, Tensor)", "-> (Tensor, Tensor, Tensor)"),
    _rewarded,
    _fake_rewarded,
)

library.define("_trajectory_loss_native" + SCHEMA)
library.define("_trajectory_loss_native_backward(Tensor grad, Tensor slopes) -> Tensor[]")


def _fake_backward(grad: Tensor, slopes: Tensor) -> list[Tensor]:
    return [torch.empty_like(slope) for slope in slopes.unbind()]


register_fake("_trajectory_loss_native", _fake)
register_fake("_trajectory_loss_native_backward", _fake_backward)
