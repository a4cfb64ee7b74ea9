"""Networks of routings put together: residuals, concatenations and parallel paths, whose credit is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import checks
from ..ops.arguments import checked


def _of(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """What a part gives for x."""
    y: Any = module(x)
    if not isinstance(y, Tensor):
        hint = "; set its return_dict to False" if isinstance(y, dict) else ""
        raise TypeError(f"{name}: expected to return a tensor [..., m, h], got {type(y).__name__}{hint}")
    return y


class Residual(nn.Module):
    """``x + module(x)``: as many vectors out as in. Its credit is 1 + that of the module.

    Args:
        module: its output has the input's shape.

    Examples:
        >>> block = fastroute.capsules.Residual(fastroute.EfficientVectorRouting(6, 6, 8, 8))
        >>> block(torch.randn(4, 6, 8)).shape
        torch.Size([4, 6, 8])
    """

    @checked
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n, d] to [..., n, d]."""
        checks.tensor("x", x, "a tensor [..., n, d]")
        y = _of("module", self.module, x)
        if y.shape != x.shape:
            raise ValueError(f"module: expected to return {checks.shown(x)}, like x, got {checks.shown(y)}")
        return x + y


class _Branches(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        if not modules:
            raise ValueError("modules: expected at least one, got none")
        self.branches = nn.ModuleList(modules)


class Concatenate(_Branches):
    """``cat([a(x), b(x), ...], -2)``: every branch's vectors, in order. Its credit has the branches' columns.

    Args:
        modules: the branches a, b, ..., each of the same input, with outputs of one width.

    Examples:
        >>> route = lambda m: fastroute.EfficientVectorRouting(6, m, 8, 8)
        >>> side_by_side = fastroute.capsules.Concatenate(route(3), route(2))
        >>> side_by_side(torch.randn(4, 6, 8)).shape
        torch.Size([4, 5, 8])
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n, d] to [..., m_a + m_b + ..., h]."""
        return torch.cat([_of("modules", branch, x) for branch in self.branches], -2)


class Add(_Branches):
    """``a(x) + b(x) + ...``: parallel paths. Its credit is the sum of the branches'.

    Args:
        modules: the branches a, b, ..., each of the same input, with outputs of one shape.

    Examples:
        >>> route = lambda: fastroute.EfficientVectorRouting(6, 3, 8, 8)
        >>> both = fastroute.capsules.Add(route(), route())
        >>> both(torch.randn(4, 6, 8)).shape
        torch.Size([4, 3, 8])
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n, d] to [..., m, h]."""
        y = _of("modules", self.branches[0], x)
        for branch in self.branches[1:]:
            y = y + _of("modules", branch, x)
        return y
