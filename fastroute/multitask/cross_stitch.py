"""``CrossStitch``, Misra et al. (2016), "Cross-stitch Networks for Multi-task Learning" (arXiv 1604.03539).

Axes: T tasks, B samples, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.arguments import Count, Tasks, checked
from ..ops.checks import floating, shown, tensor, together
from ..ops.precision import autocast_off
from .named_tasks import Axis, NamedTasks
from .task_names import ByTask, by_task, task_names


class CrossStitch(NamedTasks):
    r"""Mixes the activations of T columns, one network per task: x'_t = sum over s of alpha_ts x_s (equation 1).

    Put one between layers of the columns. With alpha the identity, columns do not see each other.

    Args:
        tasks: T, for a tuple of outputs; or T names, for a dict.
        channels: a matrix alpha for every one of C channels, axis 1 of the activations (the paper's choice); None: one
            for all.
        own: initial alpha_tt; what is left to 1 is divided among the other tasks. (The paper: 0.9 and 0.1.)
        device, dtype: of alpha.

    Parameter: ``alpha`` [T, T], or [C, T, T]; in a state dict by the tasks' names, see :class:`NamedTasks`.

    Raises:
        ValueError, TypeError: naming the argument.

    Examples:
        >>> layer = fastroute.CrossStitch(2, own=0.9)
        >>> a, b = layer(torch.ones(1, 3), torch.zeros(1, 3))
        >>> round(a[0, 0].item(), 3), round(b[0, 0].item(), 3)
        (0.9, 0.1)
    """

    @checked
    def __init__(
        self,
        tasks: Tasks,
        *,
        channels: Count | None = None,
        own: float = 0.9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_tasks, self.tasks = task_names(tasks)
        self.channels = channels
        self.own = float(own)
        T = self.num_tasks
        shape = (T, T) if self.channels is None else (self.channels, T, T)
        self.alpha = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._keep_names(device)
        self.reset_parameters()

    def _task_axes(self) -> dict[str, tuple[Axis, ...]]:
        return {"alpha": (Axis(-2), Axis(-1))}

    def reset_parameters(self) -> None:
        """``own`` on the diagonal, (1 - own) / (T - 1) elsewhere."""
        super().reset_parameters()
        T = self.num_tasks
        with torch.no_grad():
            self.alpha.fill_((1 - self.own) / max(T - 1, 1))
            self.alpha.diagonal(dim1=-2, dim2=-1).fill_(self.own)

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, channels={self.channels}, own={self.own}"

    def forward(self, *inputs: Any) -> ByTask:
        """T tensors of one shape, or one list, tuple or dict of them -> as many, a tuple or a dict by name.

        Args:
            inputs: any shape and floating dtype, which the outputs have too; with ``channels`` [B, C, ...]. A dict has
                the names of ``tasks``, in any order, and so needs them.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        xs = self._inputs(inputs)
        alpha = self.alpha.to(xs[0].dtype)
        with autocast_off(xs[0].device.type):
            if self.channels is None:
                x = torch.stack(list(xs))
                y = alpha @ x.reshape(self.num_tasks, xs[0].numel())
                return by_task([t.view_as(x[0]) for t in torch.unsafe_split(y, 1)], self.tasks)
            x = torch.stack(list(xs), 2)  # [B, C, T, ...]
            y = alpha @ (x.flatten(3) if x.dim() > 3 else x.unsqueeze(3))
            return by_task([t.reshape(xs[0].shape) for t in torch.unsafe_split(y, 1, 2)], self.tasks)

    def _inputs(self, inputs: tuple[Any, ...]) -> Sequence[Tensor]:
        T = self.num_tasks
        if len(inputs) == 1 and not isinstance(inputs[0], Tensor):
            inputs = inputs[0]
        if isinstance(inputs, Mapping):
            if self.tasks is None or set(inputs) != set(self.tasks):
                wanted = f"keys {list(self.tasks)}" if self.tasks is not None else "a list (tasks have no names)"
                raise ValueError(f"inputs: expected {wanted}, got a dict with keys {list(inputs)}")
            by_name: Any = inputs
            inputs = tuple(by_name[name] for name in self.tasks)
        if not isinstance(inputs, Sequence):
            raise TypeError(f"inputs: expected {T} tensors, got {type(inputs).__name__}")
        if len(inputs) != T:
            raise ValueError(f"inputs: expected {T}, one per task, got {len(inputs)}")
        for k, x in enumerate(inputs):
            tensor(f"inputs[{k}]", x, "a tensor")
            floating(f"inputs[{k}]", x)
            together(("the parameters", self.alpha), {f"inputs[{k}]": x})
            if x.shape != inputs[0].shape:
                raise ValueError(f"inputs[{k}]: expected the shape {shown(inputs[0])} of inputs[0], got {shown(x)}")
            if x.dtype != inputs[0].dtype:
                raise TypeError(f"inputs[{k}]: expected the dtype {inputs[0].dtype} of inputs[0], got {x.dtype}")
        if self.channels is not None and (inputs[0].dim() < 2 or inputs[0].shape[1] != self.channels):
            raise ValueError(f"inputs[0]: expected [B, {self.channels}, ...], got {shown(inputs[0])}")
        return inputs
