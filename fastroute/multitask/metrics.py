"""How well tasks are learned: metrics gathered batch by batch, and their change against single-task models.

Axes: T tasks, B samples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.names import TakenNames
from ..ops.accumulating import Accumulating
from ..ops.arguments import Count, checked
from ..ops.checks import are_alike, given
from . import labels
from .weighting.base import in_order, unknown

#: The class that is predicted by a score of NaN.
_NONE = -1


class Metric(TakenNames, Accumulating):
    """A number made of sums over batches. ``update`` reads nothing from the device; ``compute`` gives a tensor."""

    higher_is_better = True

    def forward(self, y_hat: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """The same as ``update``."""
        self.update(y_hat, y, mask)

    def update(self, y_hat: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            y_hat: predictions.
            y: labels, of the predictions' shape but for axes of one element; NaN, and whatever the metric ignores, is
                left out.
            mask: bool of the labels' shape or [B], True where there is one.
        """
        raise NotImplementedError

    def compute(self) -> Tensor:
        """The metric of all batches so far; NaN before the first label."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all batches."""
        for buffer in self.buffers():
            buffer.zero_()

    def reset_parameters(self) -> None:
        """The same as ``reset``."""
        self.reset()

    def _sum(self, name: str, size: Sequence[int] = ()) -> None:
        self.register_buffer(name, torch.zeros(tuple(size), dtype=torch.float64), persistent=False)


