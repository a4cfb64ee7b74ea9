"""The first and the outermost of a routed network's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..modules.wrapped import inside
from ..ops.checks import samples, tensor
from .decisions.base import Decision
from .decisions.fixed import PassThrough, PerTaskAssignment
from .gating import TopKGating
from .recorded_batch import labels
from .selection import Selection
from .trajectory import Trajectory

#: What passes the triplet (batch, meta, actions) on.
_ROUTING = (Decision, PerTaskAssignment, PassThrough, TopKGating, Selection)


class Initialization(nn.Module):
    """Begins a batch's trajectory.

    Examples:
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8), tasks=[0, 1, 1, 0])
        >>> len(meta), meta[1].task
        (4, 1)
    """

    def forward(self, xs: Tensor, tasks: Sequence[Any] | Tensor = ()) -> tuple[Tensor, Trajectory, None]:
        """(xs, its trajectory, None: no actions yet).

        Args:
            xs: [B, ...], passed on as it is.
            tasks: B labels, or none. Integers, where they are to choose agents or modules.

        Raises:
            ValueError: labels of another length.
        """
        if not isinstance(xs, Tensor) and hasattr(xs, "__len__"):
            size = len(xs)
        else:
            size = samples("xs", xs)
        if isinstance(tasks, Tensor) and tasks.dim() == 2 and tasks.shape[1] == 1:
            tasks = tasks[:, 0]
        count = 0 if tasks is None else labels(tasks)
        if count not in (0, size):
            raise ValueError(f"tasks: expected one label per sample, {size}, got {count}")
        return xs, Trajectory(size, tasks if count == size else None), None  # of no samples, no labels are theirs


class Sequential(nn.Module):
    """``nn.Sequential`` for routed networks, beginning with an :class:`Initialization`.

    Decisions and selections pass the triplet on, other modules see the batch alone. A decision with several agents is
    dispatched by the actions of the one before it, or, being the first, by the task labels.

    Args:
        modules: in order; or one OrderedDict of them, by name.

    Examples:
        >>> net = fastroute.Sequential(
        ...     fastroute.REINFORCE(3, 8),
        ...     fastroute.Selection(*(nn.Linear(8, 2) for _ in range(3))),
        ...     nn.ReLU(),
        ... )
        >>> y, meta = net(torch.randn(4, 8))
        >>> y.shape, meta.actions.shape
        (torch.Size([4, 2]), torch.Size([1, 4]))
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.add_module("0", Initialization())
        if len(modules) == 1 and isinstance(modules[0], dict):
            named = modules[0].items()
        else:
            named = {str(i): m for i, m in enumerate(modules, 1)}.items()
        for name, m in named:
            if not isinstance(m, nn.Module):
                raise TypeError(f"Sequential: expected modules, got {type(m).__name__} as number {name}")
            self.add_module(name, m)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, i: int) -> nn.Module:
        return list(self._modules.values())[i]  # type: ignore[return-value]

    def forward(self, x: Tensor, tasks: Sequence[Any] | Tensor = ()) -> tuple[Tensor, Trajectory]:
        """[B, ...] and B labels -> (y, the trajectory)."""
        tensor("x", x, "a tensor [B, ...]")
        modules: list[Any] = list(self._modules.values())  # children() has what stands in two places once
        first, *rest = modules
        ys, meta, actions = first(x, tasks)
        for m in rest:
            own = inside(m)
            if isinstance(own, Decision) and actions is None and own._num_agents > 1 and meta.tasks is not None:
                actions = meta.task_indices(x.device)
            if isinstance(own, _ROUTING):
                ys, meta, actions = m(ys, meta, actions)
            else:
                ys = m(ys)
        return ys, meta
