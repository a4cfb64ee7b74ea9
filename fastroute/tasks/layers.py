"""A convolution and a linear layer that compute live channels only, for models written by hand."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..modules import watching
from ..modules.names import TakenNames
from ..modules.reading import Memo, Proof
from ..ops.arguments import Count, checked
from ..ops.checks import as_parameters, tensor
from .active_task import Task, is_mapped
from .layer_chain import MIX, ROUTER, Step, kind, rank
from .live_channels import has_units, look_again, prove, same_for_all, sort, tasks_of, units
from .live_execution import Held, Mixed, Single, is_idle
from .router import TaskRouter


def _shape(layer: Any) -> tuple[int, ...]:
    return tuple(layer.weight.shape)


class _Routed(TakenNames, nn.Module):
    """What the two have in common; comes before the torch class they are."""

    def _set_routers(self, inp: TaskRouter | None, out: TaskRouter | None, compact: tuple[bool, bool]) -> None:
        for name, router, width in (
            ("input_router", inp, _shape(self)[1]),
            ("output_router", out, _shape(self)[0]),
        ):
            if router is not None and not isinstance(router, TaskRouter):
                raise TypeError(f"{name}: expected a TaskRouter or None, got {type(router).__name__}")
            if router is not None and router.unit_count != width:
                raise ValueError(f"{name}: expected a router of {width} units, got {router.unit_count}")
            if router is not None and router.axis != 1 and rank(self) != 2:
                raise ValueError(f"{name}: expected a router over axis 1, where channels are, got axis={router.axis}")
        for name, router, asked in (("compact_input", inp, compact[0]), ("compact_output", out, compact[1])):
            if asked and router is None:
                raise ValueError(f"{name}: expected a router on that side, got None")
        for router in (inp, out):
            if router is not None and has_units(router):
                units(router)  # torch.compile is not to read masks
        # Not as submodules: a router stands elsewhere in the model too, and the keys are to be the plain layer's.
        self.__dict__["_ends"] = (inp, out)
        self.compact_input, self.compact_output = compact
        self._kept: dict[int, Any] = {}
        self._memo = Memo()

    @property
    def input_router(self) -> TaskRouter | None:
        """Outside whose live channels the input is zero."""
        return self.__dict__["_ends"][0]

    @property
    def output_router(self) -> TaskRouter | None:
        """What masks the output."""
        return self.__dict__["_ends"][1]

    #: What it has among its attributes beside those of the torch class.
    OWN = ("_ends", "_kept", "_memo", "compact_input", "compact_output")

    def train(self, mode: bool = True) -> Any:
        """As any module's; kept weights are forgotten, and masks looked at again."""
        self._kept.clear()
        for router in filter(None, self.__dict__["_ends"]):
            look_again(router)
        return super().train(mode)

    def _run(self, x: Tensor, task: Task | None) -> Tensor:
        tensor("x", x, "a tensor")
        ends: tuple[TaskRouter | None, TaskRouter | None] = self.__dict__["_ends"]
        if not self._are_read(ends) or not all(r is None or has_units(r) for r in ends):
            if self.compact_input or self.compact_output:
                raise ValueError(
                    "compact_input, compact_output: expected routers without hooks and a forward of their own, whose "
                    "masks vmap does not map over"
                )
            return self._dense(x, task, *ends)
        tasks = {id(r): r._task(task) for r in ends if r is not None and r.use_routing}
        for r in ends:
            if r is not None and id(r) in tasks:
                prove(r, tasks_of(tasks[id(r)]))
        inp, out = (None if r is None or is_idle(r) else r for r in ends)
        tasks = {id(r): tasks[id(r)] for r in (inp, out) if r is not None}
        if not tasks:
            return super().forward(x)
        router = out or inp
        if router is not None:
            watching.tell(self, "tasks", tasks[id(router)], x, router.task_count)
        if x.dim() > 2 and all(r is None or r.over_features(x) for r in (inp, out)):
            if not any(isinstance(t, Tensor) and (t.dim() or is_mapped(t)) for t in tasks.values()):
                rows = self._run(x.flatten(0, -2), task)
                return rows.view(*x.shape[:-1], rows.shape[-1])
            if not (self.compact_input or self.compact_output):
                return self._dense(x, task, inp, out)
        elif x.dim() != rank(self):
            axes = "[B, C, H, W]" if rank(self) == 4 else "[B, features], or a router with axis=-1"
            raise ValueError(f"x: expected {axes}, got {list(x.shape)}")
        compact_in, compact_out = self.compact_input and inp is not None, self.compact_output and out is not None
        if not _is_read(self):
            if compact_in or compact_out:
                raise ValueError(
                    "compact_input, compact_output: expected a layer without padding modes, groups and a _conv_forward "
                    "of its own, whose channels can be left out"
                )
            return self._dense(x, task, inp, out)
        step = Step(MIX, self, None, out)
        several = [t for t in tasks.values() if isinstance(t, Tensor) and (t.dim() or is_mapped(t))]
        way: Single | Mixed = Single(tasks, False, self._kept)
        if several:
            order = None
            common = None if any(map(is_mapped, several)) else same_for_all(list(tasks.values()), x)
            if common is not None:
                order = sort(common, min(r.task_count for r in (inp, out) if r is not None))
            if compact_in or compact_out:
                raise ValueError(
                    "task: expected one task for all samples with compact_input or compact_output, got [B]"
                )
            mixed = None if order is None or common is None else Mixed(order, common)
            if mixed is None or not mixed.favours(step, x, Held(inp)):
                return self._dense(x, task, inp, out)
            way = mixed
        inside = None if inp is None else way.index(inp)
        width = _shape(self)[1] if inside is None or not compact_in else inside.shape[-1]
        if x.shape[1] != width:
            raise ValueError(f"x: expected {width} channels, got {x.shape[1]} (x is {list(x.shape)})")
        x = way.begin(x)
        if inside is not None and not compact_in:
            x = way.compact(x, inside)
        if inside is not None and inp is not None:
            x = way.mask(x, inp, inside)
        outside = None if out is None else way.index(out)
        y = way.mix(step, x, outside, inside)
        if out is not None and outside is not None:
            y = way.mask(y, out, outside)
            if not compact_out:
                y = way.expand(y, outside, out.unit_count)
        y = way.end(y)
        for router in (inp, out):
            y = y if router is None else router._checked(y, task)
        return y

    def _are_read(self, ends: tuple[TaskRouter | None, ...]) -> bool:
        """Whether masking is all that the routers do."""
        routers = [r for r in ends if r is not None]
        if torch.compiler.is_compiling():  # a graph is guarded by what it reads, not by a memo
            return all(kind(r) == ROUTER for r in routers)
        known: Proof | None = self._memo.known
        if known is not None and known.holds(routers):
            return True
        if not all(kind(r) == ROUTER for r in routers):
            return False
        self._memo.known = Proof(routers, (), (), routers)
        return True

    def _dense(self, x: Tensor, task: Task | None, inp: TaskRouter | None, out: TaskRouter | None) -> Tensor:
        x = x if inp is None else inp(x, task)
        y: Tensor = super().forward(x)
        return y if out is None else out(y, task)


