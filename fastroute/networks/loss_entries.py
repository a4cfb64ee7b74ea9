"""What a decision's loss is made of: one entry per decision that a layer made for a sample.

Axes: N entries, K choices. The reward r of an entry is its own (the last one's includes the final reward f), R the
discounted sum of r from the entry on; "next" is the sample's next decision, whichever layer made it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules.names import has_own
from ..ops.masked import only
from ..ops.trajectory_loss.op import SILENT
from .decision_record import Column, Record

#: What a loss may ask of the next state: a column reduced, or at the next action, or that action itself, or all columns
#: with their gradients (``("state", 0)``).
Need = tuple[str, int]


@dataclass
class Step:
    """What ``Loss`` worked out for one record; all [B]."""

    r: Tensor
    R: Tensor
    f: Tensor
    terminal: Tensor | bool  #: the sample's last decision
    cut: Tensor | bool  #: the last one, or the next has another number of choices (where upstream stops looking ahead)
    next: dict[Need, Tensor]


def reduce(record: Record, need: Need, dtype: torch.dtype) -> Tensor:
    """[B], without gradient, in the rewards' dtype: what a need is, of one record (an action stays an integer)."""
    how, i = need
    if how == "action":
        return record.actions
    if how == "state":
        return record.states()
    if i >= len(record.columns):
        return torch.zeros_like(record.actions, dtype=dtype)  # upstream's padding
    column = record.columns[i]
    return (column.at(record.actions).detach() if how == "at" else column.reduced(how)).to(dtype)


class Rows(NamedTuple):
    """What ``ops.trajectory_loss`` reads of T records."""

    s0: list[Tensor | None]
    s1: list[Tensor | None]
    aux: list[Tensor | None]
    look: list[Tensor | None]


#: What a decision is given as an attribute in place of its class's.
_LOSSES = frozenset({"loss", "loss_of"})


def known_losses(records: Sequence[Record]) -> list[str] | None:
    """The names by which ``ops.trajectory_loss`` knows the losses of these records; None if it knows not all.

    It knows those of the classes as intended. And it is told one number of what comes next, so that where a mask makes
    several earlier decisions look at the same one, they have to look at the same of it.
    """
    for record in records:
        decision = record.law
        if getattr(decision, "algorithm", None) is None or decision.formula != "intended":
            return None
        if has_own(decision, _LOSSES):
            return None
    masked = any([record.active is not None for record in records])
    if masked and len({need for record in records for need in record.law.needs}) > 1:
        return None
    return [record.law.algorithm for record in records]


def rows_of(records: Sequence[Record], dtype: torch.dtype) -> Rows:
    """The columns and other numbers, all [B], that the classes' losses are made of."""
    masked = any(record.active is not None for record in records)
    shared = next((record.law.needs for record in records if record.law.needs), ())
    rows = Rows([], [], [], [])
    needs: tuple[Need, ...] = ()  # of the decision before
    for record in records:
        decision, columns, actions = record.law, record.columns, record.actions
        silent = decision.algorithm == SILENT
        rows.s0.append(None if silent else columns[0].at(actions))
        rows.s1.append(None if decision.critic is None else columns[decision.critic].at(actions))
        rows.aux.append(decision.auxiliary(record))
        rows.look.append(reduce(record, needs[0], dtype) if needs else None)
        needs = shared if masked else decision.needs
    return rows


