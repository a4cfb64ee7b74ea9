"""Policy gradients: REINFORCE (Williams 1992), with baselines, and off-policy with epsilon-greedy exploration.

Notation of the losses, per entry: p the policy, a the action taken, R the discounted sum of rewards from the entry on,
r its own reward, sg(.) no gradient, ' the sample's next decision, K choices. See ``loss_entries.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.agent_policy.op import AgentChoice
from ...ops.arguments import checked
from ...ops.dispatch.contract import Plan
from ...ops.policy.op import values
from ...ops.trajectory_loss.op import Entry
from ..decision_record import Column, Record
from ..loss_entries import Entries
from .base import Decided, Decision

__all__ = ["REINFORCE", "EGreedyREINFORCE", "REINFORCEBl1", "REINFORCEBl2"]


def log_softmax_column(made: AgentChoice, temperature: float) -> Column:
    """log p, whose full [B, K] is only made when looked at."""
    return Column(lambda: values(made.scores, "softmax", temperature), made.value, made.actions)


def critic_column(made: AgentChoice) -> Column:
    """What the critic says to all choices, and to the one that was taken."""
    return Column(made.critic, made.critic_at, made.actions)  # type: ignore[arg-type]


class REINFORCE(Decision):
    """REINFORCE: a ~ softmax(z / temperature), in eval the most likely one.

    Loss: -log p_a sg(R). State: [log p].

    ``set_exploration(e)`` sets temperature = 0.1 + 9.9 e if ``set_pg_temp``, and else does nothing.

    The arguments are :class:`Decision`'s.

    Examples:
        >>> decide = fastroute.REINFORCE(3, 8, approx_hidden_dims=(16,))  # one of 3 modules, by a network 8-16-3
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    algorithm = "REINFORCE"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._temperature = 1.0

    def set_exploration(self, exploration: float) -> None:
        """Set the temperature to 0.1 + 9.9 exploration, if the decision was made with ``set_pg_temp``."""
        self._exploration = self._check_exploration(exploration)
        if self._set_pg_temp:
            self._temperature = 0.1 + 9.9 * self._exploration

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        made, explored = self._answer(x, plan, forced, temperature=self._temperature)
        return Decided(made.actions, [log_softmax_column(made, self._temperature)], explored)


class _WithValueNet(Decision):
    """Decisions with a second network, ``_value_mem``."""

    _value_outputs: int | None = 1  #: None: K

    @checked
    def __init__(self, *args: Any, value_net: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._value_mem = self._storages(self._value_outputs or self._num_selections, value_net)

    def entry(self, e: Entries) -> Entry:
        made = super().entry(e)  # one value for all choices, which upstream reads at the first
        return made if self._value_outputs is None else made._replace(s1=e.full(self.critic)[:, 0])  # type: ignore[arg-type]


class REINFORCEBl1(_WithValueNet):
    """REINFORCE with a learned baseline; a ~ softmax(z).

    Loss: -log p_a sg(R - b) + (V_a - sg(y))^2, V a network with K outputs. State: [log p, V].
    Intended: b = sum_k p_k V_k, the expected value, and y = r + gamma max_k V'_k, at the last step y = r.
    Upstream: b = V_0, whatever the action; y = max_k V'_k - r, at the last step the final reward.

    Args:
        value_net: V instead of the default, [B, ...] -> [B, K]; the other arguments are :class:`Decision`'s.

    Examples:
        >>> decide = fastroute.REINFORCEBl1(3, 8, value_net=nn.Linear(8, 3))
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    _value_outputs = None
    needs = upstream_needs = (("max", 1),)
    algorithm, critic = "REINFORCEBl1", 1

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        made, explored = self._answer(x, plan, forced, self._value_mem)
        return Decided(made.actions, [log_softmax_column(made, 1.0), critic_column(made)], explored)

    def auxiliary(self, record: Record) -> Tensor:
        """[B]: the baseline, sum_k p_k V_k (upstream: V_0)."""
        if self.formula == "upstream":
            return record.columns[1].reduced("first")
        log_p, v = (record.columns[i].full.detach() for i in (0, 1))
        return (log_p.exp() * v).sum(1)


class REINFORCEBl2(REINFORCEBl1):
    """:class:`REINFORCEBl1` with the return weighted by how unlikely the action was, R / (K p_a), in the advantage.

    The arguments are :class:`REINFORCEBl1`'s.

    Examples:
        >>> decide = fastroute.REINFORCEBl2(3, 8)
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    algorithm = "REINFORCEBl2"


def behaviour(log_p: Tensor, exploration: float, upstream: bool) -> Tensor:
    """mu [B, K]: how likely each action was, when a coin chose between a draw from p and the greedy action."""
    log_p = log_p.detach()
    p, top = log_p.exp(), log_p.max(1, keepdim=True)
    greedy = torch.zeros_like(p).scatter(1, top.indices, 1.0)
    if not upstream:
        return exploration * p + (1 - exploration) * greedy
    others = p / (1 - top.values) * (exploration / max(p.shape[1] - 1, 1))
    return torch.where(greedy > 0, 1 - exploration, others)


def egreedy_columns(decision: Any, made: AgentChoice) -> list[Column]:
    """[log p, p, mu]; in eval mu is p."""
    log_p = log_softmax_column(made, decision._temperature)
    p = Column(lambda: log_p.full.exp())
    if not decision.training:
        return [log_p, p, p]
    exploration, upstream = decision._exploration, decision.formula == "upstream"
    return [log_p, p, Column(lambda: behaviour(log_p.full, exploration, upstream))]


def importance(record: Record) -> Tensor:
    """w = p_a / mu_a [B], without gradient, of what :func:`egreedy_columns` recorded."""
    _, p, mu, *_ = record.columns
    return (p.at(record.actions) / mu.at(record.actions)).detach()


class EGreedyREINFORCE(REINFORCE):
    """REINFORCE with epsilon-greedy exploration, corrected by importance weights; in eval the greedy action.

    In training an action is drawn from p with probability ``exploration`` and is greedy otherwise.
    Loss: -log p_a sg(w R), w = p_a / mu_a. State: [log p, p, mu].
    Intended: mu = exploration p + (1 - exploration) onehot(greedy).
    Upstream: mu_k = p_k / (1 - log p_max) exploration / (K - 1) for others than the greedy action, whose mu is
    1 - exploration; and w_i multiplies the sum of all entries' -log p_a R, not entry i's. Its ``set_exploration(e)``
    takes min(1, 3 e), the intended one e.

    The arguments are :class:`Decision`'s.

    Examples:
        >>> decide = fastroute.EGreedyREINFORCE(3, 8, exploration=0.2)  # draws for a fifth of the samples
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    algorithm = "EGreedyREINFORCE"

    def set_exploration(self, exploration: float) -> None:
        """Explore so often, 0 to 1 (upstream: three times as often)."""
        value = self._check_exploration(exploration)
        self._exploration = min(1.0, 3 * value) if self.formula == "upstream" else value

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        made, explored = self._answer(x, plan, forced, temperature=self._temperature, with_coin=True)
        return Decided(made.actions, egreedy_columns(self, made), explored)

    def auxiliary(self, record: Record) -> Tensor:
        """[B]: the importance weight, w."""
        return importance(record)

    def loss(self, e: Entries) -> Tensor | None:
        if self.formula == "intended":
            return super().loss(e)
        return e.auxiliary(self) * e.sum(-e.at(0) * e.R)
