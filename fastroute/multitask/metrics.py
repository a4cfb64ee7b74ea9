"""How well tasks are learned: metrics gathered batch by batch, and their change against single-task models.

Axes: T tasks, B samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .weighting.base import in_order, unknown


class Metric(nn.Module):
    """A number made of sums over batches. ``update`` reads nothing from the device; ``compute`` gives a tensor."""

    higher_is_better = True

    def forward(self, y_hat: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """The same as ``update``."""
        self.update(y_hat, y, mask)

    def update(self, y_hat: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            y_hat: predictions.
            y: labels; NaN, and whatever the metric ignores, is left out.
            mask: bool of the labels' shape, True where there is one.
        """
        raise NotImplementedError

    def compute(self) -> Tensor:
        """The metric of all batches so far; NaN before the first label."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all batches."""
        for buffer in self.buffers():
            buffer.zero_()

    def _sum(self, name: str, size: Sequence[int] = ()) -> None:
        self.register_buffer(name, torch.zeros(tuple(size), dtype=torch.float64), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Sums follow the model to a device, but stay float64 where that exists: they are made of many small parts."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype and new.device.type != "mps":
                self._buffers[name] = old.to(new.device)
        return self


def _there(y: Tensor, mask: Tensor | None, ignore_index: int | None = None) -> Tensor:
    there = ~y.isnan() if y.is_floating_point() else torch.ones_like(y, dtype=torch.bool)
    if ignore_index is not None:
        there = there & (y != ignore_index)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {mask.dtype}")
        there = there & mask.reshape(there.shape)
    return there


def _classes(y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(predicted, true) classes of scores [B, C, ...] and indices [B, ...], or of logits and 0 or 1 of one shape."""
    if y_hat.shape == y.shape or y_hat.numel() == y.numel():
        return (y_hat > 0).long().reshape(y.shape), y
    if y_hat.dim() == y.dim() and y.shape[1] == 1:
        y = y.squeeze(1)
    if (*y_hat.shape[:1], *y_hat.shape[2:]) != tuple(y.shape):
        raise ValueError(f"y: expected labels for scores {list(y_hat.shape)}, got {list(y.shape)}")
    return y_hat.argmax(1), y


class Accuracy(Metric):
    """The share of labels that were predicted: argmax of scores [B, C, ...], or logits above 0.

    Args:
        ignore_index: a label that is none.
    """

    right: Tensor
    count: Tensor

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self._sum("right")
        self._sum("count")

    @torch.no_grad()
    def update(self, y_hat: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of scores [B, C, ...] and classes [B, ...], or of logits and 0 or 1."""
        predicted, true = _classes(y_hat, y)
        there = _there(true, None if mask is None else mask, self.ignore_index)
        self.right += (there & (predicted == true)).sum()
        self.count += there.sum()

    def compute(self) -> Tensor:
        """Between 0 and 1."""
        return self.right / self.count


class F1(Metric):
    """2 TP / (2 TP + FP + FN): of class 1 for logits and 0 or 1; with ``classes``, its mean over the classes.

    A class that was neither predicted nor there counts 0, as in scikit-learn.

    Args:
        classes: C, for scores [B, C, ...].
        ignore_index: a label that is none.
    """

    hits: Tensor
    predicted: Tensor
    true: Tensor
    count: Tensor

    def __init__(self, classes: int | None = None, ignore_index: int = -100) -> None:
        super().__init__()
        self.classes, self.ignore_index = classes, ignore_index
        for name in ("hits", "predicted", "true"):
            self._sum(name, [classes or 2])
        self._sum("count")

    @torch.no_grad()
    def update(self, y_hat: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of scores [B, C, ...] and classes [B, ...], or of logits and 0 or 1."""
        predicted, true = _classes(y_hat, y)
        there = _there(true, mask, self.ignore_index).flatten()
        kinds = torch.arange(self.hits.shape[0], device=there.device)[:, None]
        p, t = ((c.flatten() == kinds) & there for c in (predicted, true))
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
    """The mean of |prediction - label|."""

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
        if y_hat.numel() != y.numel():
            raise ValueError(f"y: expected the prediction's shape {list(y_hat.shape)}, got {list(y.shape)}")
        there = _there(y, mask)
        off = (y_hat.reshape(y.shape).to(self.error.dtype) - y.to(self.error.dtype)).abs()
        self.error += torch.where(there, off, 0).sum()
        self.count += there.sum()

    def compute(self) -> Tensor:
        """In the labels' unit."""
        return self.error / self.count


class TaskMetrics(nn.Module):
    """A metric per task, with NaN and masked labels left out.

    Args:
        metrics: by task: an ``Accuracy``, ``F1`` or ``L1``, or any object with ``update(y_hat, y)``, ``compute()`` and
            ``reset()``, as those of torchmetrics (which see labels as they are: mask nothing there).
    """

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        super().__init__()
        if not metrics:
            raise ValueError("metrics: expected one for a task at least, got none")
        for name, metric in metrics.items():
            if not all(callable(getattr(metric, method, None)) for method in ("update", "compute", "reset")):
                raise TypeError(f"metrics[{name!r}]: expected a metric, got {type(metric).__name__}")
        self.tasks = tuple(metrics)
        self._metrics = list(metrics.values())
        self._modules_of = nn.ModuleList(m for m in self._metrics if isinstance(m, nn.Module))

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
        given = (in_order(n, v, self.tasks) for n, v in (("y_hat", y_hat), ("y", y)))
        for metric, guess, label, there in zip(self._metrics, *given, masks, strict=True):
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
    """
    tasks = list(baselines)
    if not tasks:
        raise ValueError("baselines: expected one for a task at least, got none")
    for name, given in (("metrics", metrics), ("higher_is_better", higher_is_better)):
        if isinstance(given, Mapping):
            in_order(name, given, tasks)
            missing = [task for task in tasks if task not in given]
            if missing:
                raise ValueError(f"{name}: expected one for {missing[0]!r}, got none")
    changes = []
    for task in tasks:
        base, got = (torch.as_tensor(v[task], dtype=torch.float64).reshape(-1) for v in (baselines, metrics))
        better = higher_is_better[task] if isinstance(higher_is_better, Mapping) else higher_is_better
        signs = [better] * len(base) if isinstance(better, bool) else list(better)
        if len(base) != len(got) or len(signs) != len(base):
            raise ValueError(f"metrics[{task!r}]: expected {len(base)} as in the baselines, got {len(got)}")
        each = []
        for b, m, sign in zip(map(float, base), map(float, got), signs, strict=True):
            if b == 0:
                raise ValueError(f"baselines[{task!r}]: expected a number other than 0")
            each.append((m - b) / abs(b) * (1 if sign else -1))
        changes.append(sum(each) / len(each))
    return sum(changes) / len(changes)
