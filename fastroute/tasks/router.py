"""``TaskRouter``, Strezoski et al. (2019), "Many Task Learning With Task Routing"."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..functional import task_mask
from ..modules import watching
from ..ops import checks
from ..ops.accumulating import materialized
from ..ops.arguments import Count, checked
from . import masks
from .active_task import Task, TaskAware, traced


class TaskRouter(TaskAware):
    r"""Lets through the units of the task at hand and zeroes the others: y[b, c] = m[t_b, c] x[b, c].

    Every task has a fixed random subset of the units, drawn at construction; tasks share a unit where their subsets
    meet. The masks are a buffer ``_unit_mapping``, so they are saved, loaded and moved, and never trained.

    Args:
        unit_count: C, the size of axis 1 (of ``axis``).
        task_count: T.
        sigma: an int: how many units each task does without (more than C: it keeps none); a float from 0.0 to 1.0:
            that fraction of them, ``int(unit_count * sigma)`` units. Beware that 1 is one unit and 1.0 all of them.
        name: stored only.
        generator: draw the masks from it; by default they come from NumPy's global generator as upstream's do, so that
            ``numpy.random.seed`` gives upstream's masks. Nothing is drawn if no unit is off.
        no_orphans: every unit is used by some task. A unit that no task drew takes the place, in one task, of a unit
            that several tasks use: the place that was drawn most narrowly.
        balanced: units are used equally often, within one: each task keeps the units that the tasks before it used
            least, drawing among equals.
        axis: 1, or -1: the units are x's last axis, as a Linear's features are of x [B, ..., C].
        inplace: write zeros into x where units are off, and return it: a part of a pass over memory instead of a whole
            one. As with any in-place operation x must not be needed by others; autograd checks that.
        device, dtype: of the masks; float32 by default. Any floating dtype holds them.

    The state dict is upstream's. As there, it has no ``_unit_mapping`` when no unit is off (``sigma`` 0, or a fraction
    that comes to none): then old checkpoints load strictly here and new ones there.

    ``use_routing = False`` turns the layer off.

    Raises:
        ValueError, TypeError: naming the argument; ``no_orphans`` without room for all units.

    Examples:
        >>> router = fastroute.TaskRouter(unit_count=8, task_count=20, sigma=0.5)
        >>> y = router(torch.ones(2, 8), torch.tensor([0, 19]))  # each sample of its own task
        >>> y.sum(1)
        tensor([4., 4.])
    """

    _unit_mapping: Tensor
    axis: int = 1

    @checked
    def __init__(
        self,
        unit_count: Count,
        task_count: Count,
        sigma: masks.Sigma,
        name: str = "TaskRouter",
        *,
        generator: torch.Generator | None = None,
        no_orphans: bool = False,
        balanced: bool = False,
        axis: int = 1,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if axis not in (1, -1):
            raise ValueError(f"axis: expected 1 or -1, got {axis!r}")
        self.unit_count, self.task_count = unit_count, task_count
        self.sigma, self.name = sigma, name
        self.use_routing, self.inplace, self.axis = True, bool(inplace), axis
        self._off, self._is_drawn = self._plan(sigma)
        self._choice = {"no_orphans": no_orphans, "balanced": balanced}
        self._drawn_from = None if generator is None else (generator.device, generator.get_state())
        mapping = torch.tensor(self._draw(generator), device=device, dtype=dtype or torch.float32)
        self._register(mapping, persistent=self._is_drawn)
        self._hold(0)

    def _draw(self, generator: torch.Generator | None) -> Any:
        """[T, C] bool, an array."""
        if not self._is_drawn:
            return np.ones((self.task_count, self.unit_count), dtype=bool)
        return masks.draw(self.unit_count, self.task_count, self._off, generator, **self._choice)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the masks anew: by NumPy's global generator, or, where one was given, those that it gave at first."""
        generator = None
        if self._drawn_from is not None:
            device, state = self._drawn_from
            generator = torch.Generator(device)
            generator.set_state(state)
        self._unit_mapping.copy_(torch.tensor(self._draw(generator), device=self._device()))
        if "_live" in self._buffers:
            from .live_channels import renew  # which knows routers

            renew(self)

    def _plan(self, sigma: int | float) -> tuple[int, bool]:
        """How many units are off, and whether masks are drawn and saved."""
        off = masks.units_off(self.unit_count, sigma)
        return off, off > 0

    def _register(self, mapping: Tensor, persistent: bool) -> None:
        self.register_buffer("_unit_mapping", mapping, persistent=persistent)

    def _device(self) -> torch.device:
        return self._unit_mapping.device

    def _scales(self) -> bool:
        """Whether masks do more to a unit than let it through or zero it."""
        return False

    def extra_repr(self) -> str:
        return (
            f"unit_count={self.unit_count}, task_count={self.task_count}, sigma={self.sigma}, "
            f"name={self.name!r}, inplace={self.inplace}{'' if self.axis == 1 else ', axis=-1'}"
        )

    def get_unit_mapping(self) -> Tensor:
        """[T, C]: 1 where task t uses unit c, else 0."""
        return self._unit_mapping

    def forward(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Mask x.

        Args:
            x: [B, C, ...] (with ``axis=-1`` [B, ..., C]), any floating dtype and memory format.
            task: an int or an integer tensor, 0-d or [1]: the task of all samples; or [B] integers: each sample's own.
                By default the active task. (Under torch.compile give a tensor: a graph is made again for other ints.)

        Returns:
            x's shape, in x's dtype and memory format: x with zeros in place of the units that are off, whatever they
            were, also infinities; x itself if ``inplace``. The gradient is zero there too.

        Raises:
            ValueError, TypeError: naming the argument; x that is no [B, C, ...], not one task per sample.
            IndexError: a task out of range. On a GPU the tasks of a tensor are looked at under ``fastroute.strict``
                only: a sample without a task is all zeros.
        """
        if not self.use_routing:
            return x
        self._check_units(x)
        active = self._task(task)
        watching.tell(self, "tasks", active, x, self.task_count)
        return self.masked(x, active, task)

    def _check_units(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and (x.dim() < 2 or x.shape[self.axis] != self.unit_count):
            axes = f"{self.unit_count}, ..." if self.axis == 1 else f"..., {self.unit_count}"
            raise ValueError(f"x: expected [B, {axes}] (unit_count units), got {checks.shown(x)}")

    def over_features(self, x: Tensor) -> bool:
        """Whether the units are x's last axis and that is not axis 1."""
        return self.axis == -1 and isinstance(x, Tensor) and x.dim() > 2

    def masked(self, x: Tensor, active: Task, task: Task | None) -> Tensor:
        """x masked for the active task, of which ``task`` was given; nobody is told of it."""
        inplace = self.inplace and (torch.compiler.is_compiling() or not traced())  # under vmap x may be fewer than y
        turned = self.over_features(x)  # then seen with its units as axis 1, without a copy
        x = x.movedim(-1, 1) if turned else x
        y = self._checked(task_mask(x, self._unit_mapping, active, inplace=inplace), task)
        return y.movedim(1, -1) if turned else y

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        strict, missing_keys, unexpected_keys, error_msgs = args
        if materialized(self, state_dict, local_metadata) and not self._is_drawn:
            self.reset_parameters()
        key = prefix + "_unit_mapping"
        if isinstance(given := state_dict.get(key), Tensor):
            why = self._refuses(given)
            if why is not None:
                error_msgs.append(f"{key}: {why}")
                state_dict = {k: v for k, v in state_dict.items() if k != key}
            elif isinstance(given, nn.Parameter) and not isinstance(self._unit_mapping, nn.Parameter):
                state_dict[key] = given.detach()  # upstream's: ``assign=True`` would make the buffer a parameter
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(k for k in missing if k != key or not isinstance(given, Tensor))

    def _refuses(self, given: Tensor) -> str | None:
        """Why a checkpoint's masks cannot be this router's."""
        if given.shape != self._unit_mapping.shape:
            return (
                f"expected masks [{self.task_count}, {self.unit_count}] (tasks, units), got {checks.shown(given)} "
                f"from the checkpoint"
            )
        known = type(given) in (Tensor, nn.Parameter) and given.device.type != "meta"
        if known and not bool(((given == 0) | (given == 1)).all()):
            return (
                "expected masks of zeros and ones, got other numbers from the checkpoint (has an optimizer decayed "
                "them? (masks != 0) gives them back)"
            )
        return None
