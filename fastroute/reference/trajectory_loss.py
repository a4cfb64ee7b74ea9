"""The routing loss of a trajectory in plain PyTorch: what every decision of a batch learns from the rewards.

Axes: B samples, T decisions, C differentiable columns. Names as in docs/networks.md: R the discounted sum of rewards
from a decision on, y what it bootstraps, K choices; a decision's first column is log p_a, q_a or A_a.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: The classes whose loss is known, each in its intended form. The last one has none, but counts as a decision.
KINDS = (
    "REINFORCE", "REINFORCEBl1", "REINFORCEBl2", "EGreedyREINFORCE", "QLearning", "SARSA", "ActorCritic", "AAC",
    "BootstrapAAC", "EGreedyAAC", "AdvantageLearning", "BootstrapAdvantageLearning", "SurpriseLearning", "WPL",
    "GumbelSoftmax",
)  # fmt: skip
SILENT = "GumbelSoftmax"
#: Those with a second column, which learns too: the critic's.
CRITICS = frozenset(KINDS) - {"REINFORCE", "EGreedyREINFORCE", "QLearning", "SARSA", SILENT}
#: Those that read an auxiliary number: the baseline, w = p_a / mu_a, or the policy's mean value.
AIDED = frozenset({"REINFORCEBl1", "REINFORCEBl2", "EGreedyREINFORCE", "EGreedyAAC", "WPL"})
#: Those whose target is made of what the sample's next decision expects.
BOOTSTRAPPING = frozenset({
    "REINFORCEBl1", "REINFORCEBl2", "QLearning", "SARSA", "ActorCritic", "BootstrapAAC", "BootstrapAdvantageLearning",
    "SurpriseLearning",
})  # fmt: skip
#: Those whose first column is an advantage, which learns what the critic leaves.
ADVANTAGES = frozenset({"AdvantageLearning", "BootstrapAdvantageLearning", "SurpriseLearning"})

Rows = Sequence[Tensor | None]


class Final(NamedTuple):
    """A final reward by its formula, times ``scale``: minus the loss; or, with ``scores``, 1 where the best one is the
    true class's, else -1.
    """

    losses: Tensor  # [B]
    scale: float = 1.0
    scores: Tensor | None = None  # [B, C]
    truth: Tensor | None = None  # [B] int64

    def made(self) -> Tensor:
        """[B], in the losses' dtype."""
        if self.scores is None or self.truth is None:
            made = -self.losses
        else:
            made = torch.where(self.scores.argmax(1).eq(self.truth), 1.0, -1.0).to(self.losses.dtype)
        return made if self.scale == 1.0 else made * self.scale


class ByAction(NamedTuple):
    """A decision's own reward by its formula: the action's entry of a table; or, with ``ratio``, its share of what was
    counted, times that. An action a was counted ``table[a + 1] - table[a]`` times.
    """

    actions: Tensor  # [B] int64
    table: Tensor  # [C], float32 or float64; or [C + 1] int64
    ratio: float | None = None

    def made(self, dtype: torch.dtype) -> Tensor:
        """[B]"""
        if self.ratio is None:
            return self.table[self.actions].to(dtype)
        offsets = self.table.to(dtype)
        return (offsets.diff() * (self.ratio / offsets[-1:].clamp(min=1)))[self.actions]


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
    """What one decision's loss is made of; every tensor is [B]."""

    kind: str
    choices: int  # K
    s0: Tensor  # the first column at the action: log p_a, q_a or A_a
    s1: Tensor | None  # the critic's
    aux: Tensor | None  # without gradient: the baseline, w = p_a / mu_a, or the policy's mean value
    R: Tensor
    y: Tensor  # without gradient, too: what is bootstrapped