def _binary(
    y_hat: Tensor, y: Tensor, mask: Tensor | None, ignore_index: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(predicted class, true class, which labels are there) of scores and labels 0 or 1 of one shape."""
    y = labels.like(y_hat, y)
    y = y if y.is_floating_point() else y.long()  # which has the negative numbers below
    there = labels.known(y, None if mask is None else labels.spread(mask, y), ignore_index)
    labels.refuse(there & ((y < -1) | (y > 1)), y, "labels 0 or 1")  # or -1 and 1, as a soft margin has them
    return torch.where(y_hat.isnan(), _NONE, (y_hat > threshold).long()), (y > 0.5).long(), there


def _classes(y_hat: Tensor, y: Tensor, mask: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of scores [B, C, ...] and classes [B, ...] or class probabilities [B, C, ...]."""
    scores, true, mask = labels.classes(y_hat, y, mask)
    there = labels.known(true, None, ignore_index)
    if true.is_floating_point():
        there, true = there.all(1), true.argmax(1)
    there = there if mask is None else there & mask
    labels.refuse(there & ((true < 0) | (true >= scores.shape[1])), true, f"classes below {scores.shape[1]}")
    return torch.where(scores.isnan().any(1), _NONE, scores.argmax(1)), true, there


def _are_probabilities(y: Tensor, there: Tensor) -> Tensor:
    """Whether labels [B, C, ...] are class probabilities: not all 0 or 1, and 1 in sum, as rounded in bfloat16."""
    within = there & (y > 0) & (y < 1)
    off = (y.float().sum(1) - 1).abs()
    return within.any() & ((off <= 0.01) | ~there.all(1)).all()


class _Classification(Metric):
    """A metric of predicted classes.

    Args:
        classes: C, for scores [B, C, ...].
        ignore_index: a label that is none.
        threshold: what a score of class 1 is above, where there is no score per class; None is 0.
    """

    _most: float = math.inf  #: how many classes there may be without ``classes``

    def __init__(self, classes: int | None, ignore_index: int, threshold: float | None) -> None:
        super().__init__()
        self.classes, self.ignore_index, self.threshold = classes, ignore_index, threshold

    def _read(self, y_hat: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(predicted class, true class, which labels are there)."""
        labels.tensors(y_hat, y, mask)
        C = y_hat.shape[min(1, y_hat.dim() - 1)] if y_hat.dim() else 1
        if self.classes == C and y_hat.shape == y.shape and y_hat.dim() > 1:
            y = y.to(torch.promote_types(y.dtype, torch.bfloat16))  # one-hot ones may be integers
        elif are_alike(y_hat, y):
            return _binary(y_hat, y, mask, self.ignore_index, self.threshold or 0.0)
        elif self.classes not in (None, C):
            raise ValueError(f"y_hat: expected scores [B, {self.classes}, ...], got {labels.shown(y_hat)}")
        elif self.classes is None and self._most < C:
            raise ValueError(f"classes: expected {C}, for scores {labels.shown(y_hat)}, got None")
        return _classes(y_hat, y, mask, self.ignore_index)


class Accuracy(_Classification):
    """The share of labels that were predicted.

    The prediction is the largest of scores [B, C, ...], for labels that are classes [B, ...] or class probabilities
    [B, C, ...]; or whether a score is above ``threshold``, for labels 0 or 1 of the same shape. A score of NaN predicts
    nothing.

    Labels of the scores' shape are class probabilities if a batch of them is not all 0 or 1 and every row sums to 1.
    With ``classes`` they always are, one-hot ones too; with ``threshold`` alone they never are.

    Args:
        ignore_index: a label that is none.
        classes: C, for scores [B, C, ...].
        threshold: 0 for logits, as without it; 0.5 for probabilities, of a head that ends in Sigmoid.

    Examples:
        >>> accuracy = fastroute.multitask.Accuracy()
        >>> accuracy.update(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
        >>> float(accuracy.compute())
        0.5
    """

    right: Tensor
    count: Tensor

    @checked
    def __init__(
        self, ignore_index: int = -100, *, classes: Count | None = None, threshold: float | None = None
    ) -> None:
        super().__init__(classes, ignore_index, threshold)
        self._sum("right")
        self._sum("count")

    @torch.no_grad()
    def update(self, y_hat: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of scores [B, C, ...] and classes [B, ...], or of scores and 0 or 1."""
        predicted, true, there = self._read(y_hat, y, mask)
        right, count = (there & (predicted == true)).sum(), there.sum()
        if self.threshold is None and there.shape == y_hat.shape and y_hat.dim() > 1 and y.is_floating_point():
            y = labels.like(y_hat, y)
            soft = _are_probabilities(y, there)
            predicted, true, there = _classes(y_hat, y, there, self.ignore_index)
            right = torch.where(soft, (there & (predicted == true)).sum(), right)
            count = torch.where(soft, there.sum(), count)
        self.right += right
        self.count += count

    def compute(self) -> Tensor:
        """Between 0 and 1."""
        return self.right / self.count


class F1(_Classification):
    """2 TP / (2 TP + FP + FN): of class 1 for scores and 0 or 1; with ``classes``, its mean over the classes.

    A class that was neither predicted nor there counts 0, as in scikit-learn. A score of NaN predicts nothing.

    Args:
        classes: C, for scores [B, C, ...] and classes [B, ...] or class probabilities [B, C, ...]; it may be left out
            where C is 2.
        ignore_index: a label that is none.
        threshold: 0 for logits, as without it; 0.5 for probabilities, of a head that ends in Sigmoid.

    Examples:
        >>> f1 = fastroute.multitask.F1()
        >>> f1.update(torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1.0, 0.0, 0.0]))  # scores, and labels 0 or 1
        >>> round(float(f1.compute()), 3)
        0.667
    """

    _most = 2
    hits: Tensor
    predicted: Tensor
    true: Tensor
    count: Tensor

    @checked
    def __init__(
        self, classes: Count | None = None, ignore_index: int = -100, *, threshold: float | None = None
    ) -> None:
        super().__init__(classes, ignore_index, threshold)
        for name in ("hits", "predicted", "true"):
            self._sum(name, [classes or 2])
        self._sum("count")

    @torch.no_grad()
    def update(self, y_hat: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of scores [B, C, ...] and classes [B, ...], or of scores and 0 or 1."""
        predicted, true, there = (t.flatten() for t in self._read(y_hat, y, mask))
        kinds = torch.arange(self.hits.shape[0], device=there.device)[:, None]
        p, t = ((c == kinds) & there for c in (predicted, true))
        self.hits += (p & t).sum(1)
        self.predicted += p.sum(1)
        self.true += t.sum(1)
        self.count += there.sum()

    def compute(self) -> Tensor:
        """Between 0 and 1."""
        each = 2 * self.hits / (self.predicted + self.true).clamp_min(1)
        f1 = each.mean() if self.classes else each[1]
        return torch.where(self.count > 0, f1, torch.nan)


class L1(Metric):
    """The mean of |prediction - label|.

    Examples:
        >>> l1 = fastroute.multitask.L1()
        >>> l1.update(torch.tensor([1.0, 5.0]), torch.tensor([2.0, float("nan")]))
        >>> float(l1.compute())
        1.0
    """

    higher_is_better = False
    error: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._sum("error")
        self._sum("count")

    @torch.no_grad()
    def update(self, y_hat: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of predictions and labels of one shape."""
        labels.tensors(y_hat, y, mask)
        y = labels.like(y_hat, y)
        there = labels.known(y, None if mask is None else labels.spread(mask, y))
        off = (y_hat.to(self.error.dtype) - y.to(self.error.dtype)).abs()
        self.error += torch.where(there, off, 0).sum()
        self.count += there.sum()

    def compute(self) -> Tensor:
        """In the labels' unit."""
        return self.error / self.count


def _key(task: str) -> str:
    """A task's name as a part of the keys of a state dict, which a dot would end; a number is none."""
    return f"[{task}]".replace("%", "%25").replace(".", "%2E")


class TaskMetrics(TakenNames, nn.Module):
    """A metric per task, with NaN and masked labels left out.

    Args:
        metrics: by task: an ``Accuracy``, ``F1`` or ``L1``, or any object with ``update(y_hat, y)``, ``compute()`` and
            ``reset()``, as those of torchmetrics (which see labels as they are: mask nothing there).

    Examples:
        >>> metrics = fastroute.TaskMetrics({"kind": fastroute.multitask.Accuracy(), "price": fastroute.multitask.L1()})
        >>> scores, price = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0], [3.0]])
        >>> labels = {"kind": torch.tensor([1, 1]), "price": torch.tensor([[2.0], [float("nan")]])}
        >>> metrics.update({"kind": scores, "price": price}, labels)
        >>> {task: float(value) for task, value in metrics.compute().items()}
        {'kind': 0.5, 'price': 1.0}
    """

    @checked
    def __init__(self, metrics: Mapping[str, Any]) -> None:
        super().__init__()
        if not metrics:
            raise ValueError("metrics: expected one for a task at least, got none")
        for name, metric in metrics.items():
            methods = (getattr(metric, method, None) for method in ("update", "compute", "reset"))
            if isinstance(metric, type) or not all(map(callable, methods)):
                raise TypeError(f"metrics[{name!r}]: expected a metric, got {given(metric)}")
        self.tasks = tuple(metrics)
        self._metrics = list(metrics.values())
        self._modules_of = nn.Module()
        for name, metric in metrics.items():
            if isinstance(metric, nn.Module):
                self._modules_of._modules[_key(name)] = metric

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Those of a state that numbers them go by position."""
        for number, name in enumerate(self._modules_of._modules):
            start = f"{prefix}_modules_of.{number}."
            for key in [key for key in state_dict if key.startswith(start)]:
                state_dict[f"{prefix}_modules_of.{name}.{key[len(start) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getitem__(self, task: str) -> Any:
        if task not in self.tasks:
            raise unknown("task", task, self.tasks)
        return self._metrics[self.tasks.index(task)]

    @torch.no_grad()
    def update(
        self,
        y_hat: Mapping[str, Tensor] | Sequence[Tensor],
        y: Mapping[str, Tensor | None] | Sequence[Tensor | None],
        mask: Mapping[str, Tensor | None] | Sequence[Tensor | None] | None = None,
    ) -> None:
        """Add a batch: dicts by task, or lists in the order of ``metrics``. A target of None is left out."""
        masks = [None] * len(self.tasks) if mask is None else in_order("mask", mask, self.tasks)
        pairs = (in_order(n, v, self.tasks) for n, v in (("y_hat", y_hat), ("y", y)))
        for metric, guess, label, there in zip(self._metrics, *pairs, masks, strict=True):
            if guess is None or label is None:
                continue
            if isinstance(metric, Metric):
                metric.update(guess, label, there)
            else:
                metric.update(guess, label)

    def compute(self) -> dict[str, Tensor]:
        """Each task's metric."""
        return {name: metric.compute() for name, metric in zip(self.tasks, self._metrics, strict=True)}

    def reset(self) -> None:
        """Forget all batches."""
        for metric in self._metrics:
            metric.reset()


@checked
def relative_improvement(
    metrics: Mapping[str, float | Tensor | Sequence[float]],
    baselines: Mapping[str, float | Tensor | Sequence[float]],
    higher_is_better: Mapping[str, bool | Sequence[bool]] | bool = True,
) -> float:
    """Delta m (Maninis, Radosavovic and Kokkinos 2019): the mean over tasks of (m_t - b_t) / b_t, more being better.

    Where less is better the sign is turned. A task with several metrics counts once, by their mean. 0.02 is 2 % better
    than the single-task models.

    Args:
        metrics: of the multi-task model, by task: a number, or several.
        baselines: of single-task models, likewise.
        higher_is_better: by task, or for all; of a task's several metrics one for all or one each.

    Raises:
        ValueError: tasks differ, or how many metrics they have; a baseline is 0.

    Examples:
        >>> round(fastroute.relative_improvement({"a": 0.9, "b": 0.5}, {"a": 0.6, "b": 0.5}), 3)
        0.25
    """
    tasks = list(baselines)
    if not tasks:
        raise ValueError("baselines: expected one for a task at least, got none")
    for name, by_task in (("metrics", metrics), ("higher_is_better", higher_is_better)):
        if isinstance(by_task, Mapping):
            in_order(name, by_task, tasks)
            missing = [task for task in tasks if task not in by_task]
            if missing:
                raise ValueError(f"{name}: expected one for {missing[0]!r}, got none")
    changes = []
    for task in tasks:
        base, got = (
            torch.as_tensor(v[task], dtype=torch.float64, device="cpu").reshape(-1) for v in (baselines, metrics)
        )
        better = higher_is_better[task] if isinstance(higher_is_better, Mapping) else higher_is_better
        signs = [better] * len(base) if isinstance(better, bool) else list(better)
        if len(base) != len(got):
            raise ValueError(f"metrics[{task!r}]: expected {len(base)} as in the baselines, got {len(got)}")
        if len(signs) != len(base) or not all(isinstance(sign, bool) for sign in signs):
            raise ValueError(f"higher_is_better[{task!r}]: expected a bool, or one for each metric, got {better!r}")
        each = []
        for b, m, sign in zip(map(float, base), map(float, got), signs, strict=True):
            if b == 0:
                raise ValueError(f"baselines[{task!r}]: expected a number other than 0")
            each.append((m - b) / abs(b) * (1 if sign else -1))
        changes.append(sum(each) / len(each))
    return sum(changes) / len(changes)
