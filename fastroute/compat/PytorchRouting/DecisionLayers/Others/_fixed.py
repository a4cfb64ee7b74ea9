"""What the decisions that learn nothing have of upstream's attributes."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..._upstream import Named
from ...RewardFunctions.PerAction.PerActionBaseReward import PerActionBaseReward


class Fixed(Named):
    """First base of a decision without policies: it keeps the arguments of ``Decision`` and looks at none of them."""

    def __init__(
        self,
        num_selections: Any = None,
        in_features: Any = None,
        num_agents: Any = 1,
        exploration: Any = 0.1,
        policy_storage_type: Any = "approx",
        detach: Any = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._num_selections, self._in_features, self._num_agents = num_selections, in_features, num_agents
        self._exploration, self._pol_type, self._detach = exploration, policy_storage_type, detach
        self._policy = nn.ModuleList()
        self.additional_reward_func = kwargs.get("additional_reward_func") or PerActionBaseReward()
