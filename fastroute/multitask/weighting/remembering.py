"""Weightings that remember losses: what is remembered, and from which calls.

Axes: T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...modules import watching
from ...ops.arguments import NotNegative, Positive, Tasks, checked
from .base import Losses, Present, Weighting, fill, log, memory_dtype, numbers, softmax, total

#: Rows of a record: of every call that may be one of training, and of those whose total was back-propagated.
CALLED, TRAINED = 0, 1


class Remembering(Weighting):
    """A weighting that remembers the losses it was trained on, and not those that were only read.

    A call in evaluation, or without gradients (``torch.no_grad()``), leaves no trace. Of the other calls those count
    whose total was back-propagated, each once. Where none was, all of them count: in a compiled graph, which does not
    tell, and where a weighting is used without a backward pass. A loss that is NaN or infinite is never remembered.

    So a record is a buffer [2, T], with a row ``CALLED`` and a row ``TRAINED``. ``records`` names those of a class.
    """

    records: ClassVar[tuple[str, ...]]
    is_recording = True  #: of an instance: whether it needs what it would record

    def __init__(self, tasks: Tasks, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__(tasks, device=device)
        for name in self.records:
            self.register_buffer(name, torch.empty(2, len(self.tasks), device=device, dtype=memory_dtype(dtype)))

    def reset_parameters(self) -> None:
        """Forget everything."""
        super().reset_parameters()
        self.forget()

    def forget(self) -> None:
        """Empty the records."""
        for name in self.records:
            self.get_buffer(name).zero_()

    def forward(self, losses: Losses, present: Present | None = None) -> Tensor:
        """As every weighting's."""
        values, here = self.gather(losses, present)
        made = self.combine(values, here)
        watching.tell(self, "losses", self.tasks, values, made)
        if self.is_recording and self.training and torch.is_grad_enabled():
            read, there = finite(values.detach(), here)
            self.record(CALLED, read, there)
            if made.requires_grad and not torch.compiler.is_compiling():
                self._record_when_trained(made, read, there)
        return made

    def _record_when_trained(self, made: Tensor, losses: Tensor, present: Tensor) -> None:
        def record(_: Tensor) -> None:
            handle.remove()  # a graph may be walked more than once
            with torch.no_grad():
                self.record(TRAINED, losses, present)

        handle = made.register_hook(record)

    def record(self, row: int, losses: Tensor, present: Tensor) -> None:
        """Remember the losses [T] of a call, where ``present`` [T]."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Records [T] are of a version in which all calls counted."""
        for key in (prefix + name for name in self.records):
            if isinstance(given := state_dict.get(key), Tensor) and given.dim() == 1:
                state_dict[key] = torch.stack([given] * 2)
        super()._load_from_state_dict(state_dict, prefix, *args)


