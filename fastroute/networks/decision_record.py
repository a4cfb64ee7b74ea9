"""What one decision layer did with a batch.

Axes: B samples, K choices of a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.host import version_of

STATE_COLUMNS = 5  #: upstream pads every state to so many columns


class Column:
    """One quantity per choice, [B, K] or [B, 1]. A loss mostly reads the entry at the action.

    ``full`` is the tensor or a function that makes it when somebody looks; ``at`` is the entry at the action, where the
    decision has it anyway, and ``of`` are the actions that it was made for.
    """

    __slots__ = ("_at", "_full", "_memo", "_of")

    def __init__(self, full: Tensor | Callable[[], Tensor], at: Tensor | None = None, of: Tensor | None = None) -> None:
        self._full, self._at = full, at
        self._of = None if of is None else (of, version_of(of))
        self._memo: dict[str, Tensor] = {}

    def __getstate__(self) -> Any:
        return None, {"_full": self.full, "_at": self._at, "_memo": self._memo, "_of": None}

    def taken(self, actions: Tensor) -> None:
        """Told the actions that are taken: where they are others, the entry that it has is another's."""
        if self._of is not None and (self._of[0] is not actions or self._of[1] != version_of(actions)):
            self._at = None
        self._of = None

    @property
    def full(self) -> Tensor:
        """[B, K], or [B, 1] for a quantity that all choices share."""
        if not isinstance(self._full, Tensor):
            with torch.enable_grad():  # the first reader may be in no_grad, but later ones need its gradient
                self._full = self._full()
        return self._full

    def at(self, actions: Tensor) -> Tensor:
        """[B]: the entries at the actions of the record."""
        if self._at is None:
            full = self.full
            self._at = full.squeeze(1) if full.shape[1] == 1 else full.gather(1, actions.unsqueeze(1)).squeeze(1)
        return self._at

    def reduced(self, how: str) -> Tensor:
        """[B], without gradient: the "max" over choices, or the "first" choice's."""
        if how not in self._memo:
            full = self.full.detach()
            self._memo[how] = full[:, 0] if how == "first" or full.shape[1] == 1 else full.max(1).values
        return self._memo[how]

    def take(self, rows: Tensor) -> Column:
        """The samples ``rows`` of it."""
        at = None if self._at is None else self._at[rows]
        return Column(lambda: self.full[rows], at)

    def spread(self, rows: Tensor, size: int) -> Column:
        """In a batch of ``size``, at ``rows``; zeros elsewhere."""
        at = None if self._at is None else spread(self._at, rows, size)
        return Column(lambda: spread(self.full, rows, size), at)


def spread(t: Tensor, rows: Tensor, size: int, fill: float = 0) -> Tensor:
    return t.new_full((size, *t.shape[1:]), fill).index_copy(0, rows, t)


