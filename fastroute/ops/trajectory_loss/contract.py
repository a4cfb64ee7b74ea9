"""What passes between ``trajectory_loss`` and its backends.

Axes: B samples, T decisions, C differentiable columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

#: The classes whose loss is known, each in its intended form. The last one has none, but counts as a decision.
ALGORITHMS = (
    "REINFORCE", "REINFORCEBl1", "REINFORCEBl2", "EGreedyREINFORCE", "QLearning", "SARSA", "ActorCritic", "AAC",
    "BootstrapAAC", "EGreedyAAC", "AdvantageLearning", "BootstrapAdvantageLearning", "SurpriseLearning", "WPL",
    "GumbelSoftmax",
)  # fmt: skip


SILENT = "GumbelSoftmax"


#: Those with a second column, which learns too: the critic's.
CRITICS = frozenset(ALGORITHMS) - {"REINFORCE", "EGreedyREINFORCE", "QLearning", "SARSA", SILENT}


#: Those that read an auxiliary number: the baseline, w = p_a / mu_a, or the policy's mean value.
AIDED = frozenset({"REINFORCEBl1", "REINFORCEBl2", "EGreedyREINFORCE", "EGreedyAAC", "WPL"})


#: Those whose target is made of what the sample's next decision expects.
BOOTSTRAPPING = frozenset({
    "REINFORCEBl1", "REINFORCEBl2", "QLearning", "SARSA", "ActorCritic", "BootstrapAAC", "BootstrapAdvantageLearning",
    "SurpriseLearning",
})  # fmt: skip


Rows = Sequence[Tensor | None]


class Decisions(NamedTuple):
    """T decisions; every tensor is [B]. ``ops.trajectory_loss`` says what they are."""

    kinds: Sequence[str]
    choices: Sequence[int]
    s0: Rows
    s1: Rows
    aux: Rows
    own: Rows
    look: Rows
    active: Rows


class Entry(NamedTuple):
    """What one decision's loss is made of; every tensor is [B]. A formula reads ``s1`` and ``aux`` only of kinds that
    have them, so they are not typed as Tensor | None.
    """

    kind: str
    choices: int  # K
    s0: Tensor  # the first column at the action: log p_a, q_a or A_a
    s1: Any  # the critic's; None: without one
    aux: Any  # without gradient: the baseline, w = p_a / mu_a, or the policy's mean value; None of other kinds
    R: Tensor
    y: Tensor  # without gradient, too: what is bootstrapped


#: Numbers per decision in a layout: kind, choices, and where s0, s1 are among the columns, aux, own and look among the
#: others, active among the masks; -1 for None.
FIELDS = 8


def taken_apart(
    columns: Sequence[Tensor], others: Sequence[Tensor], masks: Sequence[Tensor], layout: Sequence[int]
) -> Decisions:
    """The decisions of a layout: the op takes three lists without gaps."""
    rows = [layout[i : i + FIELDS] for i in range(0, len(layout), FIELDS)]
    sources = (columns, columns, others, others, others, masks)
    tensors = [[None if row[2 + i] < 0 else s[row[2 + i]] for row in rows] for i, s in enumerate(sources)]
    return Decisions([ALGORITHMS[row[0]] for row in rows], [row[1] for row in rows], *tensors)
