"""The Triton backend of ``trajectory_loss`` as implementations of its compiled ops.

Triton is imported by the first call. Importing this module registers the implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..registry import implement


@cache
def _kernels() -> Any:
    from ...kernels import trajectory_loss

    return trajectory_loss


def _in_triton(
    f: Tensor, columns: Sequence[Tensor], others: Sequence[Tensor], masks: Sequence[Tensor], layout: Sequence[int],
    gamma: float, normalize: bool, want_slopes: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _kernels().forward(f, columns, others, masks, layout, gamma, normalize, want_slopes)


def _rewarded(
    losses: Tensor, scale: float, scores: Tensor | None, truth: Tensor | None, table: Tensor | None,
    actions: Tensor | None, places: Sequence[int], ratio: float | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernels = _kernels()
    rewards = kernels.Rewards(scale, scores, truth, table, actions, places, ratio, torch.empty_like(losses))
    loss, slopes = kernels.forward(losses, *rest, rewards)
    return loss, slopes, rewards.final


implement("_trajectory_loss_triton", _in_triton, anywhere=True)
implement("_trajectory_loss_rewarded_triton", _rewarded, anywhere=True)
