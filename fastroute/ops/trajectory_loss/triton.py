"""The Triton backend of ``trajectory_loss`` as implementations of its compiled ops.

Triton is imported by the first call. Importing this module registers the implementations.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..registry import implement


@cache
def _kernels() -> Any:
    from ...kernels import trajectory_loss

    return trajectory_loss


def _in_triton(*args: Any) -> tuple[Tensor, Tensor]:
    return _kernels().forward(*args)


def _rewarded(losses: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels()
    of_rewards, rest = args[:7], args[7:]
    rewards = kernels.Rewards(*of_rewards, torch.empty_like(losses))
    loss, slopes = kernels.forward(losses, *rest, rewards)
    return loss, slopes, rewards.final


implement("_trajectory_loss_triton", _in_triton, anywhere=True)
implement("_trajectory_loss_rewarded_triton", _rewarded, anywhere=True)
