"""Where a decision keeps what it knows: per agent a network on the input, or a table's row."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...ops import dispatch, grouped_linear
from ...ops._autocast import autocast_dtype
from ...ops.dispatch import Plan
from .. import bank
from ..mlp import MLP
from ..stack import Stack


class ApproxPolicyStorage(nn.Module):
    """A network on the input, ``_approx``: an :class:`~fastroute.networks.MLP`, or a copy of the user's.

    Args:
        approx: the user's network, copied; None: an MLP.
        in_features, num_selections, hidden_dims: of the MLP.
        detach: keep gradients from flowing into the input.
    """

    def __init__(
        self,
        approx: nn.Module | None,
        in_features: int | Sequence[int] | None,
        num_selections: int,
        hidden_dims: Sequence[int] = (),
        detach: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._detach = detach
        if approx is not None:
            self._approx = copy.deepcopy(approx)
            return
        if in_features is None:
            raise ValueError("in_features: expected the number of input features, got None (only tables do without)")
        self._approx = MLP(in_features, num_selections, hidden_dims, device=device, dtype=dtype)

    def inputs(self, x: Tensor) -> Tensor:
        """What ``_approx`` is given: [B, ...], flattened for an MLP."""
        if type(self._approx) is MLP and x.dim() > 2:
            x = x.flatten(1)
        return x.detach() if self._detach else x

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, num_selections]."""
        made: Tensor = self._approx(self.inputs(x))
        return made


class TabularPolicyStorage(nn.Module):
    """A row of a table, ``_approx`` [1, num_selections], for whatever input; 1 / num_selections at first."""

    def __init__(
        self, num_selections: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self._approx = nn.Parameter(torch.full((1, num_selections), 1 / num_selections, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, num_selections]."""
        return self._approx.expand(len(x), -1)


class Storages(nn.ModuleList):
    """A storage per agent, of so many outputs."""

    def __init__(self, storages: Iterable[nn.Module], outputs: int) -> None:
        super().__init__(storages)
        self.outputs = outputs
        self.recipe = bank.Recipe()

    def each(self) -> list[Any]:
        """Whoever has parameters: every agent's storage."""
        return list(self)


class StackedStorages(Stack):
    """The same with all agents' parameters in one tensor of each kind."""

    def __init__(self, storages: Iterable[nn.Module], outputs: int) -> None:
        super().__init__(list(storages))
        self.outputs = outputs
        self.recipe = bank.Recipe()

    def _do_alike(self, modules: Sequence[Any]) -> bool:
        own = [m._modules.get("_approx") for m in modules]
        return type(modules[0]) is TabularPolicyStorage or (None not in own and bank.are_alike(own))  # type: ignore[arg-type]

    def each(self) -> list[Any]:
        """Whoever has parameters: one storage for all agents."""
        return [self.pattern]


AnyStorages = Storages | StackedStorages


def _tables(agents: Sequence[Any]) -> list[Any]:
    """Tables [1, K], or one of all agents [A, K]."""
    found = [s._parameters.get("_approx") for s in agents]
    return [t.view(-1, t.shape[-1]) if t is not None and t.dim() == 3 else t for t in found]


def ask(storages: AnyStorages, x: Tensor, plan: Plan | None, *, differentiable_twice: bool = False) -> Tensor:
    """[B, out]: every sample's agent's answer, zeros where the plan drops a sample; ``plan`` None: agent 0 for all."""
    agents = storages.each()
    first = agents[0]
    if plan is None:
        return first(x)  # type: ignore[no-any-return]
    if isinstance(first, TabularPolicyStorage):
        tables = _tables(agents)
        if differentiable_twice:
            whose = torch.empty_like(plan.order).index_copy(
                0, plan.order, dispatch.module_of_row(plan.offsets, len(plan.order))
            )
            return torch.cat([*tables, torch.zeros_like(tables[0][:1])])[whose]
        return grouped_linear(None, plan, (), tables)
    return bank.run(
        [s._modules["_approx"] for s in agents],
        first.inputs(x),
        plan,
        storages.recipe,
        differentiable_twice=differentiable_twice,
    )


class Head(NamedTuple):
    """The last layer of every agent, for an op that does not need its answer made first, and what it is given."""

    x: Tensor | None  #: None: tables
    weights: list[Tensor]
    biases: list[Tensor]
    sees: tuple[bool, bool] = (False, False)  #: whether it is given the batch itself, and detached


def heads(
    storages: AnyStorages, critics: AnyStorages | None, x: Tensor, plan: Plan | None
) -> tuple[Head | None, Head | None]:
    """The last layers of a policy and of its critic, to be given one input; None where :func:`ask` has to answer."""
    own = _head(storages, x, plan)
    if own is None or critics is None:
        return own, None
    judge = _head(critics, x, plan, alone=own.x is not None)
    if own.x is None or judge is None or judge.x is None or (own.sees[0] and own.sees == judge.sees):
        return own, judge
    return own, None


def _head(storages: AnyStorages, x: Tensor, plan: Plan | None, *, alone: bool = False) -> Head | None:
    agents = storages.each()
    first = agents[0]
    if plan is None and (type(first) not in (ApproxPolicyStorage, TabularPolicyStorage) or is_observed(first)):
        return None
    if isinstance(first, TabularPolicyStorage):
        tables = _tables(agents)
        fit = all(t is not None for t in tables) and _fits([s._parameters["_approx"] for s in agents], x)
        return Head(None, [], tables) if fit else None
    modules = [s._modules["_approx"] for s in agents]
    found = bank.up_to_the_last(modules, first.inputs(x), plan, storages.recipe, alone=alone)  # type: ignore[arg-type]
    if found is None or not _fits(found[1], x):
        return None
    given, weights, biases, is_direct = found
    K, F = weights[0].shape[-2:]
    if storages.outputs != K or given.dim() != 2 or given.shape[1] != F:
        return None
    if given.dtype != weights[0].dtype and autocast_dtype(x.device.type) is None:
        return None
    if plan is None and given.shape[0] * K * F > _LARGE:
        return None
    return Head(given, weights, biases, (is_direct, first._detach))


#: A product of one agent with more multiply-adds is the library's.
_LARGE = 1 << 26


def _fits(parameters: Sequence[Any], x: Tensor) -> bool:
    """Whether they are plain tensors where x is."""
    first = parameters[0]
    return first.device == x.device and (type(first) is nn.Parameter or not is_traceable_wrapper_subclass(first))


def is_observed(m: nn.Module) -> bool:
    """Whether somebody looks at a storage being called, or has exchanged what a call of it or of its parts does."""
    return any(bank._hooks(m)) or any("forward" in part.__dict__ for part in m.modules())
