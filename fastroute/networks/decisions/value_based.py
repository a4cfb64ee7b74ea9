"""Action values learned by temporal differences: Q-learning (Watkins 1989), SARSA, and advantages.

Exploration is epsilon-greedy with uniform draws; in eval the best action is taken. Notation as in ``policy_gradient``.
"""

from __future__ import annotations

from torch import Tensor

from ...ops.dispatch.contract import Plan
from ..decision_record import Column
from ..loss_entries import Entries
from .base import Decided, Decision
from .policy_gradient import _WithValueNet, critic_column

__all__ = ["SARSA", "AdvantageLearning", "BootstrapAdvantageLearning", "QLearning", "SurpriseLearning"]


class QLearning(Decision):
    """Q-learning. Loss: (q_a - sg(y))^2. State: [q].

    Intended: y = r + gamma max_k q'_k, at the last step y = r (which there includes the final reward).
    Upstream: y = max_k q'_k - r, and the final reward alone at the last step, or where K changes after it.

    The arguments are :class:`Decision`'s.

    Examples:
        >>> decide = fastroute.QLearning(3, 8, exploration=0.1)
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    needs = upstream_needs = (("max", 0),)
    algorithm = "QLearning"

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        made, explored = self._answer(x, plan, forced, kind="score", with_coin=True)
        return Decided(made.actions, [Column(made.scores, made.value, made.actions)], explored)


class SARSA(QLearning):
    """SARSA: :class:`QLearning` with the value of the action taken next.

    Intended: y = r + gamma q'_{a'}. Upstream: y = q_{a'}, of the current state, without r.

    The arguments are :class:`Decision`'s.

    Examples:
        >>> decide = fastroute.SARSA(3, 8, exploration=0.1)
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    needs = (("at", 0),)
    upstream_needs = (("action", 0),)
    algorithm = "SARSA"

    def target(self, e: Entries) -> Tensor:
        def ahead() -> Tensor:
            q = e.full(0).detach()
            return q.gather(1, e.next("action", 0).clamp(max=q.shape[1] - 1)[:, None])[:, 0]

        return e.upstream_target(ahead) if self.formula == "upstream" else super().target(e)


class AdvantageLearning(_WithValueNet):
    """Advantages and a state value. Loss: (V - R)^2 + (A_a - sg(R - V))^2. State: [A, V].

    Args:
        value_net: V instead of the default, [B, ...] -> [B, 1]; the other arguments are :class:`Decision`'s.

    Examples:
        >>> decide = fastroute.AdvantageLearning(3, 8, value_net=nn.Linear(8, 1))
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    algorithm, critic = "AdvantageLearning", 1

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        made, explored = self._answer(x, plan, forced, self._value_mem, kind="score", with_coin=True)
        return Decided(made.actions, [Column(made.scores, made.value, made.actions), critic_column(made)], explored)


class BootstrapAdvantageLearning(AdvantageLearning):
    """:class:`AdvantageLearning` with R replaced by y.

    Intended: y = r + gamma V', at the last step y = r. Upstream: y = V' + r, at the last step the final reward.

    The arguments are :class:`AdvantageLearning`'s.

    Examples:
        >>> decide = fastroute.BootstrapAdvantageLearning(3, 8)
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    needs = upstream_needs = (("first", 1),)
    algorithm = "BootstrapAdvantageLearning"

    def target(self, e: Entries) -> Tensor:
        if self.formula == "upstream":
            return e.upstream_target(lambda: e.next("first", 1) + e.r)
        return super().target(e)


class SurpriseLearning(AdvantageLearning):
    """:class:`AdvantageLearning` with R replaced by y = gamma V' - r, at the last step the final reward.

    The sign of r is what tells it from :class:`BootstrapAdvantageLearning`, so it is kept in both formulas.

    The arguments are :class:`AdvantageLearning`'s.

    Examples:
        >>> decide = fastroute.SurpriseLearning(3, 8)
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    needs = upstream_needs = (("first", 1),)
    algorithm = "SurpriseLearning"

    def target(self, e: Entries) -> Tensor:
        if self.formula == "upstream":
            return super().target(e)
        return e.last_or(e.f, lambda: e.gamma * e.next("first", 1) - e.r)