def targets(d: Decisions, f: Tensor, gamma: float, normalize: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(t, R_t, y_t) of every decision, the last one first, in the dtype of ``f``."""
    counts = f.new_zeros(())
    for active in d.active:
        counts = counts + (1 if active is None else active.to(f.dtype))
    scale = (f.abs() if normalize else torch.ones_like(f)) / counts.clamp(min=1)
    more = torch.zeros_like(f, dtype=torch.bool)  # whether the sample has a later decision
    R = ahead = torch.zeros_like(f)
    for t in reversed(range(len(d.kinds))):
        own, look, active = d.own[t], d.look[t], d.active[t]
        r = torch.where(more, 0, f)
        if own is not None:
            r = r + own.to(f.dtype) * scale
        R_t = r + gamma * R
        if d.kinds[t] == "SurpriseLearning":
            y = torch.where(more, gamma * ahead - r, f)
        else:
            y = torch.where(more, r + gamma * ahead, r)
        yield t, R_t, y
        seen = torch.zeros_like(f) if look is None else look.to(f.dtype)
        if active is None:
            R, ahead, more = R_t, seen, torch.ones_like(more)
        else:
            R, ahead, more = torch.where(active, R_t, R), torch.where(active, seen, ahead), more | active


def entries(d: Decisions, f: Tensor, gamma: float, normalize: bool) -> Iterator[tuple[int, Entry]]:
    """What every decision with a loss learns from, in the dtype of ``f``, the last one first."""

    def widened(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(f.dtype)

    for t, R, y in targets(d, f, gamma, normalize):
        kind = d.kinds[t]
        if kind != SILENT and (s0 := widened(d.s0[t])) is not None:
            s1 = widened(d.s1[t]) if kind in CRITICS else None
            yield t, Entry(kind, d.choices[t], s0, s1, widened(d.aux[t]), R, y)


def advantage(e: Entry) -> Tensor:
    """What multiplies -log p_a in the classes that have a policy (WPL's step apart); without gradient."""
    R, aux = e.R, e.aux
    s1 = None if e.s1 is None else e.s1.detach()
    if e.kind == "REINFORCE":
        return R
    if e.kind == "EGreedyREINFORCE":
        return aux * R  # type: ignore[operator]
    if e.kind == "REINFORCEBl1":
        return R - aux  # type: ignore[operator]
    if e.kind == "REINFORCEBl2":
        return R / (e.choices * e.s0.detach().exp()) - aux  # type: ignore[operator]
    if e.kind == "EGreedyAAC":
        return aux * (R - s1)  # type: ignore[operator]
    if e.kind == "BootstrapAAC":
        return e.y - s1  # type: ignore[operator]
    if e.kind in ("ActorCritic", "AAC"):
        return R - s1  # type: ignore[operator]
    raise ValueError(f"kinds: expected one with a formula here, got {e.kind!r}")


def step_of(e: Entry, p: Tensor) -> Tensor:
    """WPL's d w: how far p = p_a should move, the less the nearer it is to where it goes; without gradient."""
    p, d = p.detach(), e.R - e.aux  # type: ignore[operator]
    return d * torch.where(d < 0, p, 1 - p)


def critics_target(e: Entry) -> Tensor:
    """What the second column learns."""
    return e.R if e.kind in ("AAC", "EGreedyAAC", "AdvantageLearning", "WPL") else e.y


def squared(a: Tensor, b: Tensor) -> Tensor:
    """(a - b)^2, in the fewest operators that PyTorch has for it."""
    if a.dtype != b.dtype:  # of which torch 2.11 has no gradient
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    return F.mse_loss(a, b, reduction="none")


def loss_of(e: Entry) -> Tensor:
    """[B]: the loss of one decision, with autograd: the definition, from which decisions derive ``loss``.

    Written out with their derivatives, the same formulas are in ``slopes_of``, csrc/cpu/trajectory_loss.cpp and
    kernels/trajectory_loss.py. A decision that defines its own needs none of these.
    """
    if e.kind in ("QLearning", "SARSA"):
        return squared(e.s0, e.y)
    critic = None if e.s1 is None else squared(e.s1, critics_target(e))
    if e.kind == "WPL":
        p = e.s0.exp()
        actor = squared(p, p.detach() + step_of(e, p))
    elif e.kind in ADVANTAGES:
        actor = squared(e.s0, critics_target(e) - e.s1.detach())  # type: ignore[union-attr]
    else:
        actor = -e.s0 * advantage(e)
    return actor if critic is None else actor + critic


def slopes_of(e: Entry) -> tuple[Tensor, Tensor | None]:
    """The derivatives of ``loss_of`` by both columns."""
    if e.kind in ("QLearning", "SARSA"):
        return 2 * (e.s0 - e.y), None
    critic = None if e.s1 is None else 2 * (e.s1 - critics_target(e))
    if e.kind == "WPL":
        p = e.s0.exp()
        return -2 * step_of(e, p) * p, critic
    if e.kind in ADVANTAGES:
        return 2 * (e.s0 - (critics_target(e) - e.s1)), critic  # type: ignore[operator]
    return -advantage(e), critic


def sums(*tensors: Tensor | None) -> torch.dtype:
    """float64 if one of the tensors is, else float32: in what everything is computed."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def trajectory_loss(
    kinds: Sequence[str],
    s0: Rows,
    s1: Rows,
    aux: Rows,
    own: Rows,
    look: Rows,
    active: Rows,
    f: Tensor,
    gamma: float = 1.0,
    normalize: bool = True,
    *,
    choices: Sequence[int],
) -> Tensor:
    """[B]: the definition, with autograd, in float32 or float64."""
    d = Decisions(kinds, choices, s0, s1, aux, own, look, active)
    f = f.to(sums(f, *s0, *s1, *aux, *own, *look))
    total = torch.zeros_like(f)
    for t, e in entries(d, f, gamma, normalize):
        on = active[t]
        total = total + (loss_of(e) if on is None else torch.where(on, loss_of(e), 0))
    return total


# ----------------------------------------------------------------------------- the op's contract (backend "reference")

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
    return Decisions([KINDS[row[0]] for row in rows], [row[1] for row in rows], *tensors)


def forward(
    f: Tensor, columns: Sequence[Tensor], others: Sequence[Tensor], masks: Sequence[Tensor], layout: Sequence[int],
    gamma: float, normalize: bool, want_slopes: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss [B], slopes [C, B]): slopes[c] is the derivative of a sample's loss by its number in column c."""
    d = taken_apart(columns, others, masks, layout)
    f = f.to(sums(f, *columns, *others))
    total, slopes = torch.zeros_like(f), [f.new_zeros(0)] * len(columns)
    for t, e in entries(d, f, gamma, normalize):
        on = d.active[t]
        of_both = slopes_of(e) if want_slopes else (None, None)
        made = [m if m is None or on is None else torch.where(on, m, 0) for m in (loss_of(e), *of_both)]
        total = total + made[0]
        for where, slope in zip(layout[FIELDS * t + 2 : FIELDS * t + 4], made[1:], strict=True):
            if slope is not None:
                slopes[where] = slope
    return total, torch.stack(slopes) if want_slopes and slopes else f.new_empty(0, f.shape[0])


def backward(grad: Tensor, slopes: Tensor) -> Sequence[Tensor]:
    """Per column [B], its gradient from that of the loss."""
    made: Sequence[Tensor] = (slopes * grad).unbind()
    return made