def _is_read(layer: Any) -> bool:
    """Whether a convolution with the layer's weight is all that it does."""
    if not isinstance(layer, nn.Conv2d):
        return True
    own = "_conv_forward" in layer.__dict__ or type(layer)._conv_forward is not nn.Conv2d._conv_forward
    return layer.groups == 1 and layer.padding_mode == "zeros" and not own


class RoutedConv2d(_Routed, nn.Conv2d):
    """A Conv2d between two routers (either may be missing): y = m_out * conv(m_in * x).

    Its parameters and their names are the dense layer's. For one task, live weights are gathered (in eval without
    gradients they are kept, see ``LiveSequential``) and only live channels computed. Gradients of the dense
    parameters are dense, with zeros where nothing is live.

    Args:
        in_channels, out_channels, kernel_size, others: of ``Conv2d``; groups=1 and zero padding.
        input_router: the router of x's channels. Channels that it switches off are not read.
        output_router: the router of the result's, which the layer replaces: its channels that are off are zero.
        compact_input, compact_output: x holds, or the result is to hold, live channels only, in rising order.
            Then a batch has one task.

    The routers are not submodules: register them where they stand in the model.

    Raises:
        ValueError, TypeError: naming the argument.

    Examples:
        >>> router = fastroute.TaskRouter(16, 4, 0.5)
        >>> conv = fastroute.RoutedConv2d(3, 16, 3, padding=1, output_router=router)
        >>> fastroute.set_task(router, 2)
        >>> y = conv(torch.randn(2, 3, 8, 8))
        >>> int((y.abs().sum((0, 2, 3)) > 0).sum())
        8
    """

    @checked
    def __init__(
        self,
        in_channels: Count,
        out_channels: Count,
        kernel_size: Count | tuple[Count, Count],
        *args: Any,
        input_router: Annotated[TaskRouter | None, None] = None,
        output_router: Annotated[TaskRouter | None, None] = None,
        compact_input: bool = False,
        compact_output: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **others)
        if self.groups != 1:
            raise ValueError(f"groups: expected 1, got {self.groups}")
        if self.padding_mode != "zeros":
            raise ValueError(f'padding_mode: expected "zeros", got {self.padding_mode!r}')
        self._set_routers(input_router, output_router, (compact_input, compact_output))

    def forward(self, x: Tensor, task: Task | None = None) -> Tensor:
        """x [B, I, H, W] -> [B, O, H', W'] (compact: live channels only), for a task or tasks [B].

        Several tasks run grouped or densely by ``products.grouped_is_cheaper``; on a GPU and under torch.compile
        densely.
        """
        return as_parameters("x", x, self, self._run, x, task)  # type: ignore[no-any-return]


class RoutedLinear(_Routed, nn.Linear):
    """A Linear between two routers (either may be missing): y = m_out * (W (m_in * x) + b).

    Args:
        in_features, out_features, others: of ``Linear``.
        input_router, output_router, compact_input, compact_output: as for :class:`RoutedConv2d`.

    Examples:
        >>> router = fastroute.TaskRouter(16, 4, 0.5)
        >>> layer = fastroute.RoutedLinear(8, 16, output_router=router, compact_output=True)
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    @checked
    def __init__(
        self,
        in_features: Count,
        out_features: Count,
        *args: Any,
        input_router: Annotated[TaskRouter | None, None] = None,
        output_router: Annotated[TaskRouter | None, None] = None,
        compact_input: bool = False,
        compact_output: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(in_features, out_features, *args, **others)
        self._set_routers(input_router, output_router, (compact_input, compact_output))

    def forward(self, x: Tensor, task: Task | None = None) -> Tensor:
        """x [B, I] -> [B, O] (compact: live features only), for a task or tasks [B].

        Between routers over the last axis x may be [B, ..., I].
        """
        return as_parameters("x", x, self, self._run, x, task)  # type: ignore[no-any-return]
