"""What the router did: a report of a trajectory.

Axes: T decisions, A tasks (or agents, or none: one row), K modules.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import given
from .decision_record import Mixture, Record
from .trajectory import Trajectory

COLLAPSE = 0.95  #: a layer that sends so much of several tasks' samples to one module has collapsed


@dataclass(frozen=True)
class LayerSummary:
    """One decision."""

    name: str
    counts: Tensor  #: [A, K] int64, how often each task took each module (of a mixture: entries)
    entropy: float  #: of the modules' shares, in bits: 0 (one module) to log2 K
    task_entropy: float  #: the same within a task, the mean over tasks weighted by samples
    used: int  #: modules that were taken
    collapsed: bool  #: several modules, and one (of a mixture: k) of them takes nearly everything
    per_sample: int = 1  #: k, the modules that a sample takes


@dataclass(frozen=True)
class Summary:
    """A batch's routing; prints as a table.

    Examples:
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8), tasks=["a", "b", "b", "a"])
        >>> h, meta, actions = fastroute.REINFORCE(2, 8)(h, meta, agents)
        >>> summary = meta.summary()
        >>> summary.samples, summary.layers[0].counts.shape, summary.tasks
        (4, torch.Size([2, 2]), ['a', 'b'])
    """

    layers: list[LayerSummary]
    tasks: list[Any]  #: the labels of the counts' rows
    samples: int
    routes: int  #: distinct sequences of actions (of a mixture: of sets of them)

    @property
    def collapsed(self) -> list[int]:
        """The layers that collapsed."""
        return [t for t, layer in enumerate(self.layers) if layer.collapsed]

    def __str__(self) -> str:
        lines = [f"{self.samples} samples, {len(self.tasks)} tasks, {self.routes} distinct routes"]
        for t, layer in enumerate(self.layers):
            A, K = layer.counts.shape
            lines.append(
                f"decision {t} ({layer.name}): {layer.used} of {K} modules, entropy {layer.entropy:.2f} of "
                f"{math.log2(K) if K > 1 else 0:.2f} bits, within a task {layer.task_entropy:.2f}"
            )
            width = max(5, len(str(int(layer.counts.max()))) + 1 if layer.counts.numel() else 5)
            lines.append(" " * 12 + "".join(f"{k:>{width}}" for k in range(K)))
            for a in range(A):
                label = f"task {self.tasks[a]}"[:12]
                lines.append(f"{label:<12}" + "".join(f"{int(n) or '.':>{width}}" for n in layer.counts[a]))
        for t in self.collapsed:
            one = "one module. More exploration, a smaller learning rate for decisions, or a collaboration reward"
            if (k := self.layers[t].per_sample) > 1:
                one = f"{k} modules. A larger balance loss, or bias_balancing,"
            lines.append(
                f"warning: decision {t} sends {COLLAPSE:.0%} or more of its samples to {one} may keep the others alive."
            )
        return "\n".join(lines)


def _entropy(counts: Tensor) -> Tensor:
    share = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(-1) / math.log(2)


def _key(label: Any) -> Any:
    """What tells a task label from others: of a tensor its number."""
    if isinstance(label, Tensor) and label.numel() == 1 and not label.is_complex():
        return float(label) if label.is_floating_point() and bool(label % 1 != 0) else int(label)
    if isinstance(label, Tensor) or not isinstance(label, Hashable):
        raise TypeError(f"tasks: expected labels that can be told apart by their hash, got {given(label)}")
    return label


def summarize(trajectory: Trajectory) -> Summary:
    """See :meth:`Trajectory.summary`."""
    labels = trajectory.tasks
    keys = [_key(x) for x in labels] if labels is not None else [None] * len(trajectory)
    try:
        tasks = sorted(set(keys))  # type: ignore[type-var]
    except TypeError:
        tasks = list(dict.fromkeys(keys))
    tasks = tasks or [None]  # the one row of no samples
    row = torch.tensor([tasks.index(k) for k in keys], dtype=torch.int64, device="cpu")
    layers = []
    routes: list[Tensor] = []
    for record in _in_order(trajectory):
        actions = record.actions.detach().to("cpu")
        actions = actions[:, None] if actions.dim() == 1 else actions  # a mixture's are [B, k]
        active = (
            torch.ones(len(actions), dtype=torch.bool, device="cpu")
            if record.active is None
            else record.active.to("cpu")
        )
        routes.append(torch.where(active[:, None], actions, -1).sort(1).values)
        valid = active[:, None] & (actions >= 0)
        A, K = len(tasks), record.choices
        counts = torch.bincount((row[:, None] * K + actions)[valid], minlength=A * K).reshape(A, K)
        total, within = counts.sum(0), counts.sum(1)
        used = int((total > 0).sum())
        k = actions.shape[1]
        share = float(total.topk(min(k, K)).values.sum()) / max(float(total.sum()), 1.0)
        layers.append(
            LayerSummary(
                type(record.decision).__name__,
                counts,
                float(_entropy(total)),
                float((_entropy(counts) * within).sum() / within.sum().clamp(min=1)),
                used,
                k < K and int((within > 0).sum()) > 1 and share >= COLLAPSE,
                k,
            )
        )
    distinct = len({tuple(map(int, route)) for route in torch.cat(routes, 1)}) if routes else 0
    return Summary(layers, tasks, len(trajectory), distinct)


def _in_order(trajectory: Trajectory) -> list[Record | Mixture]:
    """Decisions and gatings as they were made."""
    made: list[Record | Mixture] = list(trajectory.records)
    for mixture in reversed(trajectory.mixtures):
        made.insert(mixture.after, mixture)
    return made
