"""Decisions that learn nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import dispatch
from ...ops.checks import samples
from ..sample_view import SampleMetaInformation
from ..trajectory import Trajectory
from .base import Triplet, as_mask


class _Fixed(nn.Module):
    """Takes whatever constructor arguments other decisions take, and looks at none of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def set_exploration(self, exploration: float) -> None:
        """Nothing to set."""

    def _actions(self, batch: Tensor, meta: Trajectory) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} decides nothing: it defines no _actions")

    def forward(
        self,
        batch: Tensor,
        meta: Trajectory | Sequence[SampleMetaInformation],
        agents: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        update_target: Tensor | None = None,
        *,
        forced_actions: Tensor | None = None,
        prior_actions: Tensor | Sequence[int] | None = None,
    ) -> Triplet:
        """(batch, meta, actions [B] int64); 0 where ``mask`` is False; nothing is recorded, so there is no loss."""
        B = samples("batch", batch)
        meta = Trajectory.of(meta, B)
        if forced_actions is not None:
            actions = dispatch.as_actions(forced_actions, B, batch.device, "forced_actions").clone()
        else:
            actions = self._actions(batch, meta)
        active = as_mask(mask, B, batch.device)
        return batch, meta, actions if active is None else torch.where(active, actions, 0)


class PerTaskAssignment(_Fixed):
    """The task label as the action: a module per task, or the agents for a dispatched decision.

    Takes the arguments of any decision, and looks at none of them.

    Examples:
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8), tasks=torch.tensor([0, 1, 1, 0]))
        >>> h, meta, agents = fastroute.PerTaskAssignment()(h, meta, agents)
        >>> agents
        tensor([0, 1, 1, 0])
    """

    def _actions(self, batch: Tensor, meta: Trajectory) -> Tensor:
        return meta.task_indices(batch.device).clone()


class PassThrough(_Fixed):
    """Action 0 for every sample.

    Takes the arguments of any decision, and looks at none of them.

    Examples:
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = fastroute.PassThrough()(h, meta, agents)
        >>> actions
        tensor([0, 0, 0, 0])
    """

    def _actions(self, batch: Tensor, meta: Trajectory) -> Tensor:
        return torch.zeros(batch.shape[0], dtype=torch.int64, device=batch.device)
