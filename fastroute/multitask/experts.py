"""Shared and task-specific experts that gates combine: ``MMoE``, ``CGC`` and ``PLE``.

Axes: N samples (all leading axes together), T tasks, D features in, H hidden ones, P features out, E experts, of which
n are a task's own and s all tasks share; G groups of experts, each with an input of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeGuard

import torch
from torch import Tensor, nn

from ..modules.names import TakenNames
from ..modules.reading import reset
from ..ops.arguments import Count, Several, Tasks, checked
from ..ops.checks import LARGEST, at_least_one, floating, integer, no_more, tensor, together
from ..ops.precision import autocast_off
from .expert_bank import Experts, Gates, ModuleBank, features
from .named_tasks import Axis, NamedTasks
from .task_names import ByTask, by_task, task_names


class _Level(TakenNames, nn.Module):
    """T tasks' own experts and shared ones, with a gate per task over its own (first) and the shared ones."""

    def __init__(
        self,
        in_features: int,
        own: int | Sequence[Sequence[nn.Module]],
        shared: int | Sequence[nn.Module],
        T: int,
        sizes: Mapping[str, Any],
        *,
        gate_bias: bool,
        shared_gate: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        own_count, s = _count("task_experts", own, T), _count("shared_experts", shared)
        n = own_count // T
        if n + s == 0:
            raise ValueError("task_experts, shared_experts: expected at least one expert in all, got 0")
        self.own_count, self.shared_count, self.num_tasks = n, s, T
        self.task_experts = _bank(in_features, own, own_count, sizes, factory)
        self.shared_experts = _bank(in_features, shared, s, sizes, factory)
        self.gate = Gates(in_features, n + s, T, bias=gate_bias, **factory)
        self.shared_gate = Gates(in_features, T * n + s, 1, bias=gate_bias, **factory) if shared_gate else None

    def reset_parameters(self) -> None:
        """Those of the gates and of experts given by sizes, anew."""
        reset(self.task_experts, self.shared_experts, self.gate, self.shared_gate)

    def axes(self, prefix: str = "") -> dict[str, tuple[Axis, ...]]:
        """Of the parameters with entries for tasks, which axes have them."""
        names: tuple[str, ...] = ("weight",) if self.gate.bias is None else ("weight", "bias")
        made = {f"gate.{name}": (Axis(0),) for name in names}
        if self.shared_gate is not None:
            made |= {f"shared_gate.{name}": (Axis(1, self.shared_count),) for name in names}
        if self.task_experts is not None and not isinstance(self.task_experts, ModuleBank):
            inner: Any = self.task_experts
            names = ("w_in", "b_in") if inner.hidden_features is None else ("w_in", "b_in", "w_out", "b_out")
            made |= {f"task_experts.{name}": (Axis(0),) for name in names}
        return {prefix + name: axes for name, axes in made.items()}

    def lists(self, prefix: str = "") -> dict[str, int]:
        """How many modules of a list each task has."""
        return {f"{prefix}task_experts": self.own_count} if isinstance(self.task_experts, ModuleBank) else {}

    def forward(self, x: Sequence[Tensor], gate_input: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``step``, as one of several levels."""
        return tuple(self.step(x, gate_input))

    def step(self, x: Sequence[Tensor], gate_input: Sequence[Tensor]) -> list[Tensor]:
        """One input for all, or T tasks' and the shared experts' -> T tasks' outputs, and the shared one with its gate.

        Each [*lead, *tail], lead the gate input's axes but its last.
        """
        T, n = self.num_tasks, self.own_count
        lead, D = gate_input[0].shape[:-1], self.gate.in_features
        for g in gate_input:
            features("gate_input" if g is not x[0] else "x", g, D)
            together(("x", x[0]), {"gate_input": g})
        flat = [g.reshape(-1, D) for g in gate_input]
        alone = len(flat) == 1
        g = self.gate.ask(flat[:1] if alone else flat[:T])
        tails, own, shared = [], None, None
        if self.task_experts is not None:
            own, tail = _run(self.task_experts, x[:T], lead)
            tails.append(tail)
        if self.shared_experts is not None:
            shared, tail = _run(self.shared_experts, x[-1:], lead)
            tails.append(tail)
        if len(set(tails)) > 1:
            raise ValueError(
                f"shared_experts: expected outputs of the task experts' shape {list(tails[0])}, got {list(tails[1])}"
            )
        parts = []
        if own is not None:
            parts.append(_mix(g[..., :n].flatten(0, 1).unsqueeze(1), own.reshape(-1, n, own.shape[-1]), T))
        if shared is not None:
            parts.append(_mix(g[..., n:], shared))
        y = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        made = [t.reshape(lead + tails[0]) for t in torch.unsafe_split(y, 1, 1)]  # which may be written to
        if self.shared_gate is not None:
            w = self.shared_gate.ask(flat[-1:])
            banks = [(w[..., : T * n], own), (w[..., T * n :], shared)]
            both = [_mix(weights, e) for weights, e in banks if e is not None]
            total = both[0] if len(both) == 1 else both[0] + both[1]
            made.append(total.reshape(lead + tails[0]))
        return made


class _Gated(NamedTasks):
    """What ``MMoE``, ``CGC`` and ``PLE`` have in common: the tasks, and what a forward pass is given."""

    tasks: tuple[str, ...] | None
    num_tasks: int

    def _first(self, x: Tensor, gate_input: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        tensor("x", x, "a tensor [..., in_features]")
        floating("x", x)
        if gate_input is None:
            return [x], [x]
        tensor("gate_input", gate_input, "a tensor [..., in_features]")
        return [x], [gate_input]


class CGC(_Level, _Gated):
    r"""Customized gate control: y_t = sum over e of g_te y_e, over task t's own experts and the shared ones.

    Tang et al. 2020, "Progressive Layered Extraction", equations 3 to 5 (doi 10.1145/3383313.3412236), of one level:
    g_t = softmax(V_t x), V_t [n + s, D], with the task's own experts first. Without own experts it is ``MMoE``.
    Experts given by sizes are one batched product per layer, and all combinations two.

    Args:
        in_features: D, of x, or of ``gate_input`` where the experts are modules.
        task_experts: n, each task's own experts, by number; or T lists of as many modules.
        shared_experts: s, by number; or a list of modules.
        tasks: T, for a tuple of outputs; or T names, for a dict.
        hidden_features, out_features, activation: of experts given by number, see :class:`Experts`.
        gate_bias: whether gates have a bias c_t.
        device, dtype: of the gates, and of experts given by number.

    Modules may take and give anything: all outputs have one shape that begins with the leading axes of the gates'
    input. Parameters: ``task_experts.*``, ``shared_experts.*`` and ``gate.weight`` [T, n + s, D]. ``layer.gate(x)`` are
    the weights [..., T, n + s].

    Raises:
        ValueError, TypeError: naming the argument.

    Examples:
        >>> layer = fastroute.CGC(16, 2, 3, ["price", "kind"], hidden_features=32, out_features=8)
        >>> y = layer(torch.randn(4, 16))
        >>> y["price"].shape, layer.gate(torch.randn(4, 16)).shape
        (torch.Size([4, 8]), torch.Size([4, 2, 5]))
    """

    @checked
    def __init__(
        self,
        in_features: Count,
        task_experts: Annotated[int | Sequence[Sequence[nn.Module]], None],
        shared_experts: Annotated[int | Sequence[nn.Module], None],
        tasks: Tasks,
        *,
        hidden_features: Count | None = None,
        out_features: Count | None = None,
        activation: str = "relu",
        gate_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        T, names = task_names(tasks)
        super().__init__(
            in_features, task_experts, shared_experts, T,
            _sizes(hidden_features, out_features, activation, (task_experts, shared_experts)),
            gate_bias=gate_bias, shared_gate=False, device=device, dtype=dtype,
        )  # fmt: skip
        self.tasks = names
        self._keep_names(device)

    def reset_parameters(self) -> None:
        """Those of the gates and of experts given by number, anew."""
        _Level.reset_parameters(self)
        NamedTasks.reset_parameters(self)

    def _task_axes(self) -> dict[str, tuple[Axis, ...]]:
        return self.axes()

    def _task_lists(self) -> dict[str, int]:
        return self.lists()

    def forward(self, x: Tensor, gate_input: Tensor | None = None) -> ByTask:  # type: ignore[override]
        """x [..., D] -> an output [..., P] per task, a tuple, or a dict by name; in x's dtype (autocast's under it).

        Args:
            x: what the experts take.
            gate_input: [..., D] floating: what the gates look at; x by default.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        return by_task(self.step(*self._first(x, gate_input)), self.tasks)


class MMoE(CGC):
    r"""Multi-gate mixture of experts: y_t = sum over e of g_te y_e, with a gate g_t = softmax(V_t x) per task.

    Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", equations 6
    and 7 (doi 10.1145/3219819.3220007). Every task takes all E experts, in its own proportions.

    Args:
        in_features: D, of x, or of ``gate_input`` where the experts are modules.
        experts: E, by number, all in one batched product per layer; or a list of modules.
        tasks: T, for a tuple of outputs; or T names, for a dict.
        hidden_features, out_features, activation: of experts given by number, see :class:`Experts`.
        gate_bias: whether gates have a bias.
        device, dtype: of the gates, and of experts given by number.

    Parameters: ``shared_experts.*`` (see :class:`Experts`) and ``gate.weight`` [T, E, D]. ``layer.gate(x)`` are the
    weights [..., T, E].

    Raises:
        ValueError, TypeError: naming the argument.

    Examples:
        >>> layer = fastroute.MMoE(16, 4, ["price", "kind"], hidden_features=32, out_features=8)
        >>> y = layer(torch.randn(4, 16))
        >>> y["price"].shape, layer.gate(torch.randn(4, 16)).shape
        (torch.Size([4, 8]), torch.Size([4, 2, 4]))
    """

    @checked
    def __init__(
        self, in_features: Count, experts: Annotated[int | Sequence[nn.Module], None], tasks: Tasks, **options: Any
    ) -> None:
        if _count("experts", experts) < 1:
            raise ValueError("experts: expected at least 1, got 0")
        super().__init__(in_features, 0, experts, tasks, **options)


class PLE(_Gated):
    r"""Progressive layered extraction: levels of ``CGC`` one on another, the shared experts' output among them.

    Tang et al. 2020, section 3.3. In every level task t's experts take the level before's y_t, and the shared experts
    its y_s, which a gate of their own combines out of *all* experts; gates see what their experts see. The last level
    has no y_s. One level is ``CGC``.

    Args:
        in_features: D; of modules, one number per level: what the level's gates see.
        task_experts, shared_experts: as ``CGC``'s, by number; or, of modules, one such argument per level.
        tasks: T, for a tuple of outputs; or T names, for a dict.
        levels: by number of experts. (Of modules it is how many there are.)
        hidden_features, out_features, activation: of experts given by number, in every level: the levels after the
            first take ``out_features``.
        gate_bias, device, dtype: as ``CGC``'s.

    Parameters: ``levels.{l}.task_experts.*``, ``.shared_experts.*``, ``.gate.weight`` [T, n + s, D], and
    ``.shared_gate.weight`` [1, T n + s, D] in all levels but the last.

    Raises:
        ValueError, TypeError: naming the argument.

    Examples:
        >>> layer = fastroute.PLE(16, 1, 2, tasks=3, levels=2, hidden_features=32, out_features=8)
        >>> [list(y.shape) for y in layer(torch.randn(4, 16))]
        [[4, 8], [4, 8], [4, 8]]
    """

    @checked
    def __init__(
        self,
        in_features: Count | Sequence[Count],
        task_experts: Any,
        shared_experts: Any,
        tasks: Tasks,
        *,
        levels: Several | None = None,
        hidden_features: Count | None = None,
        out_features: Count | None = None,
        activation: str = "relu",
        gate_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        T, self.tasks = task_names(tasks)
        self.num_tasks = T
        made = list(_per_level(in_features, task_experts, shared_experts, levels, out_features))
        self.levels: Any = nn.ModuleList(
            _Level(
                D, own, shared, T, _sizes(hidden_features, out_features, activation, (own, shared)),
                gate_bias=gate_bias, shared_gate=number + 1 < len(made), device=device, dtype=dtype,
            )
            for number, (D, own, shared) in enumerate(made)
        )  # fmt: skip
        self._keep_names(device)

    def reset_parameters(self) -> None:
        """Those of the gates and of experts given by number, anew."""
        super().reset_parameters()
        for level in self.levels:
            level.reset_parameters()

    def _task_axes(self) -> dict[str, tuple[Axis, ...]]:
        return {k: v for number, level in enumerate(self.levels) for k, v in level.axes(f"levels.{number}.").items()}

    def _task_lists(self) -> dict[str, int]:
        return {k: v for number, level in enumerate(self.levels) for k, v in level.lists(f"levels.{number}.").items()}

    def forward(self, x: Tensor, gate_input: Tensor | None = None) -> ByTask:
        """x [..., D] -> an output [..., P] per task, a tuple, or a dict by name; in x's dtype (autocast's under it).

        Args:
            x: what the first level's experts take.
            gate_input: [..., D] floating: what the first level's gates look at; x by default.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        xs: Sequence[Tensor]
        xs, seen = self._first(x, gate_input)
        for level in self.levels:
            xs = seen = level(xs, seen)
        return by_task(xs, self.tasks)


# ---------------------------------------------------------------------------------------------------------- parts


def _run(bank: nn.Module, xs: Sequence[Tensor], lead: torch.Size) -> tuple[Tensor, torch.Size]:
    """A bank on an input per group -> ([N, E, F], F's shape)."""
    if isinstance(bank, ModuleBank):
        return bank.of(xs, lead)
    if not isinstance(bank, Experts):  # around them, or in their place
        made = [bank(x) for x in xs]  # [..., E, P]
        each = made[0].shape[-2] // len(xs)
        y = torch.cat([y[..., g * each : (g + 1) * each, :] for g, y in enumerate(made)], -2)
        return y.reshape(-1, *y.shape[-2:]), y.shape[-1:]
    D = bank.in_features
    for x in xs:
        features("x", x, D, bank.w_in)
    if xs[0].shape[:-1] != lead:
        raise ValueError(f"gate_input: expected the axes of x, {list(xs[0].shape[:-1])} and one more, got {list(lead)}")
    flat = [x.reshape(-1, D) for x in xs]
    return bank.ask(flat), torch.Size([bank.out_features])


def _mix(g: Tensor, e: Tensor, tasks: int | None = None) -> Tensor:
    """Weights [N, T, E] (or with ``tasks`` [N T, 1, E]) of experts' outputs [., E, F] -> [N, T, F], in those' dtype."""
    with autocast_off(e.device.type):
        y = torch.bmm(g.to(e.dtype), e)
        return y if tasks is None else y.reshape(-1, tasks, y.shape[-1])


def _bank(
    in_features: int, experts: int | Sequence[Any], count: int, sizes: Mapping[str, Any], factory: Mapping[str, Any]
) -> nn.Module | None:
    if not count:
        return None
    if _given(experts):
        return ModuleBank(_flat(experts))
    return Experts(in_features, num_experts=count, **sizes, **factory)


def _flat(experts: Sequence[Any]) -> Iterator[nn.Module]:
    for one in experts:
        if isinstance(one, nn.Module) and not isinstance(one, nn.ModuleList):
            yield one
        else:
            yield from one


def _count(name: str, experts: object, T: int | None = None) -> int:
    """How many experts there are: of ``T`` lists of modules in all."""
    if not _given(experts):
        count = integer(name, experts)
        if count < 0:
            raise ValueError(f"{name}: expected 0 or more, got {count}")
        no_more(name, count, LARGEST // (T or 1))
        return count * (T or 1)
    groups: Any = [experts] if T is None else experts
    if T is not None and (len(groups) != T or not all(_given(g) for g in groups)):
        raise ValueError(f"{name}: expected a list of modules per task, {T} of them, got {len(groups)} entries")
    for group in groups:
        for one in group:
            if not isinstance(one, nn.Module):
                raise TypeError(f"{name}: expected modules, got {type(one).__name__}")
        if len(group) != len(groups[0]):
            raise ValueError(f"{name}: expected as many for every task, got {[len(g) for g in groups]}")
    return sum(len(group) for group in groups)


def _given(experts: object) -> TypeGuard[Sequence[Any]]:
    """Whether experts are modules, and not a number of them."""
    return isinstance(experts, (Sequence, nn.ModuleList)) and not isinstance(experts, str)


def _sizes(hidden: int | None, out: int | None, activation: str, experts: Sequence[Any]) -> dict[str, Any]:
    numbers = any(not _given(one) and one != 0 for one in experts)
    if numbers and out is None:
        raise ValueError("out_features: expected a number, as experts are given by their number, got None")
    if any(map(_given, experts)) and not numbers and (out is not None or hidden is not None):
        raise ValueError("hidden_features, out_features: expected None, as the experts are modules")
    return {"hidden_features": hidden, "out_features": out, "activation": activation}


def _per_level(
    in_features: Any, own: Any, shared: Any, levels: Several | None, out: int | None
) -> Iterator[tuple[int, Any, Any]]:
    """(D, task experts, shared experts) of each level."""
    lists = [k for k, v in (("task_experts", own), ("shared_experts", shared)) if _given(v)]
    if not lists:
        for number in range(at_least_one("levels", 2 if levels is None else levels)):
            yield (in_features if number == 0 else out), own, shared  # type: ignore[misc]
        return
    if len(lists) < 2 or not isinstance(in_features, Sequence):
        raise ValueError(
            "in_features, task_experts, shared_experts: expected one of each per level where experts are modules, "
            f"got {type(in_features).__name__}, {type(own).__name__}, {type(shared).__name__}"
        )
    counts = [len(in_features), len(own), len(shared)]
    if len(set(counts)) > 1 or counts[0] < 1 or levels not in (None, counts[0]):
        raise ValueError(
            f"in_features, task_experts, shared_experts: expected as many as there are levels, got {counts}"
            + (f" and levels={levels}" if levels is not None else "")
        )
    yield from zip(in_features, own, shared, strict=True)