class Record:
    """What one decision layer did with a batch: one row of a :class:`Trajectory`.

    Attributes:
        decision: the layer.
        actions: [B] int64.
        choices: K.
        agents: [B] int64, or None where the layer has one agent.
        active: [B] bool, or None: the samples it decided for; None means all.
        exploratory: [B] bool, or a function that makes it.
        columns: the layer's state, see its class; entries of inactive samples mean nothing.
        reward: its per-action reward function.
        law: who says what the layer learns, the layer itself; another one for classes made from fastroute.compat's.

    Examples:
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = fastroute.REINFORCE(3, 8)(h, meta, agents)
        >>> record = meta.records[0]
        >>> record.choices, torch.equal(record.actions, actions)
        (3, True)
    """

    def __init__(
        self,
        decision: Any,
        actions: Tensor,
        choices: int,
        columns: Sequence[Column],
        *,
        agents: Tensor | None = None,
        active: Tensor | None = None,
        exploratory: Tensor | Callable[[], Tensor] | None = None,
        reward: Any = None,
        law: Any = None,
    ) -> None:
        self.law = decision if law is None else law
        self.decision, self.actions, self.choices, self.columns = decision, actions, choices, tuple(columns)
        self.agents, self.active, self.reward = agents, active, reward
        self._exploratory = exploratory

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_exploratory": self.exploratory}

    @property
    def exploratory(self) -> Tensor:
        """[B] bool: where the action was one of exploration."""
        if self._exploratory is None:
            self._exploratory = torch.zeros_like(self.actions, dtype=torch.bool)
        if not isinstance(self._exploratory, Tensor):
            self._exploratory = self._exploratory()
        return self._exploratory

    def states(self) -> Tensor:
        """[B, K, 5]: the columns side by side, zero-padded as upstream has them, with their gradients."""
        like = self.columns[0].full if self.columns else self.actions.new_zeros(1, 1, dtype=torch.float32)
        shape = (self.actions.shape[0], self.choices)
        made = [c.full.expand(shape).to(like.dtype) for c in self.columns]
        made += [like.new_zeros(shape)] * (STATE_COLUMNS - len(made))
        return torch.stack(made, -1)

    def take(self, rows: Tensor) -> Record:
        """Of the samples ``rows`` only."""
        return Record(
            self.decision,
            self.actions[rows],
            self.choices,
            [c.take(rows) for c in self.columns],
            agents=None if self.agents is None else self.agents[rows],
            active=None if self.active is None else self.active[rows],
            exploratory=lambda: self.exploratory[rows],
            reward=self.reward,
            law=self.law,
        )

    def spread(self, rows: Tensor, size: int) -> Record:
        """As a record of a larger batch, in which the other samples are inactive."""
        active = torch.ones_like(self.actions, dtype=torch.bool) if self.active is None else self.active
        return Record(
            self.decision,
            spread(self.actions, rows, size),
            self.choices,
            [c.spread(rows, size) for c in self.columns],
            agents=None if self.agents is None else spread(self.agents, rows, size),
            active=spread(active, rows, size),
            exploratory=lambda: spread(self.exploratory, rows, size),
            reward=self.reward,
            law=self.law,
        )


class Mixture:
    """What one top-k gating did with a batch: a row of :attr:`Trajectory.mixtures`.

    Attributes:
        decision: the layer.
        actions: [B, k] int64, -1 for no module.
        weights: [B, k] float32 or float64, with their gradient; 0 where the action is -1.
        choices: K.
        losses: by name ("balance", "z"), [B] each, with their gradient; the mean over the batch is the loss.
        active: [B] bool, or None: the samples it decided for; None means all.
        after: how many decisions had been recorded before it.
        counts: [K] int64, or None: entries of each module in the gating's whole batch, see ``Routed``.

    Examples:
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = fastroute.TopKGating(6, 8, k=2)(h, meta, agents)
        >>> mixture = meta.mixtures[0]
        >>> mixture.actions.shape, sorted(mixture.losses)
        (torch.Size([4, 2]), ['balance'])
    """

    def __init__(
        self,
        decision: Any,
        actions: Tensor,
        weights: Tensor,
        choices: int,
        losses: Mapping[str, Tensor],
        *,
        active: Tensor | None = None,
        after: int = 0,
        counts: Tensor | None = None,
    ) -> None:
        self.decision, self.actions, self.weights, self.choices = decision, actions, weights, choices
        self.losses, self.active, self.after, self.counts = dict(losses), active, after, counts

    def _with(self, of: Callable[[Tensor, float], Tensor], active: Tensor | None) -> Mixture:
        return Mixture(
            self.decision, of(self.actions, -1), of(self.weights, 0), self.choices,
            {name: of(loss, 0) for name, loss in self.losses.items()}, active=active, after=self.after,
            counts=self.counts,
        )  # fmt: skip

    def take(self, rows: Tensor) -> Mixture:
        """Of the samples ``rows`` only."""
        return self._with(lambda t, fill: t[rows], None if self.active is None else self.active[rows])

    def spread(self, rows: Tensor, size: int) -> Mixture:
        """As one of a larger batch, in which the other samples are inactive; the batch's mean loss stays."""
        here = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device) if self.active is None else self.active
        made = self._with(lambda t, fill: spread(t, rows, size, fill), spread(here, rows, size))
        made.losses = {name: loss * (size / max(rows.shape[0], 1)) for name, loss in made.losses.items()}
        return made
