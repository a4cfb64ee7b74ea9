"""The decisions of a batch: tensors for all samples, and a list of views of single ones.

Axes: B samples, T decisions, K choices of a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import torch
from torch import Tensor

from ..modules import watching
from ..ops import dispatch
from ..ops.checks import as_tensor, given, integer, shown
from ..ops.dispatch.contract import Plan
from ..ops.trajectory_loss.op import SILENT
from .decision_record import Mixture, Record, spread
from .recorded_batch import Given, RecordedBatch, labels
from .sample_view import SampleMetaInformation

if TYPE_CHECKING:
    from .summary import Summary
else:
    Summary = Any  # for typing.get_type_hints: that module imports this one


class Trajectory(Sequence[SampleMetaInformation]):
    """The batch's decisions, as tensors; it can also be used as a list of :class:`SampleMetaInformation`.

    ``Initialization`` makes one per forward pass, decisions write a :class:`Record` each, ``Loss`` reads them. Slices
    and index lists are views: a decision that is given one writes into the whole batch's record.

    Args:
        size: B.
        tasks: B labels, or None.

    Attributes:
        records: one per decision, first one first.
        mixtures: one per top-k gating, first one first. Their actions [B, k] are apart from those of decisions: a
            gating learns by its weights' gradient, has no reward, and is no step.
        actions, agents: [T, B] int64; -1 where a sample was not decided for.
        active, exploratory: [T, B] bool.

    Examples:
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = fastroute.REINFORCE(3, 8)(h, meta, agents)
        >>> meta.actions.shape, len(meta), len(meta[0].steps)
        (torch.Size([1, 4]), 4, 1)
    """

    def __init__(self, size: int, tasks: Sequence[Any] | Tensor | None = None) -> None:
        if type(size) is not int:  # torch.export's are not
            size = integer("size", size) if not isinstance(size, torch.SymInt) else size
        if tasks is not None and (count := labels(tasks)) != size:
            raise ValueError(f"tasks: expected one label per sample, {size}, got {count}")
        if size < 0:
            raise ValueError(f"size: expected 0 or more samples, got {size}")
        self._batch, self._rows = RecordedBatch(size, tasks), None

    _batch: RecordedBatch
    _rows: list[int] | None

    @classmethod
    def _view(cls, batch: RecordedBatch, rows: list[int] | None) -> Trajectory:
        made = cls.__new__(cls)
        made._batch, made._rows = batch, rows
        return made

    @classmethod
    def of(cls, samples: Trajectory | Sequence[SampleMetaInformation], size: int | None = None) -> Trajectory:
        """A trajectory from a list of samples, as upstream's functions take them.

        Args:
            size: of a batch that something is recorded for; samples in a list then go on in that trajectory.
        """
        if isinstance(samples, Trajectory):
            made = samples
            if made._batch.is_left:
                held = list(made)
                there = cls._of_list(held)._held_by(held)
                made._batch, made._rows = there._batch, there._rows
        else:
            made = cls._of_list(samples)
        if size is not None and made.size != size:
            raise ValueError(f"meta: expected one entry per sample, {size}, got {made.size}")
        if size is None or made is samples:
            return made
        made._held_by(samples)
        return made if len(set(samples)) == size else cls._of_list(samples)  # which has some twice, and is refused

    @classmethod
    def _of_list(cls, samples: Sequence[SampleMetaInformation]) -> Trajectory:
        if not isinstance(samples, Sequence) or not all(isinstance(s, SampleMetaInformation) for s in samples):
            raise TypeError(f"meta: expected a Trajectory or a list of its samples, got {type(samples).__name__}")
        batches = list(dict.fromkeys(s._batch for s in samples))
        if len(batches) == 1 and (batches[0].size > 1 or len(samples) == 1):
            return cls._view(batches[0], [s._index for s in samples])
        return _joined([cls._view(s._batch, [s._index]) for s in samples])

    def _held_by(self, samples: Iterable[SampleMetaInformation]) -> Trajectory:
        """Itself, after samples of several batches have gone on in this one, which was made of them."""
        for row, sample in enumerate(samples if self._rows is None else ()):
            sample._batch.is_left = True
            sample._batch, sample._index = self._batch, row
            self._batch.samples[row] = sample
        return self

    # ------------------------------------------------------------------------------------------ a list of samples

    def __len__(self) -> int:
        return self.size

    @property
    def size(self) -> int:
        """B. torch.export makes a constant of ``len``, not of this."""
        return self._batch.size if self._rows is None else len(self._rows)

    def _row(self, i: int) -> int:
        size = len(self)
        if not -size <= i < size:
            raise IndexError(f"meta: expected an index below {size}, got {i}")
        i %= size
        return i if self._rows is None else self._rows[i]

    @overload
    def __getitem__(self, key: int) -> SampleMetaInformation: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int] | Tensor) -> Trajectory: ...
    def __getitem__(self, key: Any) -> SampleMetaInformation | Trajectory:
        if isinstance(key, SupportsIndex) and not getattr(key, "ndim", 0):
            return SampleMetaInformation._of(self._batch, self._row(key.__index__()))
        if isinstance(key, slice):
            picked: list[int] = list(range(*key.indices(len(self))))
        else:
            index = as_tensor("meta", key, torch.device("cpu"))
            if index.dtype == torch.bool and tuple(index.shape) == (len(self),):
                index = torch.arange(len(index), device="cpu")[index.to("cpu")]
            elif index.numel() and (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool):
                raise IndexError(f"meta: expected indices, or a bool for each of {len(self)} samples, got {given(key)}")
            picked = index_list(index)
        return Trajectory._view(self._batch, [self._row(i) for i in picked])

    def __iter__(self) -> Iterator[SampleMetaInformation]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Trajectory | Sequence[SampleMetaInformation]) -> Trajectory:
        return _joined([self, Trajectory.of(other)])

    def __radd__(self, other: Sequence[SampleMetaInformation]) -> Trajectory:
        return _joined([Trajectory.of(other), self]) if len(other) else self

    def __repr__(self) -> str:
        return f"Trajectory(B={len(self)}, T={len(self._batch.records)})"

    # ------------------------------------------------------------------------------------------ tensors of the batch

    @property
    def tasks(self) -> Sequence[Any] | Tensor | None:
        """The labels given to ``Initialization``."""
        tasks = self._batch.tasks
        return tasks if tasks is None or self._rows is None else [tasks[i] for i in self._rows]

    def task_indices(self, device: torch.device) -> Tensor:
        """[B] int64: the labels as indices. ValueError without labels, TypeError where one is no integer."""
        made = self._batch.task_tensor(device)
        return made if self._rows is None else made[self._index(device)]

    def _index(self, device: torch.device) -> Tensor:
        return torch.tensor(self._rows, device=device, dtype=torch.int64)

    def _written(self, device: torch.device) -> Tensor:
        """The same, where something of each sample is to be kept."""
        rows: list[int] = self._rows or []
        if len(set(rows)) < len(rows):
            twice = next(row for n, row in enumerate(rows) if row in rows[:n])
            raise ValueError(f"meta: expected each sample once in what is decided for, got sample {twice} twice")
        return self._index(device)

    @property
    def records(self) -> list[Record]:
        if self._rows is None:
            return self._batch.records
        return [r.take(self._index(r.actions.device)) for r in self._batch.records]

    @property
    def mixtures(self) -> list[Mixture]:
        if self._rows is None:
            return self._batch.mixtures
        return [m.take(self._index(m.actions.device)) for m in self._batch.mixtures]

    def aux_losses(self) -> Tensor | None:
        """[B]: the gatings' balance and z-losses of each sample, whose mean is theirs over the batch; None without."""
        losses = [loss for m in self.mixtures for loss in m.losses.values()]
        self._batch.is_read |= len(losses) > 0
        return torch.stack(losses).sum(0) if losses else None

    @property
    def aux_loss(self) -> Tensor:
        """The gatings' balance and z-losses, to be added to the loss where no ``Loss`` does it; 0 without."""
        losses = self.aux_losses()
        return torch.zeros((), device="cpu") if losses is None else losses.mean() if self.size else losses.sum()

    def _stacked(self, of: Callable[[Record], Tensor], fill: float | None = None) -> Tensor:
        made = []
        for r in self.records:
            t = of(r)
            made.append(t if fill is None or r.active is None else torch.where(r.active, t, fill))
        return torch.stack(made) if made else torch.empty(0, len(self), dtype=torch.int64, device="cpu")

    @property
    def actions(self) -> Tensor:
        return self._stacked(lambda r: r.actions, -1)

    @property
    def agents(self) -> Tensor:
        return self._stacked(lambda r: torch.zeros_like(r.actions) if r.agents is None else r.agents, -1)

    @property
    def active(self) -> Tensor:
        return self._stacked(
            lambda r: torch.ones_like(r.actions, dtype=torch.bool) if r.active is None else r.active
        ).bool()

    @property
    def exploratory(self) -> Tensor:
        return self._stacked(lambda r: r.exploratory).bool()

    @property
    def final_reward(self) -> Tensor | None:
        """[B], once ``Loss`` has read the trajectory."""
        final = self._batch.final_reward
        return final if final is None or self._rows is None else final[self._index(final.device)]

    # ------------------------------------------------------------------------------------------ writing

    def record(self, record: Record) -> None:
        """Add a decision. Its tensors are those of this view's samples."""
        if record.actions.shape != (self.size,):
            raise ValueError(f"record: expected actions of shape [{self.size}], got {shown(record.actions)}")
        if self._rows is not None:
            record = record.spread(self._written(record.actions.device), self._batch.size)
        if not self._batch.is_again():
            self._batch.records.append(record)
            watching.tell(record.decision, "decision", self._batch, record)

    def mix(self, mixture: Mixture, given: Tensor | None = None) -> None:
        """Add what a gating did. Its tensors are those of this view's samples; ``given``: its actions as returned."""
        if mixture.actions.dim() != 2 or mixture.actions.shape[0] != self.size:
            raise ValueError(f"mix: expected actions of shape [{self.size}, k], got {shown(mixture.actions)}")
        actions = mixture.actions
        entry = Given.of(actions if given is None else given, actions), mixture.weights
        if self._batch.is_again():
            if self._batch.is_remixed_read:  # their graphs hold what was recomputed
                self._batch.remixed, self._batch.is_remixed_read = [], False
            self._batch.remixed.append(entry)
            return
        self._batch.mixed.append(entry)
        mixture.after = len(self._batch.records)
        if self._rows is not None:
            mixture = mixture.spread(self._written(mixture.actions.device), self._batch.size)
        self._batch.mixtures.append(mixture)
        watching.tell(mixture.decision, "mixture", self._batch, mixture)

    def weights_of(self, actions: Tensor) -> Tensor | None:
        """[B, k]: the weights that a gating gave with these very actions; None if there was no gating.

        Raises:
            ValueError: they are other actions, whose weights nobody knows.
        """
        for own, weights in reversed([*self._batch.mixed, *self._batch.remixed]):
            if own.is_still(actions):
                self._batch.is_remixed_read = True
                return weights
        k = actions.shape[1]  # [B, 1] may be a decision's
        if any(k > 1 or mixture.actions.shape[1] == 1 for mixture in self._batch.mixtures):
            raise ValueError(
                "weights: expected those of these actions, which are not a gating's own, or were changed since; pass "
                "weights= (ones for a plain sum)"
            )
        return None

    def plan_of(self, agents: Tensor, count: int) -> Plan:
        """Samples by agent, made once for all decisions that are given the same tensor [B]."""
        return self.dispatched(agents, count)[0]

    def dispatched(self, agents: Tensor, count: int) -> tuple[Plan, Tensor]:
        """:meth:`plan_of` agents [B], and a copy of them, which nobody changes."""
        if torch.compiler.is_compiling() or type(agents) is not Tensor or agents.is_inference():  # which has no version
            return dispatch.plan(agents, count, "agents"), agents.clone()
        for own, of, plan in self._batch.plans:
            if of == count and own.is_still(agents):
                return plan, own.copy
        plan, own = dispatch.plan(agents, count, "agents"), Given.of(agents, agents.clone())
        self._batch.plans.append((own, count, plan))
        return plan, own.copy

    def add_rewards(self, rewards: Tensor | Sequence[float]) -> None:
        """Add to the last decision's reward, for all samples: [B]; ``append("add_rewards", ...)`` in bulk.

        Raises:
            ValueError, TypeError: no decision was made yet; another shape; no numbers.
        """
        if not self._batch.records:
            raise ValueError("add_rewards: no decision was made yet")
        rewards = as_tensor("rewards", rewards, self._batch.records[-1].actions.device)
        if tuple(rewards.shape) != (len(self),):
            raise ValueError(f"rewards: expected shape [{len(self)}], got {shown(rewards)}")
        t = len(self._batch.records) - 1
        rewards = rewards.detach().clone()
        if self._rows is not None:
            rewards = spread(rewards, self._written(rewards.device), self._batch.size)
        have = self._batch.added.get(t)
        self._batch.added[t] = rewards if have is None else have + rewards

    def added_rewards(self, step: int, like: Tensor) -> Tensor | None:
        """[B]: what was added to the reward of a step, by :meth:`add_rewards` and by samples' ``append``; or None."""
        batch = self._batch
        total = batch.added.get(step)
        sparse = {b: e["add_rewards"] for (t, b), e in batch.extras.items() if t == step and "add_rewards" in e}
        if sparse:
            amounts = torch.stack(
                [torch.as_tensor(v, dtype=like.dtype, device=like.device).detach().sum() for v in sparse.values()]
            )
            rows = torch.tensor(list(sparse), device=like.device)
            # a sample's own entry stands for the whole step, as its dict shows it
            total = like.new_zeros(batch.size) if total is None else total.to(like)
            total = total.index_copy(0, rows, amounts)
        return total if total is None or self._rows is None else total[self._index(total.device)]

    def check_foreign(self) -> None:
        """ValueError if a sample has steps that no decision made: nothing says what they should learn."""
        if not self._batch.foreign:  # before the size is looked at, which torch.compile would take for a constant
            return
        for b in range(self._batch.size) if self._rows is None else self._rows:
            for _, step in self._batch.foreign.get(b, ()):
                raise ValueError(
                    f"meta: sample {b} has a step that no decision recorded (with {', '.join(step)}); "
                    "append to a decision's step instead"
                )

    def finish(self, final_reward: Tensor) -> None:
        """Note the final rewards [B], from when on samples' steps are attributes."""
        if self._rows is not None:
            final_reward = spread(final_reward, self._index(final_reward.device), self._batch.size)
        self._batch.final_reward = final_reward
        self._batch.is_read |= any(getattr(r.law, "algorithm", None) != SILENT for r in self._batch.records)

    def point_to(self, modules: Any) -> None:
        """Have the last step of every sample name the module that its action chose (``selected_modules``)."""
        if self._batch.records and not self._batch.is_again():
            rows = None if self._rows is None else frozenset(self._rows)
            self._batch.pointers.append((len(self._batch.records), rows, modules))

    def summary(self) -> Summary:
        """Per layer: how often each task took each module, entropy, distinct routes, and a warning of collapse."""
        from .summary import summarize

        return summarize(self)


