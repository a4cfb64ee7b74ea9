"""Where a decision keeps what it knows: per agent a network on the input, or a table's row."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import dispatch, grouped_linear
from ...ops.dispatch import Plan
from .. import bank
from ..mlp import MLP


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


def ask(storages: Storages, x: Tensor, plan: Plan | None, *, differentiable_twice: bool = False) -> Tensor:
    """[B, out]: every sample's agent's answer, zeros where the plan drops a sample; ``plan`` None: agent 0 for all."""
    agents: list[Any] = list(storages)
    first = agents[0]
    if plan is None:
        return first(x)  # type: ignore[no-any-return]
    if isinstance(first, TabularPolicyStorage):
        tables = [s._parameters["_approx"] for s in agents]
        if differentiable_twice:
            whose = torch.empty_like(plan.order).index_copy(
                0, plan.order, dispatch.module_of_row(plan.offsets, len(plan.order))
            )
            return torch.cat([*tables, torch.zeros_like(tables[0])])[whose]
        return grouped_linear(None, plan, (), tables)
    return bank.run(
        [s._modules["_approx"] for s in agents],
        first.inputs(x),
        plan,
        storages.recipe,
        differentiable_twice=differentiable_twice,
    )