class Entries:
    """The entries of one decision layer in a batch."""

    def __init__(self, records: Sequence[Record], steps: Sequence[Step], gamma: float) -> None:
        self._records, self._steps, self.gamma = records, steps, gamma
        self.choices = records[0].choices
        self.batch = records[0].actions.shape[0]  #: B, the samples that the entries come from
        #: [N] bool, or None: all. The others are no entries: whatever they left is zero here, and has no gradient.
        self.active: Tensor | None = None
        if any(r.active is not None for r in records):
            ones = torch.ones_like(records[0].actions, dtype=torch.bool)
            self.active = torch.cat([ones if r.active is None else r.active for r in records])

    def _all(self, of: Callable[[Record, Step], Tensor]) -> Tensor:
        made = [of(r, s) for r, s in zip(self._records, self._steps, strict=True)]
        return only(made[0] if len(made) == 1 else torch.cat(made), self.active)

    # ------------------------------------------------------------------------------------------------ this state

    @property
    def columns(self) -> int:
        """How many the state has."""
        return len(self._records[0].columns)

    @property
    def actions(self) -> Tensor:
        """[N] int64."""
        return self._all(lambda r, s: r.actions)

    def full(self, i: int) -> Tensor:
        """[N, K] or [N, 1]: a column."""
        return self._all(lambda r, s: r.columns[i].full)

    def at(self, i: int) -> Tensor:
        """[N]: a column at the action."""
        return self._all(lambda r, s: r.columns[i].at(r.actions))

    def auxiliary(self, decision: Any) -> Any:
        """[N], without gradient: what else the decision's loss reads of a record."""
        if decision.auxiliary(self._records[0]) is None:
            return None
        return self._all(lambda r, s: decision.auxiliary(r))

    # -------------------------------------------------------------------------------------------- rewards, and next

    @property
    def r(self) -> Tensor:
        """[N]: the reward of the step, at the last one with the final reward."""
        return self._all(lambda r, s: s.r)

    @property
    def R(self) -> Tensor:
        """[N]: the (discounted) sum of rewards from here on."""
        return self._all(lambda r, s: s.R)

    @property
    def f(self) -> Tensor:
        """[N]: the sample's final reward."""
        return self._all(lambda r, s: s.f)

    def next(self, how: str, i: int = 0) -> Tensor:
        """[N], without gradient: of the next state, column ``i``'s "max", its "first", or "at" the next action."""

        def of(r: Record, s: Step) -> Tensor:
            if (how, i) in s.next:
                return s.next[how, i]
            return torch.zeros_like(r.actions if how == "action" else s.f)  # a last step's: nobody reads it

        return self._all(of)

    def _where(self, of: Callable[[Step], Tensor | bool], yes: Tensor, no: Callable[[], Tensor]) -> Tensor:
        flags = [of(s) for s in self._steps]
        if all(flag is True for flag in flags):
            return yes
        if all(flag is False for flag in flags):
            return no()
        like = self._records[0].actions
        where = [f if isinstance(f, Tensor) else torch.full_like(like, f, dtype=torch.bool) for f in flags]
        return torch.where(where[0] if len(where) == 1 else torch.cat(where), yes, no())

    def target(self, how: str, i: int) -> Tensor:
        """[N], without gradient: r + gamma * next, and at the sample's last step r alone."""
        r = self.r
        return self.last_or(r, lambda: r + self.gamma * self.next(how, i))

    def last_or(self, last: Tensor, otherwise: Callable[[], Tensor]) -> Tensor:
        """[N]: one thing at a sample's last step, another before."""
        return self._where(lambda s: s.terminal, last, otherwise)

    def upstream_target(self, ahead: Callable[[], Tensor]) -> Tensor:
        """[N]: upstream's, f where it stops looking ahead, else what is given."""
        return self._where(lambda s: s.cut, self.f, ahead)

    # ---------------------------------------------------------------------------------------------- over all entries

    def sum(self, x: Tensor) -> Tensor:
        """The sum over entries."""
        return only(x, self.active).sum()

    def mean(self, x: Tensor) -> Tensor:
        """The mean over entries."""
        return x.mean() if self.active is None else self.sum(x) / self.active.sum().clamp(min=1)


def from_raw(
    needs: Sequence[Need],
    is_terminal: Tensor,
    state: Tensor,
    next_state: Tensor,
    action: Tensor,
    next_action: Tensor,
    reward: Tensor,
    cum_return: Tensor,
    final_reward: Tensor,
) -> Entries:
    """Entries from what upstream's loss functions take: states [N, K, C], everything else [N]."""

    def record(states: Tensor, actions: Tensor) -> Record:
        return Record(None, actions, states.shape[1], [Column(states[:, :, i]) for i in range(states.shape[2])])

    terminal, after = is_terminal.bool(), record(next_state, next_action)
    ahead = {need: reduce(after, need, reward.dtype) for need in needs}
    step = Step(reward, cum_return, final_reward, terminal, terminal, ahead)
    return Entries([record(state, action)], [step], 1.0)
