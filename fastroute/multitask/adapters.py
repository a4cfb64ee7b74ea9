"""What puts routing layers into a graph: nodes that unpack a tuple, and nodes that know of tasks.

Axes: B samples, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..modules.names import TakenNames
from ..ops.arguments import Several, checked
from ..ops.checks import function, shown, tensor
from ..ops.host import may_look
from ..ops.masked import only


class Unpack(TakenNames, nn.Module):
    """A node whose layer takes several arguments from anchors that give tuples: ``layer(*a, *b, c)``.

    Layers of a routing network hand on (batch, meta, actions); with ``Unpack(decision)`` and ``Unpack(selection)`` each
    takes the triple of the one before as its arguments. Anchors that give something else than a tuple are one argument.

    Args:
        layer: a module, or a function.
        take: of the layer's result, hand on only this item.
        options: further keyword arguments of the layer, the same in every call.

    The layer's parameters have ``layer.`` before their names.

    Examples:
        >>> gate = fastroute.Unpack(fastroute.Initialization(), take=1)  # hands on the trajectory alone
        >>> len(gate(torch.randn(4, 8)))
        4
    """

    @checked
    def __init__(
        self, layer: Annotated[Callable[..., Any], None], take: int | str | None = None, **options: Any
    ) -> None:
        super().__init__()
        function("layer", layer, "a Module or a function")
        self.layer, self.take, self.options = layer, take, options

    def extra_repr(self) -> str:
        own = [] if isinstance(self.layer, nn.Module) else [repr(self.layer)]
        options = {**({} if self.take is None else {"take": self.take}), **self.options}
        return ", ".join([*own, *(f"{name}={value!r}" for name, value in options.items())])

    def forward(self, *inputs: Any) -> Any:
        """The layer's result, or an item of it, for the anchors' outputs."""
        given: list[Any] = []
        for one in inputs:
            # a named tuple, say, is one thing; so is a Trajectory, which is a sequence, too
            given.extend(one) if type(one) is tuple else given.append(one)
        made = self.layer(*given, **self.options)
        return made if self.take is None else made[self.take]


class EachTask:
    """Every sample once for every task: x [B, ...] -> (x T times [T B, ...], the tasks' numbers [T B] int64).

    Task by task: rows t B and following are all samples with task t. For layers that take a task per sample, such as
    ``TaskRouter``, where every sample has labels of all tasks. The inverse is :class:`ToTasks`.

    Args:
        tasks: T.

    Examples:
        >>> x, task = fastroute.EachTask(2)(torch.tensor([[1.0], [5.0]]))
        >>> x.flatten(), task
        (tensor([1., 5., 1., 5.]), tensor([0, 0, 1, 1]))
    """

    @checked
    def __init__(self, tasks: Several) -> None:
        self.num_tasks = tasks

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tensor("x", x, "a tensor [B, ...]")
        if x.dim() < 1:
            raise ValueError("x: expected [B, ...], got []")
        T, B = self.num_tasks, x.shape[0]
        ids = torch.arange(T, device=x.device).unsqueeze(1).expand(T, B)
        return x.repeat(T, *[1] * (x.dim() - 1)), ids.flatten()

    def __repr__(self) -> str:
        return f"EachTask({self.num_tasks})"


class ToTasks:
    """What :class:`EachTask` put together, apart: x [T B, ...] -> T tensors [B, ...].

    Args:
        tasks: T.

    Examples:
        >>> fastroute.ToTasks(2)(torch.tensor([1.0, 5.0, 1.0, 5.0]))
        (tensor([1., 5.]), tensor([1., 5.]))
    """

    @checked
    def __init__(self, tasks: Several) -> None:
        self.num_tasks = tasks

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        tensor("x", x, "a tensor [T B, ...]")
        T = self.num_tasks
        if x.dim() < 1 or x.shape[0] % T:
            raise ValueError(f"x: expected as many samples of each of {T} tasks, [{T} B, ...], got {shown(x)}")
        return x.unflatten(0, (T, x.shape[0] // T)).unbind()

    def __repr__(self) -> str:
        return f"ToTasks({self.num_tasks})"


class OfTask:
    """Of T tasks' outputs, every sample the one of its task: (y_0, ..., y_T-1, task [B]) -> y [B, ...].

    y_b = y_t,b with t the task of sample b. The outputs are anchors of their own, or one tuple, list or dict of them;
    the task ids are the last anchor. For batches in which every sample has one task.

    Samples whose task is out of range, -1 among them, raise on a CPU and give zeros elsewhere (see
    ``fastroute.strict``).

    Examples:
        >>> of = fastroute.OfTask()
        >>> of(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([0, 1]))
        tensor([ 1., 20.])
    """

    def __call__(self, *inputs: Any) -> Tensor:
        if len(inputs) < 2:
            raise TypeError(f"OfTask: expected tasks' outputs and task ids as anchors, got {len(inputs)} of them")
        outputs, task = inputs[:-1], inputs[-1]
        if len(outputs) == 1 and not isinstance(outputs[0], Tensor):
            outputs = tuple(outputs[0].values() if isinstance(outputs[0], Mapping) else outputs[0])
        return _pick(outputs, task)

    def __repr__(self) -> str:
        return "OfTask()"


def _pick(outputs: Sequence[Any], task: Any) -> Tensor:
    for t, y in enumerate(outputs):
        tensor(f"outputs[{t}]", y, "a tensor [B, ...]")
        if y.dim() < 1 or y.shape != outputs[0].shape:
            raise ValueError(f"outputs[{t}]: expected [B, ...] like outputs[0], {shown(outputs[0])}, got {shown(y)}")
    tensor("task", task, "integers [B]")
    if task.dtype.is_floating_point or task.dtype.is_complex or task.dtype == torch.bool:
        raise TypeError(f"task: expected integers [B], got {task.dtype}")
    T, B = len(outputs), outputs[0].shape[0]
    if task.dim() != 1 or task.shape[0] != B:
        raise ValueError(f"task: expected one per sample, [{B}], got {shown(task)}")
    task = task.to(torch.int64)  # in a smaller dtype T would be taken modulo its range
    named = (task >= 0) & (task < T)
    looks = may_look(task)
    if looks and not bool(named.all()):
        raise IndexError(f"task: expected tasks from 0 to {T - 1}, got {int(task.min())} to {int(task.max())}")
    at = task.clamp(0, T - 1).reshape(1, B, *[1] * (outputs[0].dim() - 1)).expand(1, *outputs[0].shape)
    y = torch.stack(list(outputs)).gather(0, at).squeeze(0)
    return y if looks else only(y, named)
