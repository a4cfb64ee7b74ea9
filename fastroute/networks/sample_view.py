"""One sample of a batch, as upstream's functions see it: a dict per decision, made on demand.

Axes: K choices of a decision.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

from ..ops.checks import given
from .recorded_batch import RecordedBatch

#: What decisions record in a step, and how to have something else there.
_RECORDED = {
    "actions": "give the decision forced_actions=",
    "is_exploratory": "make a decision of your own",
    "states": "make a decision of your own",
    "loss_funcs": "make a decision with a loss of its own",
    "reward_func": "set the decision's additional_reward_func, or write add_rewards",
}


def _reward(value: Any) -> Any:
    """What may be added to a step's reward: as it was when it was given."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    try:
        torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"add_rewards: expected a number or a tensor, got {given(value)}") from error
    return value


class _Step(dict[str, Any]):
    """What is in a sample's step; what is written into it goes where :meth:`SampleMetaInformation.append` writes."""

    def __init__(self, sample: SampleMetaInformation, record: int, found: dict[str, Any]) -> None:
        super().__init__(found)
        self._sample, self._record = sample, record

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, self._sample._write(self._record, name, value))

    def __delitem__(self, name: str) -> None:
        self._sample._check_own(name)
        batch, b = self._sample._batch, self._sample._index
        super().__delitem__(name)
        batch.extras.get((self._record, b), {}).pop(name, None)
        if name == "add_rewards" and self._record in batch.added:
            batch.extras.setdefault((self._record, b), {})[name] = 0.0  # in the place of the whole batch's

    def __ior__(self, other: Any) -> _Step:  # type: ignore[override,misc]
        self.update(other)
        return self

    update, setdefault = MutableMapping.update, MutableMapping.setdefault  # type: ignore[assignment]
    pop, popitem, clear = MutableMapping.pop, MutableMapping.popitem, MutableMapping.clear  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _refused(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise TypeError(
        "steps: expected no change to this list, which is made anew each time; begin a step by "
        "append(name, value, new_step=True)"
    )


class _Steps(list[dict[str, Any]]):
    """The steps of a sample; a change to the list would be lost, so there is none."""

    append = extend = insert = pop = remove = clear = sort = reverse = _refused
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refused  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return list, (list(self),)


class SampleMetaInformation:
    """One sample's history: its task, and a dict per decision made for it.

    What a :class:`Trajectory` gives for ``trajectory[b]``. The dicts are made when looked at, from the batch's tensors:
    ``actions`` (0-d int64), ``is_exploratory`` (0-d uint8), ``states`` ([1, K, 5], with its gradient), ``loss_funcs``,
    ``reward_func``, and what was appended.

    Args:
        task: the label.

    Examples:
        >>> sample = fastroute.SampleMetaInformation(task=3)
        >>> sample.append("add_rewards", -0.1, new_step=True)
        >>> sample.task, sample.steps
        (3, [{'add_rewards': -0.1}])
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("append", "finalize", "steps"):
            if name in cls.__dict__:
                raise TypeError(
                    f"{cls.__name__}.{name}: expected no override of what decisions and Loss do not call, for they "
                    "write whole batches; read the samples' steps afterwards"
                )

    def __init__(self, task: Any = None) -> None:
        batch = RecordedBatch(1, [task])
        batch.samples[0] = self
        self._batch, self._index, self._is_final = batch, 0, False

    @classmethod
    def _of(cls, batch: RecordedBatch, index: int) -> SampleMetaInformation:
        if index not in batch.samples:
            made = cls.__new__(cls)
            made._batch, made._index, made._is_final = batch, index, False
            batch.samples[index] = made
        return batch.samples[index]

    @property
    def task(self) -> Any:
        """The label given to ``Initialization``, None if there was none."""
        tasks = self._batch.tasks
        return None if tasks is None else tasks[self._index]

    @task.setter
    def task(self, value: Any) -> None:
        batch = self._batch
        tasks = [None] * batch.size if batch.tasks is None else list(batch.tasks)
        tasks[self._index] = value
        batch.tasks, batch._task_tensor = tasks, None

    @property
    def steps(self) -> list[dict[str, Any]]:
        """A dict per decision, first one first. What is written into one is as if by :meth:`append`.

        Raises:
            TypeError: the list itself is changed, or what a decision recorded.
        """
        return _Steps(step for _, step in self._steps())

    @steps.setter
    def steps(self, value: Any) -> None:
        _refused(self)

    def _steps(self) -> list[tuple[int, dict[str, Any]]]:
        batch, b = self._batch, self._index
        foreign, pointed = list(batch.foreign.get(b, ())), batch.pointed(b)
        made: list[tuple[int, dict[str, Any]]] = []
        for t, record in enumerate(batch.records):
            while foreign and foreign[0][0] <= t:
                made.append((-1, foreign.pop(0)[1]))
            if not batch.is_active(t, b):
                continue
            step = {
                "actions": record.actions[b],
                "is_exploratory": record.exploratory[b].to(torch.uint8),
                "states": record.take(torch.tensor([b], device=record.actions.device)).states(),
                "loss_funcs": record.law.loss_func,
                "reward_func": record.reward,
            }
            if t in pointed:
                step["selected_modules"] = pointed[t][int(record.actions[b])]
            if t in batch.added:
                step["add_rewards"] = batch.added[t][b]
            step.update(batch.extras.get((t, b), {}))
            made.append((t, _Step(self, t, step)))
        return made + [(-1, step) for _, step in foreign]

    @property
    def mixtures(self) -> list[dict[str, Any]]:
        """A dict per top-k gating, first one first: ``actions`` and ``weights``, [k] each. No steps: no reward."""
        b = self._index
        here = [m for m in self._batch.mixtures if m.active is None or bool(m.active[b])]
        return [{"actions": m.actions[b], "weights": m.weights[b]} for m in here]

    def append(self, attr_name: str, obj: Any, new_step: bool = False) -> None:
        """Write ``obj`` under a name into the sample's last step, or into a new one.

        ``add_rewards`` (a number or a tensor with one) is added to that step's reward by ``Loss``.

        Raises:
            ValueError: there is no step to write into.
            TypeError: a name that a decision recorded itself, such as ``actions``; an ``add_rewards`` without numbers.
        """
        batch, b = self._batch, self._index
        if attr_name == "add_rewards":
            obj = _reward(obj)
        foreign = batch.foreign.setdefault(b, [])
        if new_step:
            foreign.append((len(batch.records), {attr_name: obj}))
            return
        last = next((t for t in reversed(range(len(batch.records))) if batch.is_active(t, b)), -1)
        if foreign and foreign[-1][0] > last:
            foreign[-1][1][attr_name] = obj
        elif last < 0:
            raise ValueError(f"append({attr_name!r}): no decision was made for this sample yet; pass new_step=True")
        else:
            self._write(last, attr_name, obj)

    @staticmethod
    def _check_own(name: str) -> None:
        if name in _RECORDED:
            raise TypeError(
                f"{name}: expected no change to what a decision recorded, which would have no effect; {_RECORDED[name]}"
            )

    def _write(self, record: int, name: str, value: Any) -> Any:
        """Into the step of a record: the value as it is kept."""
        self._check_own(name)
        value = _reward(value) if name == "add_rewards" else value
        self._batch.extras.setdefault((record, self._index), {})[name] = value
        return value

    def finalize(self) -> None:
        """Make every name of the steps an attribute: a list with one entry per step, None where a step lacks it."""
        self._is_final = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        final = self._batch.final_reward
        if name == "final_reward" and final is not None:
            return final[self._index]
        if self._is_final or final is not None:
            steps = self.steps
            if any(name in step for step in steps):
                return [step.get(name) for step in steps]
            if name == "add_rewards":
                return [0.0] * len(steps)
            names = ", ".join(sorted({key for step in steps for key in step}))
            raise AttributeError(f"no step of this sample has {name!r}; they have: {names or 'nothing'}")
        raise AttributeError(f"{name!r}: steps become attributes after finalize()")

    def __repr__(self) -> str:
        return f"SampleMetaInformation(task={self.task!r}, steps={len(self.steps)})"
