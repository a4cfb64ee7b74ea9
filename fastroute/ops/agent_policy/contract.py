"""What passes between ``agent_policy`` and its backends. Axes: N rows, K choices, C outputs of a critic: K, or 1."""

from __future__ import annotations

from collections.abc import Sequence
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


class BackwardCall(NamedTuple):
    """The arguments of a compiled backward pass, in the order of its schema. A gradient that does not come is None."""

    grad_value: Tensor | None
    grad_scores: Tensor | None
    grad_critic: Tensor | None
    grad_critic_at: Tensor | None
    scores: Tensor
    actions: Tensor
    x: Tensor | None
    order: Tensor | None
    offsets: Tensor | None
    weights: Sequence[Tensor]
    critic_weights: Sequence[Tensor]
    agents: int
    critic_width: int
    kind: int
    temperature: float
    want_x: bool
    want_weights: bool
    want_biases: bool
    want_critic_weights: bool
    want_critic_biases: bool
    stacked: bool
    critic_stacked: bool
    keep_empty: bool