def finite(losses: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses [T] that can be remembered, 0 in place of the others, and which they are."""
    there = losses.isfinite()
    return torch.where(there, losses, 0), there if present is None else present & there


def of_training(record: Tensor, trained: Tensor) -> Tensor:
    """The row of a record [2, T] that counts."""
    return torch.where(trained, record[TRAINED], record[CALLED])


class EpochMeans(Remembering):
    """A weighting that looks at every epoch's mean losses."""

    records = ("summed", "counted")
    summed: Tensor
    counted: Tensor

    def record(self, row: int, losses: Tensor, present: Tensor) -> None:
        """Add to the epoch's sums."""
        self.summed[row].add_(losses)
        self.counted[row].add_(present)

    def end_epoch(self) -> Tensor:
        """The means [T] of the epoch that ends, NaN of a task without a loss."""
        trained = self.counted[TRAINED].any()
        mean = of_training(self.summed, trained) / of_training(self.counted, trained)
        self.forget()
        return mean


class DWA(EpochMeans):
    """Dynamic weight average (Liu, Johns and Davison 2019, eq. 7): sum_i w_i L_i, w = T softmax(r / temperature).

    r_i is the mean loss of the last epoch over that of the one before: what falls slowly weighs more. In the first two
    epochs all weigh 1, and so does for r a task that had no loss in one of the two. Means are made of the losses of
    calls in training; ``step()`` ends an epoch.

    Args:
        tasks: names, or how many.
        temperature: above 0; the larger, the more even.

    Attributes:
        weights: w of this epoch, [T].

    Examples:
        >>> weighting = fastroute.DWA(["price", "kind"], temperature=2.0)
        >>> for loss in (4.0, 2.0):  # price halves in an epoch, kind does not move
        ...     total = weighting(torch.tensor([loss, 1.0]))
        ...     weighting.step()
        >>> bool(weighting.weights[1] > weighting.weights[0])
        True
    """

    weights: Tensor
    last: Tensor

    @checked
    def __init__(
        self,
        tasks: Tasks,
        temperature: Positive = 2.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks, device=device, dtype=dtype)
        self.temperature = float(temperature)
        for name in ("weights", "last"):
            self.register_buffer(name, torch.empty(len(self.tasks), device=device, dtype=memory_dtype(dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with the first epoch again."""
        super().reset_parameters()
        self.weights.fill_(1)
        self.last.fill_(torch.nan)  # not seen yet

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        # A copy: the buffer may change before the backward pass.
        return total(self.weights.clone() * losses, present)

    @torch.no_grad()
    def step(self) -> None:
        """The end of an epoch: weights for the next, from the means of this one and the one before."""
        mean = self.end_epoch()
        ratio = mean / self.last
        ratio = torch.where(ratio.isfinite(), ratio, 1)
        self.weights.copy_(len(self.tasks) * (ratio / self.temperature).softmax(0))
        self.last.copy_(mean)


class FAMO(Remembering):
    """Fast adaptive multitask optimization (Liu et al. 2023, algorithm 1): sum_i z_i log(D_i) / sum_j (z_j / D_j).

    D_i = L_i - min_i + 1e-8, z = softmax(xi), the denominator without gradient. ``update(losses)``, with the losses of
    the same batch after the optimizer's step, moves xi by Adam along J_softmax(xi)^T (log D - log D'), so that the
    losses fall at the same rate. xi is no parameter of the model and has its own optimizer here.

    Args:
        tasks: names, or how many.
        min_losses: the lowest that each loss could be; 0 by default. What is below counts as there.
        lr: Adam's, of xi.
        weight_decay: of xi, added to its gradient.

    Attributes:
        logits: xi, [T].

    Examples:
        >>> weighting = fastroute.FAMO(["price", "kind"])
        >>> total = weighting(torch.tensor([4.0, 1.0], requires_grad=True))
        >>> total.backward()  # and the optimizer's step
        >>> weighting.update(torch.tensor([3.0, 1.0]))  # the losses of the same batch now
        >>> weighting.logits.shape
        torch.Size([2])
    """

    records = ("before", "seen")  # seen is 0 or 1, no bool: some tools average buffers
    logits: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor
    before: Tensor
    seen: Tensor
    min_losses: Tensor

    @checked
    def __init__(
        self,
        tasks: Tasks,
        min_losses: Mapping[str, float] | Sequence[float] | None = None,
        lr: NotNegative = 0.025,
        weight_decay: NotNegative = 1e-3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks, device=device, dtype=dtype)
        self.lr, self.weight_decay = lr, weight_decay
        T, dtype = len(self.tasks), memory_dtype(dtype)
        self._lowest = [0.0] * T if min_losses is None else numbers("min_losses", min_losses, self.tasks, 0.0)
        self.register_buffer("min_losses", torch.empty(T, device=device, dtype=dtype), persistent=False)
        for name in ("logits", "exp_avg", "exp_avg_sq"):
            self.register_buffer(name, torch.empty(T, device=device, dtype=dtype))
        self.register_buffer("steps", torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with equal weights again."""
        super().reset_parameters()
        fill(self.min_losses, self._lowest)
        for t in (self.logits, self.exp_avg, self.exp_avg_sq, self.steps):
            t.zero_()

    def _log(self, losses: Tensor) -> Tensor:
        return ((losses - self.min_losses).clamp_min(0) + 1e-8).log()

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        logs = self._log(losses)
        z = softmax(self.logits, present)
        c = (z * (-logs.detach()).exp()).sum()
        c = torch.where(c > 0, c, 1)  # nothing is there
        return total(z * logs, present) / c

    def record(self, row: int, losses: Tensor, present: Tensor) -> None:
        """Keep log D from before the optimizer's step."""
        self.before[row].copy_(self._log(losses))
        self.seen[row].copy_(present)

    @torch.no_grad()
    def update(self, losses: Losses, present: Present | None = None) -> None:
        """Move the weights.

        Args:
            losses: of the batch that was trained on last, after the optimizer's step, in the same form.
            present: as in ``forward``.
        """
        values, here = finite(*self.gather(losses, present))
        trained = self.seen[TRAINED].any()
        seen, before = of_training(self.seen, trained) > 0, of_training(self.before, trained)
        self.seen[TRAINED].zero_()
        both = seen & here
        delta = torch.where(both, before - self._log(values), 0).to(self.logits.dtype)
        z = softmax(self.logits, both)
        grad = z * (delta - (z * delta).sum()) + self.weight_decay * self.logits
        self.steps.add_(1)
        self.exp_avg.lerp_(grad, 0.1)
        self.exp_avg_sq.lerp_(grad.square(), 0.001)
        mean = self.exp_avg / (1 - 0.9**self.steps)
        spread = self.exp_avg_sq / (1 - 0.999**self.steps)
        self.logits.sub_(self.lr * mean / (spread.sqrt() + 1e-8))


class STCH(EpochMeans):
    """Smooth Tchebycheff scalarization (Lin et al. 2024): mu log sum_i exp(lambda_i (f_i - z_i) / mu).

    A smooth maximum: mu -> 0 attends to the worst task alone. Without ``warmup`` f_i is the loss itself. With it, those
    of different scales are comparable, as in the authors' code: for that many epochs the total is sum_i log L_i; the
    mean of every loss in the last of them is its nadir N_i, and from then on f_i = log(L_i / N_i). N_i is 1 for a task
    that had no loss in it, or none but 0.

    Args:
        tasks: names, or how many.
        mu: smoothness, above 0.
        weights: lambda, a dict by task or a list; 1 / T each by default.
        reference: z, the best that each f_i could be; 0 by default.
        warmup: epochs, counted by ``step()``.

    Examples:
        >>> weighting = fastroute.STCH(["price", "kind"], mu=0.01)
        >>> round(float(weighting(torch.tensor([4.0, 1.0]))), 2)  # nearly the worst task's half
        2.0
    """

    weights: Tensor
    reference: Tensor
    nadir: Tensor
    epoch: Tensor

    @checked
    def __init__(
        self,
        tasks: Tasks,
        mu: Positive = 1.0,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        reference: Mapping[str, float] | Sequence[float] | None = None,
        *,
        warmup: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if warmup < 0:
            raise ValueError(f"warmup: expected a number of epochs, got {warmup}")
        super().__init__(tasks, device=device, dtype=dtype)
        self.mu, self.warmup, self.is_recording = float(mu), warmup, warmup > 0
        T = len(self.tasks)
        self._weights = [1 / T] * T if weights is None else numbers("weights", weights, self.tasks)
        self._reference = [0.0] * T if reference is None else numbers("reference", reference, self.tasks)
        for name in ("weights", "reference", "nadir"):
            values = torch.empty(T, device=device, dtype=memory_dtype(dtype))
            self.register_buffer(name, values, persistent=name == "nadir")
        self.register_buffer("epoch", torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with the warm-up again."""
        super().reset_parameters()
        fill(self.weights, self._weights)
        fill(self.reference, self._reference)
        self.nadir.fill_(1)
        self.epoch.zero_()

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
        return torch.where(self.epoch < self.warmup, total(f, present), smooth)

    @torch.no_grad()
    def step(self) -> None:
        """The end of an epoch: counts the epochs of the warm-up; the last one gives the nadir."""
        mean = self.end_epoch()
        self.nadir.copy_(torch.where((self.epoch == self.warmup - 1) & (mean > 0), mean, self.nadir))
        self.epoch.add_(1)


__all__ = ["DWA", "FAMO", "STCH"]
