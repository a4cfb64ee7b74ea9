"""The Triton backend of ``trajectory_loss`` as implementations of its compiled ops.

Importing this module registers the implementations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Kernels, implement

_kernels = Kernels("trajectory_loss")


def _rewarded(losses: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_rewards, rest = args[:7], args[7:]
    rewards = _kernels.Rewards(*of_rewards, torch.empty_like(losses))
    loss, slopes = _kernels.forward(losses, *rest, rewards)
    return loss, slopes, rewards.final


implement("_trajectory_loss_triton", _kernels.forward, anywhere=True)
implement("_trajectory_loss_rewarded_triton", _rewarded, anywhere=True)
