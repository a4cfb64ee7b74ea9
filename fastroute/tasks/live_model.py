"""Routed networks that compute live channels only: about (1 - sigma)^2 of the work of a masked one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modules import watching
from ..modules.names import TakenNames
from ..modules.reading import Memo, Proof
from ..ops.arguments import checked
from ..ops.checks import as_parameters, tensor
from .active_task import Task, hold_in_all, is_made_again, is_mapped
from .layer_chain import ROUTER, Step, is_known, is_sequence, leaves, opened, sequences, steps
from .live_channels import has_units, look_again, prove, same_for_all, sort, tasks_of, units
from .live_execution import Mixed, Single, Way, called, is_idle, walk
from .router import TaskRouter


@checked
def live(model: nn.Module, *, batch_norm: str = "exact") -> nn.Module:
    """Makes the Sequentials of a routed model compute only what its routers let through.

    For one task the channels that are off are neither computed by the layer before a router nor read by the layer after
    it, where both are ``Conv2d`` (groups=1, zero padding) or ``Linear`` and everything between treats channels alone:
    BatchNorm, activations, pooling, flattening. Other layers see the full width. Outputs and gradients are those of the
    masked model up to rounding; parameters, their names and the routers stay, and dead parameters get zero
    gradients, so optimizers with momentum or weight decay move them as before.

    **Tasks [B].** A batch of several tasks is sorted by task and each layer runs once per task on live channels, or
    densely with masks, whichever is cheaper by ``products.grouped_is_cheaper``. On a GPU (where sorting would
    wait for the device) and under torch.compile it runs densely.

    **BatchNorm in training.** Batch statistics are per channel, so live ones need nothing of dead ones. The running
    statistics of dead channels do change in a masked model, though, and another task may keep those channels: "exact"
    computes dead channels once without gradient for their statistics alone, about (1 - sigma) sigma of a dense forward
    pass; "live" leaves the running statistics of dead channels as they are. Layers before a BatchNorm in training run
    densely if the batch has several tasks: the statistics mix their samples.

    Dropout in training expands its input first, so that one task's random draws are those of the masked model.

    Args:
        model: routed by ``route``, a routed ``vgg11`` or ``vgg11_bn``, or Sequentials with TaskRouters.
            Changed in place, except that a model which is itself a Sequential is left alone and a LiveSequential of the
            same layers returned.
        batch_norm: "exact" or "live".

    Returns:
        The model to use.

    Raises:
        ValueError: no Sequential in it has a router; another ``batch_norm``.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2))
        >>> net = fastroute.live(fastroute.route(net, task_count=4, sigma=0.5))
        >>> net(torch.randn(2, 3, 8, 8), torch.tensor([0, 3])).shape
        torch.Size([2, 2])
    """
    found = [(name, s) for name, s in sequences(model) if any(leaf.kind == ROUTER for leaf in leaves(s, name))]
    if not found:
        others = sorted(
            {type(m).__module__ for m in model.modules() if isinstance(m, TaskRouter)} - {TaskRouter.__module__}
        )
        raise ValueError(
            f"model: expected a TaskRouter in a Sequential, got none in {type(model).__name__}"
            + (f" but those of {', '.join(others)}, with a forward of their own" if others else "")
            + ": route(model, ...) puts them there"
        )
    for name, sequence in found:
        made = LiveSequential(sequence, batch_norm=batch_norm)
        if not name:
            return made
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, made)
    return model


class _Plan(NamedTuple):
    """How the layers of a Sequential run, and what that was seen from."""

    chain: list[nn.Module]
    steps: list[Step]
    routers: list[TaskRouter]
    seen: tuple[list[nn.Module], list[nn.Module]]  #: whole modules, and classes alone

    @staticmethod
    def of(sequence: nn.Sequential) -> _Plan:
        found = list(leaves(sequence))
        chain = [leaf.module for leaf in found]
        routers = [m for m in chain if isinstance(m, TaskRouter)]
        for router in filter(has_units, routers):
            units(router)  # torch.compile is not to read masks
        layers = [m for m in chain if not isinstance(m, TaskRouter)]
        read = [*opened(sequence), *filter(is_known, layers)]
        others = [m for m in layers if not is_known(m)]
        return _Plan(chain, steps(found), routers, (read, others))


class LiveSequential(TakenNames, nn.Sequential):
    """A Sequential with TaskRouters that computes live channels only; see :func:`live`.

    Its layers, their parameters and their names are those of the Sequential it is made of, and can be indexed,
    replaced, added and removed like those. Layers that may not be read (hooks, a forward of their own,
    parametrizations, adapters, subclasses: see ``ops._modules``) are called, with inputs of the full width.

    In eval mode and without gradients the gathered weights of the last task are kept until a parameter or the task
    changes, or an optimizer makes a step. Writing through ``parameter.data``, or a NumPy array, is a change nobody can
    see: call ``eval()`` or ``train()`` after it.

    Args:
        sequence: what to run.
        batch_norm: "exact" or "live", see :func:`live`.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 16), fastroute.TaskRouter(16, 4, 0.5), nn.ReLU(), nn.Linear(16, 2))
        >>> live = fastroute.LiveSequential(net)
        >>> x = torch.randn(5, 8)
        >>> torch.allclose(live(x, 3), live(x, torch.full((5,), 3)), atol=1e-6)
        True
    """

    #: What it has among its attributes beside those of a Sequential.
    OWN = ("batch_norm", "_memo", "_kept")
    #: A task that is set is its routers', and none of its own.
    tells_its_parts = True

    @checked
    def __init__(self, sequence: nn.Sequential, *, batch_norm: str = "exact") -> None:
        super().__init__()
        if not is_sequence(sequence):
            raise ValueError(f"sequence: expected a Sequential with its own forward, got {type(sequence).__name__}")
        if batch_norm not in ("exact", "live"):
            raise ValueError(f'batch_norm: expected "exact" or "live", got {batch_norm!r}')
        self.__dict__.update(sequence.__dict__)
        self.batch_norm = batch_norm
        self._memo = Memo()
        self._kept: dict[int, Any] = {}
        self._plan()

    def _plan(self) -> _Plan:
        """How to run the layers as they are."""
        if torch.compiler.is_compiling():  # a graph is guarded by what it reads, not by a memo
            return _Plan.of(self)
        known: tuple[_Plan, Proof] | None = self._memo.known
        if known is None or not known[1].holds([self]):
            plan = _Plan.of(self)
            known = self._memo.known = plan, Proof([self], *plan.seen, plan.routers)
        return known[0]

    def extra_repr(self) -> str:
        return f"batch_norm={self.batch_norm!r}"

    def train(self, mode: bool = True) -> LiveSequential:
        """As any module's; kept weights are forgotten, and masks looked at again."""
        self._kept.clear()
        for m in self.modules():
            if isinstance(m, TaskRouter):
                look_again(m)
        super().train(mode)
        return self

    @property
    def active_task(self) -> Task:
        """Of its first router; there is none without routers."""
        routers = self._plan().routers
        if not routers:
            raise AttributeError("active_task: expected a router, got none")
        return routers[0].active_task

    def set_active_task(self, active_task: Task) -> Task:
        """Make a task the active one of every router in it; returns it."""
        routers = self._plan().routers
        if isinstance(active_task, Tensor) or any(router.active_task is not active_task for router in routers):
            hold_in_all(routers, active_task, "active_task")  # unless set_task has, of an int
        return active_task

    def forward(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Run the layers.

        Args:
            x: [B, C, ...].
            task: an int or an integer tensor, 0-d or [1], for all samples, or [B] integers; by default each router's
                active task.

        Returns:
            What the Sequential returns for x, at its full width.

        Raises:
            IndexError: a task out of range.
            ValueError, TypeError: as the layers'.
        """
        tensor("x", x, "a tensor [B, C, ...]")
        return as_parameters("x", x, self, self._run, x, task)  # type: ignore[no-any-return]

    def _run(self, x: Tensor, task: Task | None) -> Tensor:
        plan = self._plan()
        tasks = [router._task(task) for router in plan.routers]
        way = self._way(x, task, tasks, plan)
        if way is None:
            for module in plan.chain:
                x = called(module, x, task)
            return x
        for router, active in zip(plan.routers, tasks, strict=True):
            watching.tell(router, "tasks", active, x, router.task_count)
        if not _is_slow_layout(x):
            return self._checked(walk(plan.steps, x, way), task, plan)
        way.turned = True
        made = walk(plan.steps, x.contiguous(memory_format=torch.channels_last), way)
        return self._checked(made.contiguous(), task, plan)

    @staticmethod
    def _checked(y: Tensor, task: Task | None, plan: _Plan) -> Tensor:
        for router in plan.routers if is_made_again(task) else ():
            y = y if is_idle(router) else router._checked(y, task)
        return y

    forward.is_a_sequence = True  # type: ignore[attr-defined]

    def _way(self, x: Tensor, task: Task | None, tasks: list[Task], plan: _Plan) -> Way | None:
        """How to run live; None for densely."""
        if not tasks or x.dim() < 2 or any(map(is_mapped, tasks)) or not all(map(has_units, plan.routers)):
            return None
        if not any(isinstance(t, Tensor) and t.dim() for t in tasks):
            for router, t in zip(plan.routers, tasks, strict=True):
                prove(router, tasks_of(t))
            each = dict(zip(map(id, plan.routers), tasks, strict=True))
            return Single(each, self.batch_norm == "exact", self._kept, task)
        first = same_for_all(tasks, x)
        if first is None:
            return None
        order = sort(first, min(router.task_count for router in plan.routers))
        for router in plan.routers if order is not None else ():
            prove(router, tasks_of(first))
        return None if order is None else Mixed(order, first)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        part = nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        part.training = self.training
        return LiveSequential(part, batch_norm=self.batch_norm)


def _is_slow_layout(x: Tensor) -> bool:
    """Whether images had better be channels-last between the layers: on a CPU, pooling is 5 to 10 times faster."""
    return (
        x.dim() == 4
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and x.is_contiguous()
    )
