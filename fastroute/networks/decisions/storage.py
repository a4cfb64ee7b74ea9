"""Where a decision keeps what it knows: per agent a network on the input, or a table's row."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...functional import grouped_linear
from ...modules.reading import Memo, Proof, may_be_read
from ...ops import dispatch
from ...ops.autograd import transformed
from ...ops.checks import given as shown
from ...ops.checks import together
from ...ops.dispatch.contract import Plan
from ...ops.host import is_exporting
from ...ops.precision import autocast_dtype
from .. import grouped_modules
from ..mlp import MLP
from ..stacked_modules import Stack, from_stack


class ApproxPolicyStorage(nn.Module):
    """A network on the input, ``_approx``: an :class:`~fastroute.networks.MLP`, or a copy of the user's.

    Args:
        approx: the user's network, copied; None: an MLP.
        in_features, num_selections, hidden_dims: of the MLP.
        detach: keep gradients from flowing into the input.

    Examples:
        >>> storage = fastroute.networks.decisions.ApproxPolicyStorage(None, 8, 3, hidden_dims=(16,))
        >>> storage(torch.randn(4, 8)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        approx: nn.Module | None,
        in_features: int | Sequence[int] | None,
        num_selections: int,
        hidden_dims: int | Sequence[int] = (),
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
        try:
            self._approx = MLP(in_features, num_selections, hidden_dims, device=device, dtype=dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"in_features, approx_hidden_dims: {error}") from error

    def inputs(self, x: Tensor) -> Tensor:
        """What ``_approx`` is given: [B, ...], flattened for an MLP."""
        if type(self._approx) is MLP and x.dim() > 2:
            x = x.flatten(1)
        return x.detach() if self._detach else x

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, num_selections]."""
        return self._approx(self.inputs(x))


grouped_modules.CHAINS[ApproxPolicyStorage] = lambda storage: [storage._approx]


class TabularPolicyStorage(nn.Module):
    """A row of a table, ``_approx`` [1, num_selections], for whatever input; 1 / num_selections at first.

    Args:
        num_selections: how many numbers there are.
        device, dtype: of the table.

    Examples:
        >>> fastroute.networks.decisions.TabularPolicyStorage(4)(torch.randn(2, 8)).tolist()
        [[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]]
    """

    def __init__(
        self, num_selections: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self._approx = nn.Parameter(torch.empty(1, num_selections, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """1 / num_selections for every choice."""
        nn.init.constant_(self._approx, 1 / self._approx.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, num_selections]."""
        return self._approx.expand(x.shape[0], -1)


class _Recipe(grouped_modules.Recipe):
    """Of storages, which have it in common if they give their networks the same, too."""

    def _found(self, modules: list[Any], seen: Any) -> Any:
        made = super()._found(modules, seen)
        return made if _give_the_same(modules) else None


def _give_the_same(agents: Sequence[Any]) -> bool:
    if set(map(type, agents)) != {ApproxPolicyStorage}:
        return False
    return len({(s._detach, type(s._modules.get("_approx")) is MLP) for s in agents}) == 1


class Storages(nn.ModuleList):
    """A storage per agent, of so many outputs."""

    def __init__(self, storages: Iterable[nn.Module], outputs: int) -> None:
        super().__init__(storages)
        self.outputs = outputs
        self.recipe, self.memo = _Recipe(), Memo()

    def owners(self) -> list[Any]:
        """The modules that have parameters: every agent's storage."""
        return list(self)

    each = owners

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        from_stack(state_dict, prefix, len(self))
        super()._load_from_state_dict(state_dict, prefix, *args)


class StackedStorages(Stack):
    """The same with all agents' parameters in one tensor of each kind."""

    def __init__(self, storages: Iterable[nn.Module], outputs: int) -> None:
        super().__init__(list(storages))
        self.outputs = outputs
        self.recipe, self.memo = _Recipe(), Memo()

    def _do_alike(self, modules: Sequence[Any]) -> bool:
        return type(modules[0]) is TabularPolicyStorage or grouped_modules.are_alike(modules)

    def owners(self) -> list[Any]:
        """The modules that have parameters: one storage for all agents."""
        return [self.pattern]


