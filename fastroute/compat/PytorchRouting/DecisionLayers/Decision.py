"""The base of what decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastroute import networks
from fastroute.networks import SampleMetaInformation, Trajectory

from .._upstream import Literal, Named


class Decision(Literal, Named, networks.Decision):
    """``fastroute.networks.Decision`` with upstream's formulas; an empty ``prior_actions`` means agent 0 for all."""

    def forward(  # type: ignore[override]
        self,
        xs: Tensor,
        mxs: Trajectory | Sequence[SampleMetaInformation],
        prior_actions: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        update_target: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Trajectory, Tensor]:
        """xs [B, ...], its trajectory, each sample's agent [B] and who is decided for [B] -> (ys, mxs, actions [B]).

        See ``fastroute.networks.Decision.forward``, which calls the first three batch, meta and agents.
        """
        if prior_actions is not None and len(prior_actions) == 0:
            prior_actions = torch.zeros(len(xs), dtype=torch.int64, device=xs.device)
        return super().forward(xs, mxs, prior_actions, mask, update_target, **kwargs)
