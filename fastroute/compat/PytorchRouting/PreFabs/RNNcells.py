"""Cells with routed projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastroute import networks
from fastroute.networks import SampleMetaInformation, Trajectory
from fastroute.ops.arguments import renamed

from .._samples import Samples
from .._upstream import Literal
from ..DecisionLayers.Decision import Decision


class RoutingRNNCellBase(Literal, networks.RoutingRNNCellBase):
    """``fastroute.networks.RoutingRNNCellBase`` with upstream's names in ``forward``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for m in self.modules():
            if isinstance(m, Decision):
                m._fastroute_idles = True  # where all samples have stopped there is nothing to decide

    @renamed(meta="metas", agents="task_actions")
    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        hidden: Any = None,
        metas: Trajectory | Sequence[SampleMetaInformation] | None = None,
        task_actions: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Samples]:
        """x [B, in_features] and the state -> (the new state, metas)."""
        state, metas = super().forward(x, hidden, metas, task_actions, mask, **kwargs)
        return state, Samples.of(metas)


class RoutingLSTMCell(RoutingRNNCellBase, networks.RoutingLSTMCell):  # type: ignore[misc]
    """``fastroute.networks.RoutingLSTMCell`` in which action 0 stops with a row of zeros."""


class RoutingGRUCell(RoutingRNNCellBase, networks.RoutingGRUCell):  # type: ignore[misc]
    """``fastroute.networks.RoutingGRUCell``; upstream's raises NotImplementedError."""