def index_list(index: Tensor) -> list[int]:
    """The numbers of a small index that a user wrote."""
    return [int(i) for i in index.reshape(-1)]


def _joined(parts: Sequence[Trajectory]) -> Trajectory:
    """One trajectory with the samples of several: a view if they are of one batch, else a new batch."""
    parts = [p for p in parts if len(p)] or list(parts[:1])
    batches = list(dict.fromkeys(p._batch for p in parts))
    if not parts:
        return Trajectory(0)
    if len(batches) == 1:
        rows = [row for p in parts for row in (range(len(p)) if p._rows is None else p._rows)]
        return Trajectory._view(batches[0], rows)
    size = sum(map(len, parts))
    tasks = None if all(p.tasks is None for p in parts) else [s.task for p in parts for s in p]
    made = Trajectory(size, tasks)
    batch, start = made._batch, 0
    for part in parts:
        own_rows = range(start, start + len(part))
        offset = len(batch.records)
        for record in part.records:
            device = record.actions.device
            batch.records.append(record.spread(torch.arange(own_rows.start, own_rows.stop, device=device), size))
        for mixture in part.mixtures:
            device = mixture.actions.device
            batch.mixtures.append(mixture.spread(torch.arange(own_rows.start, own_rows.stop, device=device), size))
            batch.mixtures[-1].after += offset
        for count, of, modules in part._batch.pointers:
            there = (new for new, s in zip(own_rows, part, strict=True) if of is None or s._index in of)
            batch.pointers.append((offset + count, frozenset(there), modules))
        for new, sample in zip(own_rows, part, strict=True):
            old = sample._index
            for (t, b), extra in part._batch.extras.items():
                if b == old:
                    batch.extras[offset + t, new] = extra
            if old in part._batch.foreign:
                batch.foreign[new] = [(offset + t, step) for t, step in part._batch.foreign[old]]
            if part._batch.size == 1:  # made by the user, who keeps the sample: it follows the new batch
                batch.samples[new], part._batch.is_left = sample, True
        for t, added in part._batch.added.items():
            own = added if part._rows is None else added[part._index(added.device)]
            batch.added[offset + t] = spread(own, torch.arange(own_rows.start, own_rows.stop, device=own.device), size)
        start = own_rows.stop
    for new, sample in batch.samples.items():
        sample._batch, sample._index = batch, new
    return made
