"""Policies with a critic: actor-critic, advantage actor-critic, and the weighted policy learner.

Notation as in ``policy_gradient``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.arguments import checked
from ...ops.dispatch.contract import Plan
from ...ops.policy.op import values
from ...ops.trajectory_loss.op import critics_target, squared
from ..decision_record import Column, Record
from ..loss_entries import Entries, Need
from .base import Decided, Decision
from .policy_gradient import REINFORCE, _WithValueNet, critic_column, egreedy_columns, importance, log_softmax_column

__all__ = ["AAC", "WPL", "ActorCritic", "BootstrapAAC", "EGreedyAAC"]


class ActorCritic(REINFORCE):
    """A policy, and Q as its critic. Loss: -log p_a sg(R - Q_a) + (Q_a - sg(y))^2. State: [log p, Q].

    Intended: y = r + gamma max_k Q'_k, at the last step y = r.
    Upstream: y = max_k Q'_k - r, and the final reward at the last step, or where K changes after it.

    Args:
        qvalue_net: Q instead of the default, [B, ...] -> [B, K]; None: a copy of ``policy_net``, if that is given. The
            other arguments are :class:`Decision`'s.

    Examples:
        >>> decide = fastroute.ActorCritic(3, 8, qvalue_net=nn.Linear(8, 3))
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    needs: tuple[Need, ...] = (("max", 1),)
    upstream_needs: tuple[Need, ...] = (("max", 1),)
    algorithm, critic = "ActorCritic", 1

    @checked
    def __init__(self, *args: Any, qvalue_net: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if qvalue_net is None:
            given = inspect.signature(Decision).bind_partial(*args, **kwargs).arguments
            qvalue_net = given.get("policy_net") or given.get("readme", {}).get("approx_module")
        self._qvalue_mem = self._storages(self._num_selections, qvalue_net)

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        made, explored = self._answer(x, plan, forced, self._qvalue_mem, temperature=self._temperature)
        log_p = log_softmax_column(made, self._temperature)
        return Decided(made.actions, [log_p, critic_column(made)], explored)


class WPL(ActorCritic):
    """Weighted Policy Learner (Abdallah and Lesser 2008), the choice of the Routing Networks paper.

    a ~ p = (z - min z + 1e-6) / sum; in eval the most likely one. State: [log p, Q], with p kept 1.2e-7 from 0 and 1
    under the logarithm, and as intended V = sum_k p_k Q_k. The critic's loss is (Q_a - R)^2, and the actor's:
    Intended: (p_a - sg(p_a + d w))^2, d = R - V, w = p_a if d < 0 else 1 - p_a: a step along the advantage of the
    action, the smaller the nearer p_a is to where it leads.
    Upstream: (log p_a - sg(log p_a m))^2, d = R - Q_a, m = 1 + d if d < 0 else 2 - d: on the logarithm, a negative
    number, which turns some steps around, and against a critic that, once right, leaves nothing but noise of d.

    The arguments are :class:`ActorCritic`'s.

    Examples:
        >>> decide = fastroute.WPL(3, num_agents=2, policy_storage_type="tabular")  # 3 numbers per task
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8), tasks=torch.tensor([0, 1, 1, 0]))
        >>> h, meta, agents = fastroute.PerTaskAssignment()(h, meta, agents)
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    needs: tuple[Need, ...] = ()
    upstream_needs: tuple[Need, ...] = ()
    algorithm = "WPL"

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        intended = self.formula == "intended"
        made, explored = self._answer(x, plan, forced, self._qvalue_mem, kind="shifted", expected=intended)
        columns = [Column(lambda: values(made.scores, "shifted", 1.0), made.value, made.actions), critic_column(made)]
        if (mean := made.expected) is not None:
            columns.append(Column(lambda: mean[:, None], mean))
        return Decided(made.actions, columns, explored)

    def auxiliary(self, record: Record) -> Tensor:
        """[B]: the policy's mean value."""
        return record.columns[2].at(record.actions)

    def loss(self, e: Entries) -> Tensor | None:
        if self.formula == "intended":
            return super().loss(e)
        log_p, q, R = e.at(0), e.at(1), e.R
        d = (R - q).detach()
        factor = torch.where(d < 0, 1 + d, 2 - d)
        return squared(log_p, (log_p * factor).detach()) + squared(q, R)


class AAC(_WithValueNet):
    """Advantage actor-critic. Loss: -log p_a sg(D) + D^2, D = R - V. State: [log p, V]. a ~ softmax(z).

    Upstream adds the mean of D^2 over the layer's entries to each one, which comes to the same in the batch's mean, but
    not in a single sample's loss.

    Args:
        value_net: V instead of the default, [B, ...] -> [B, 1]; the other arguments are :class:`Decision`'s.

    Examples:
        >>> decide = fastroute.AAC(3, 8, value_net=nn.Linear(8, 1))
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    algorithm, critic = "AAC", 1

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        made, explored = self._answer(x, plan, forced, self._value_mem)
        return Decided(made.actions, [log_softmax_column(made, 1.0), critic_column(made)], explored)

    def loss(self, e: Entries) -> Tensor | None:
        entry = self.entry(e)
        if self.formula == "intended":
            return self.loss_of(entry)
        advantage = critics_target(entry) - entry.s1
        return -entry.s0 * advantage.detach() + e.mean(advantage.square())


class BootstrapAAC(AAC):
    """:class:`AAC` with D = r + gamma V' - V, at the last step D = r - V.

    Upstream's own code raises for any number of entries but 1 and 5; of ``formula="upstream"`` there is left
    :class:`AAC`'s mean of D^2.

    The arguments are :class:`AAC`'s.

    Examples:
        >>> decide = fastroute.BootstrapAAC(3, 8)
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    needs = upstream_needs = (("first", 1),)
    algorithm = "BootstrapAAC"

    def target(self, e: Entries) -> Tensor:
        return e.target("first", 1)


class EGreedyAAC(_WithValueNet):
    """:class:`AAC` with the exploration of :class:`EGreedyREINFORCE`. State: [log p, p, mu, V].

    Intended: -log p_a sg(w D) + D^2, w = p_a / mu_a. Upstream: w_i multiplies the sum of all entries' -log p_a D, and
    the sum of all D^2 is added to each.

    Args:
        value_net: V instead of the default, [B, ...] -> [B, 1]; the other arguments are :class:`Decision`'s.

    Examples:
        >>> decide = fastroute.EGreedyAAC(3, 8, exploration=0.2)
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    algorithm, critic = "EGreedyAAC", 3
    _temperature = 1.0

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        made, explored = self._answer(x, plan, forced, self._value_mem, with_coin=True)
        columns = [*egreedy_columns(self, made), critic_column(made)]
        return Decided(made.actions, columns, explored)

    def auxiliary(self, record: Record) -> Tensor:
        """[B]: the importance weight, w."""
        return importance(record)

    def loss(self, e: Entries) -> Tensor | None:
        entry = self.entry(e)
        if self.formula == "intended":
            return self.loss_of(entry)
        advantage = entry.R - entry.s1
        return entry.aux * e.sum(-entry.s0 * advantage.detach()) + e.sum(advantage.square())
