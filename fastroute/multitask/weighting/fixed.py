"""Weightings without anything to learn: fixed numbers, random ones, and means of another kind.

Axes: T tasks, n of which are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import Weighting, in_order, log, softmax, total


class EqualWeights(Weighting):
    """sum_i L_i. The baseline that is hard to beat (Kurin et al. 2022, "In Defense of the Unitary Scalarization")."""

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        return total(losses, present)


class FixedWeights(Weighting):
    """sum_i w_i L_i with numbers of your own.

    Args:
        weights: a dict by task, or a list.
        tasks: the tasks' names and their order; those of the dict without it.

    Raises:
        ValueError: a task of ``tasks`` has no weight, or a weight no task.
    """

    weights: Tensor

    def __init__(
        self,
        weights: Mapping[str, float] | Sequence[float],
        tasks: Sequence[str] | int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if tasks is None:
            tasks = list(weights) if isinstance(weights, Mapping) else len(weights)
        super().__init__(tasks)
        numbers = in_order("weights", weights, self.tasks)
        for name, w in zip(self.tasks, numbers, strict=True):
            if w is None:
                raise ValueError(f"weights: expected a number for {name!r}, got none")
        values = torch.tensor([float(w) for w in numbers], device=device, dtype=dtype or torch.get_default_dtype())
        self.register_buffer("weights", values, persistent=False)

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        return total(self.weights * losses, present)


class RLW(Weighting):
    """Random loss weighting (Lin et al. 2022, "Reasonable Effectiveness of Random Weighting"): weights drawn anew at
    every call, w = softmax(z), z ~ N(0, 1) per task; in evaluation their mean, 1 / n.

    Args:
        tasks: names, or how many.
        generator: of the draws, on the losses' device; PyTorch's own without it.
    """

    def __init__(
        self,
        tasks: Sequence[str] | int,
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
            if self.generator is None:  # torch.compile takes no generator
                drawn = torch.randn_like(losses)
            else:
                drawn = torch.randn(losses.shape, generator=self.generator, device=losses.device, dtype=losses.dtype)
        return (softmax(drawn, present) * losses).sum()


class GeometricMean(Weighting):
    """Geometric loss strategy (GLS, Chennupati et al. 2019, "MultiNet++"): (prod_i L_i)^(1/n).

    No scale of a loss matters to the others. Made of logarithms, so that it neither overflows nor vanishes with
    hundreds of tasks. Losses are to be positive: a negative one gives NaN, one of exactly 0 has no gradient.
    """

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        logs = log(losses)
        if present is None:
            return logs.mean().exp()
        count = present.sum()
        mean = total(logs, present) / count.clamp_min(1)
        return torch.where(count > 0, mean.exp(), 0)


class STCH(Weighting):
    """Smooth Tchebycheff scalarization (Lin et al. 2024): mu log sum_i exp(lambda_i (f_i - z_i) / mu).

    A smooth maximum: mu -> 0 attends to the worst task alone. Without ``warmup`` f_i is the loss itself. With it, those
    of different scales are comparable, as in the authors' code: for that many epochs the total is sum_i log L_i; the
    mean of every loss in the last of them is its nadir N_i, and from then on f_i = log(L_i / N_i).

    Args:
        tasks: names, or how many.
        mu: smoothness, above 0.
        weights: lambda, a dict by task or a list; 1 / T each by default.
        reference: z, the best that each f_i could be; 0 by default.
        warmup: epochs, counted by ``step()``.
    """

    weights: Tensor
    reference: Tensor
    nadir: Tensor
    summed: Tensor
    counted: Tensor
    epoch: Tensor

    def __init__(
        self,
        tasks: Sequence[str] | int,
        mu: float = 1.0,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        reference: Mapping[str, float] | Sequence[float] | None = None,
        *,
        warmup: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks)
        if not mu > 0:
            raise ValueError(f"mu: expected more than 0, got {mu}")
        if warmup < 0:
            raise ValueError(f"warmup: expected a number of epochs, got {warmup}")
        self.mu, self.warmup = float(mu), warmup
        T = len(self.tasks)
        numbers = FixedWeights([1 / T] * T if weights is None else weights, self.tasks, device=device, dtype=dtype)
        best = FixedWeights([0.0] * T if reference is None else reference, self.tasks, device=device, dtype=dtype)
        self.register_buffer("weights", numbers.weights, persistent=False)
        self.register_buffer("reference", best.weights, persistent=False)
        like = numbers.weights
        self.register_buffer("nadir", torch.ones_like(like))
        self.register_buffer("summed", torch.zeros_like(like))
        self.register_buffer("counted", torch.zeros_like(like))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64, device=like.device))

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        f = losses if self.warmup == 0 else log(losses) - self.nadir.log()
        z = self.weights * (f - self.reference) / self.mu
        if present is None:
            smooth = self.mu * z.logsumexp(0)
        else:
            z = torch.where(present, z, -torch.inf)
            none = ~present.any()
            smooth = self.mu * torch.where(none, 0, torch.where(none, 0, z).logsumexp(0))
        if self.warmup == 0:
            return smooth
        if self.training:
            self.summed.add_(losses.detach())
            self.counted.add_(1 if present is None else present)
        return torch.where(self.epoch < self.warmup, total(f, present), smooth)

    @torch.no_grad()
    def step(self) -> None:
        """The end of an epoch: counts those of the warm-up, the last of which gives the nadir."""
        known = (self.epoch == self.warmup - 1) & (self.counted > 0)
        self.nadir.copy_(torch.where(known, self.summed / self.counted.clamp_min(1), self.nadir))
        self.epoch.add_(1)
        self.summed.zero_()
        self.counted.zero_()


__all__ = ["RLW", "STCH", "EqualWeights", "FixedWeights", "GeometricMean"]
