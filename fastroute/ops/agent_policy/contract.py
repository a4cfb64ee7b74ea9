"""What passes between ``agent_policy`` and its backends. Axes: N rows, K choices, C outputs of a critic: K, or 1."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AgentChoice(NamedTuple):
    """What every row's agent chose, and what it is worth."""

    actions: Tensor  #: [N] int64
    value: Tensor  #: [N], log-probability of the action, or its score; zero where a forced action is negative
    greedy: Tensor  #: [N] int64, the best choice
    scores: Tensor  #: [N, K]
    critic: Tensor | None = None  #: [N, C]
    critic_at: Tensor | None = None  #: [N], the critic at the action, or its only output
    expected: Tensor | None = None  #: [N], without gradient: sum_k p_k critic_k
