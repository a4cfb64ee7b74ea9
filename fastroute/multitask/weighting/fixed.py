"""Weightings that neither learn nor remember: fixed numbers, random ones, and means of another kind.

Axes: T tasks, n of which are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...ops.arguments import Tasks, checked
from ...ops.recomputation import draws_of
from .base import Weighting, fill, log, memory_dtype, numbers, softmax, total


class EqualWeights(Weighting):
    """sum_i L_i. The baseline that is hard to beat (Kurin et al. 2022, "In Defense of the Unitary Scalarization").

    The arguments are :class:`Weighting`'s.

    Examples:
        >>> float(fastroute.EqualWeights(["price", "kind"])(torch.tensor([4.0, 1.0])))
        5.0
    """

    stateless: ClassVar[bool] = True

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        return total(losses, present)


class FixedWeights(Weighting):
    """sum_i w_i L_i with numbers of your own.

    Args:
        weights: a dict by task, or a list.
        tasks: the tasks' names and their order; those of the dict without it.

    Raises:
        ValueError: a task of ``tasks`` has no weight, or a weight no task.

    Examples:
        >>> weighting = fastroute.FixedWeights({"price": 0.5, "kind": 3.0})
        >>> float(weighting({"kind": torch.tensor(1.0), "price": torch.tensor(4.0)}))
        5.0
    """

    stateless: ClassVar[bool] = True
    weights: Tensor

    @checked
    def __init__(
        self,
        weights: Mapping[str, float] | Sequence[float],
        tasks: Tasks | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if tasks is None:
            tasks = list(weights) if isinstance(weights, Mapping) else len(weights)
        super().__init__(tasks)
        self._numbers = numbers("weights", weights, self.tasks)
        values = torch.empty(len(self.tasks), device=device, dtype=memory_dtype(dtype))
        self.register_buffer("weights", values, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to the numbers that were given."""
        fill(self.weights, self._numbers)

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        return total(self.weights * losses, present)


class RLW(Weighting):
    """Random loss weighting (Lin et al. 2022, "Reasonable Effectiveness of Random Weighting"): new weights at
    every call, w = softmax(z), z ~ N(0, 1) per task; in evaluation their mean, 1 / n.

    Args:
        tasks: names, or how many.
        generator: of the draws, on the losses' device; PyTorch's own without it.

    Examples:
        >>> weighting = fastroute.RLW(["price", "kind"]).eval()
        >>> float(weighting(torch.tensor([4.0, 1.0])))
        2.5
    """

    stateless: ClassVar[bool] = True

    @checked
    def __init__(
        self,
        tasks: Tasks,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks)
        self.generator = generator

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        drawn = torch.zeros_like(losses)
        if self.training:
            drawn = torch.randn(losses.shape, device=losses.device, dtype=losses.dtype, **draws_of(self.generator))
        return (softmax(drawn, present) * losses).sum()


class GeometricMean(Weighting):
    """Geometric loss strategy (GLS, Chennupati et al. 2019, "MultiNet++"): (prod_i L_i)^(1/n).

    No scale of a loss matters to the others. Made of logarithms, so that it neither overflows nor vanishes with
    hundreds of tasks. Losses are to be positive: a negative one gives NaN, one of exactly 0 makes it 0 without a
    gradient.

    The arguments are :class:`Weighting`'s.

    Examples:
        >>> float(fastroute.GeometricMean(["price", "kind"])(torch.tensor([4.0, 1.0])))
        2.0
    """

    stateless: ClassVar[bool] = True

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        logs, stops = log(losses), losses == 0
        if present is None:
            return logs.mean().exp() * ~stops.any()
        count = present.sum()
        mean = total(logs, present) / count.clamp_min(1)
        return torch.where(count > 0, mean.exp() * ~(stops & present).any(), 0)


__all__ = ["RLW", "EqualWeights", "FixedWeights", "GeometricMean"]
