"""The routing loss of a trajectory in plain PyTorch: what every decision of a batch learns from the rewards.

Axes: B samples, T decisions, C differentiable columns. Names as in docs/networks.md: R the discounted sum of rewards
from a decision on, y what it bootstraps, K choices; a decision's first column is log p_a, q_a or A_a.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import sums
from .contract import CRITICS, SILENT, Decisions, Entry, Rows

#: Those whose first column is an advantage, which learns what the critic leaves.
ADVANTAGES = frozenset({"AdvantageLearning", "BootstrapAdvantageLearning", "SurpriseLearning"})


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
            return self.table.index_select(0, self.actions).to(dtype)
        offsets = self.table.to(dtype)
        return (offsets.diff() * (self.ratio / offsets[-1:].clamp(min=1)))[self.actions]


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
    """What every decision with a loss learns from, in the dtype of ``f``, the last one first.

    Where autograd is to differentiate it, without the samples that a decision was not made for.
    """
    again = torch.is_grad_enabled()

    def widened(t: Tensor | None, kept: Tensor | None) -> Tensor | None:
        return None if t is None else only(t.to(f.dtype), kept)

    def only(t: Tensor, kept: Tensor | None) -> Tensor:
        return t if kept is None else torch.where(kept, t, 0)

    for t, R, y in targets(d, f, gamma, normalize):
        kind, kept = d.kinds[t], d.active[t] if again else None
        if kind != SILENT and (s0 := widened(d.s0[t], kept)) is not None:
            s1 = widened(d.s1[t], kept) if kind in CRITICS else None
            yield t, Entry(kind, d.choices[t], s0, s1, widened(d.aux[t], kept), only(R, kept), only(y, kept))


def advantage(e: Entry) -> Tensor:
    """What multiplies -log p_a in the classes that have a policy (WPL's step apart); without gradient."""
    R, aux = e.R, e.aux
    s1: Any = None if e.s1 is None else e.s1.detach()
    if e.kind == "REINFORCE":
        return R
    if e.kind == "EGreedyREINFORCE":
        return aux * R
    if e.kind == "REINFORCEBl1":
        return R - aux
    if e.kind == "REINFORCEBl2":
        return R / (e.choices * e.s0.detach().exp()) - aux
    if e.kind == "EGreedyAAC":
        return aux * (R - s1)
    if e.kind == "BootstrapAAC":
        return e.y - s1
    if e.kind in ("ActorCritic", "AAC"):
        return R - s1
    raise ValueError(f"kinds: expected one with a formula here, got {e.kind!r}")


def step_of(e: Entry, p: Tensor) -> Tensor:
    """WPL's d w: how far p = p_a should move, the less the nearer it is to where it goes; without gradient."""
    p, d = p.detach(), e.R - e.aux
    return d * torch.where(d < 0, p, 1 - p)


def critics_target(e: Entry) -> Tensor:
    """What the second column learns."""
    return e.R if e.kind in ("AAC", "EGreedyAAC", "AdvantageLearning", "WPL") else e.y


def squared(a: Tensor, b: Tensor) -> Tensor:
    """(a - b)^2. (``F.mse_loss`` within several ``vmap`` takes one's axis for another's.)"""
    return (a - b).square()


def loss_of(e: Entry) -> Tensor:
    """[B]: the loss of one decision, with autograd: the definition, from which decisions derive ``loss``.

    Written out with their derivatives, the same formulas are in ``plain.slopes_of``, csrc/cpu/trajectory_loss and
    kernels/trajectory_loss.py. A decision that defines its own needs none of these.
    """
    if e.kind in ("QLearning", "SARSA"):
        return squared(e.s0, e.y)
    critic = None if e.s1 is None else squared(e.s1, critics_target(e))
    if e.kind == "WPL":
        p = e.s0.exp()
        actor = squared(p, p.detach() + step_of(e, p))
    elif e.kind in ADVANTAGES:
        actor = squared(e.s0, critics_target(e) - e.s1.detach())
    else:
        actor = -e.s0 * advantage(e)
    return actor if critic is None else actor + critic


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