AnyStorages = Storages | StackedStorages


def as_storages(name: str, given: Any, outputs: int, agents: int) -> AnyStorages:
    """What a user puts in the place of a decision's storages: a module per agent, [B, ...] -> [B, outputs]."""
    if isinstance(given, AnyStorages):
        return given
    if not isinstance(given, nn.ModuleList) or len(given) != agents:
        what = f"one of {len(given)}" if isinstance(given, nn.ModuleList) else shown(given)
        raise TypeError(f"{name}: expected an nn.ModuleList of {agents}, a storage per agent, got {what}")
    return Storages(given, outputs)


def _tables(storages: AnyStorages, agents: Sequence[Any]) -> list[Tensor] | None:
    """Tables [1, K], or one of all agents [A, K]; None where the storages are none, or have to be called."""
    if type(agents[0]) is not TabularPolicyStorage:
        return None
    if torch.compiler.is_compiling() or transformed():  # a graph is guarded by what it reads, not by a memo
        are_tables = _are_tables(agents)
    else:
        known = storages.memo.known
        if known is None or not known[0].holds(agents):
            known = storages.memo.known = Proof(agents, agents), _are_tables(agents)
        are_tables = known[1]
    if not are_tables:
        return None
    found = [s._parameters["_approx"] for s in agents]
    return [t.view(-1, t.shape[-1]) for t in found] if found[0].dim() == 3 else found


def _are_tables(agents: Sequence[Any]) -> bool:
    """Whether they may be read, and are of one form."""
    if not all(type(s) is TabularPolicyStorage and may_be_read(s) for s in agents):
        return False
    found = [s._parameters.get("_approx") for s in agents]
    first = found[0]
    return all(
        t is not None and (t.shape, t.dtype, t.device) == (first.shape, first.dtype, first.device) for t in found
    )


def ask(storages: AnyStorages, x: Tensor, plan: Plan | None, *, differentiable_twice: bool = False) -> Tensor:
    """[B, out]: every sample's agent's answer, zeros where the plan drops a sample; ``plan`` None: agent 0 for all."""
    agents = storages.owners()
    first = agents[0]
    if plan is None:
        return storages.each()[0](x)
    tables = _tables(storages, agents)
    if tables is not None:
        if differentiable_twice:
            whose = torch.empty_like(plan.order).index_copy(
                0, plan.order, dispatch.module_of_row(plan.offsets, plan.order.shape[0])
            )
            return torch.cat([*tables, torch.zeros_like(tables[0][:1])])[whose]
        return grouped_linear(None, plan, (), tables)
    return grouped_modules.run(
        agents, x, plan, storages.recipe, differentiable_twice=differentiable_twice, called=storages.each,
        inputs=lambda given: first.inputs(given),  # a user's own storage, which is called, need not have it
    )  # fmt: skip


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
    agents = storages.owners()
    first = agents[0]
    tables = _tables(storages, agents)
    if tables is not None:
        together(("the policies' tables", tables[0]), {"batch": x})
        return Head(None, [], tables)
    found = grouped_modules.up_to_the_last(
        agents, x, plan, storages.recipe, lambda given: first.inputs(given), alone=alone
    )
    if found is None or found[1][0].device != x.device:
        return None
    given, weights, biases, is_direct = found
    K, F = weights[0].shape[-2:]
    if storages.outputs != K or given.dim() != 2 or given.shape[1] != F:
        return None
    if given.dtype != weights[0].dtype and autocast_dtype(x.device.type) is None:
        return None
    if plan is None and not is_exporting() and given.shape[0] * K * F > _LARGE:
        return None
    return Head(given, weights, biases, (is_direct, first._detach))


#: A product of one agent with more multiply-adds is the library's. On an AMD EPYC, where MKL is slow, the op is 1.2 to
#: 1.4 times as fast on both sides (``bench/calibrate_thresholds.py``); other processors have not been measured.
_LARGE = 1 << 26
