"""Weightings that learn: by gradient descent along with the model, or from how the losses went.

Axes: T tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .base import Losses, Present, Weighting, in_order, softmax, total

UNBOUNDED = (
    "'auto' multiplies a loss by a weight that is learned, with nothing to hold it: its gradient is the loss itself, "
    "so it falls without bound, and below 0 the loss is maximised. Use weighting='uncertainty' (or 'imtl') instead."
)


class _Options:
    """How a weighting's tensors are made."""

    def __init__(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype or torch.get_default_dtype()

    def full(self, T: int, value: float) -> Tensor:
        return torch.full((T,), float(value), device=self.device, dtype=self.dtype)


class LearnedWeights(Weighting):
    """sum_i w_i L_i, w a parameter: torchMTL's ``loss_weight='auto'``. For compatibility only, see the warning.

    Args:
        tasks: names, or how many.
        init: the weights to begin with, one for all or one each.

    Warns:
        UserWarning: that the weights fall without bound.
    """

    def __init__(
        self,
        tasks: Sequence[str] | int,
        init: float | Mapping[str, float] | Sequence[float] = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks)
        warnings.warn(UNBOUNDED, UserWarning, stacklevel=2)
        self.weight = nn.Parameter(_Options(device, dtype).full(len(self.tasks), 1.0))
        if not isinstance(init, (int, float)):
            values = in_order("init", init, self.tasks)
            with torch.no_grad():
                self.weight.copy_(torch.tensor([1.0 if v is None else float(v) for v in values]))
        else:
            nn.init.constant_(self.weight, init)

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        return total(self.weight * losses, present)


class Uncertainty(Weighting):
    """Homoscedastic uncertainty (Kendall, Gal and Cipolla 2018, eq. 7): sum_i exp(-s_i) L_i / 2 + s_i / 2.

    s_i = log sigma_i^2 is learned along with the model: give the optimizer ``weighting.parameters()``, without weight
    decay. Its optimum is s_i = log L_i. The constants are those of the paper's regression likelihood, for every task,
    as in TorchJD and LibMTL; the paper's classification tasks have no 1/2 before the loss, which only adds log 2 to
    their s. TorchJD begins with s = 0 as here, LibMTL with s = -0.5.

    Args:
        tasks: names, or how many.
        init: s to begin with.

    Attributes:
        log_variance: s, [T].
    """

    def __init__(
        self,
        tasks: Sequence[str] | int,
        init: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks)
        self.log_variance = nn.Parameter(_Options(device, dtype).full(len(self.tasks), init))

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        s = self.log_variance
        return total(0.5 * ((-s).exp() * losses + s), present)


class IMTL(Weighting):
    """Impartial multi-task learning's balance of losses, IMTL-L (Liu et al. 2021): sum_i exp(s_i) L_i - s_i.

    s_i is learned along with the model; its optimum makes every exp(s_i) L_i one. (IMTL-G, which balances gradients,
    is TorchJD's.)

    Args:
        tasks: names, or how many.
        init: s to begin with.

    Attributes:
        log_scale: s, [T].
    """

    def __init__(
        self,
        tasks: Sequence[str] | int,
        init: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks)
        self.log_scale = nn.Parameter(_Options(device, dtype).full(len(self.tasks), init))

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        s = self.log_scale
        return total(s.exp() * losses - s, present)


class DWA(Weighting):
    """Dynamic weight average (Liu, Johns and Davison 2019, eq. 7): sum_i w_i L_i, w = T softmax(r / temperature).

    r_i is the mean loss of the last epoch over that of the one before: what falls slowly weighs more. In the first two
    epochs all weigh 1, and so does for r a task that had no loss in one of the two. Means are made of the losses of
    calls in training; ``step()`` ends an epoch.

    Args:
        tasks: names, or how many.
        temperature: above 0; the larger, the more even.

    Attributes:
        weights: w of this epoch, [T].
    """

    weights: Tensor
    last: Tensor
    summed: Tensor
    counted: Tensor

    def __init__(
        self,
        tasks: Sequence[str] | int,
        temperature: float = 2.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks)
        if not temperature > 0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        self.temperature = float(temperature)
        options = _Options(device, dtype)
        T = len(self.tasks)
        self.register_buffer("weights", options.full(T, 1))
        self.register_buffer("last", options.full(T, torch.nan))  # NaN: not seen yet
        self.register_buffer("summed", options.full(T, 0))
        self.register_buffer("counted", options.full(T, 0))

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        if self.training:
            self.summed.add_(losses.detach())
            self.counted.add_(1 if present is None else present)
        # A copy: the buffer may change before the backward pass.
        return total(self.weights.clone() * losses, present)

    @torch.no_grad()
    def step(self) -> None:
        """The end of an epoch: weights for the next, from the means of this one and the one before."""
        mean = self.summed / self.counted  # NaN without a loss
        ratio = mean / self.last
        ratio = torch.where(ratio.isfinite(), ratio, 1)
        self.weights.copy_(len(self.tasks) * (ratio / self.temperature).softmax(0))
        self.last.copy_(mean)
        self.summed.zero_()
        self.counted.zero_()


class FAMO(Weighting):
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
    """

    logits: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor
    before: Tensor
    seen: Tensor
    min_losses: Tensor

    def __init__(
        self,
        tasks: Sequence[str] | int,
        min_losses: Mapping[str, float] | Sequence[float] | None = None,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks)
        self.lr, self.weight_decay = lr, weight_decay
        options = _Options(device, dtype)
        T = len(self.tasks)
        lowest = [0.0] * T if min_losses is None else in_order("min_losses", min_losses, self.tasks)
        values = torch.tensor([0.0 if v is None else float(v) for v in lowest], device=device, dtype=options.dtype)
        self.register_buffer("min_losses", values, persistent=False)
        for name in ("logits", "exp_avg", "exp_avg_sq", "before"):
            self.register_buffer(name, options.full(T, 0))
        self.register_buffer("steps", torch.zeros((), device=device, dtype=options.dtype))
        self.register_buffer("seen", torch.zeros(T, device=device, dtype=torch.bool))

    def _log(self, losses: Tensor) -> Tensor:
        return ((losses - self.min_losses).clamp_min(0) + 1e-8).log()

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        logs = self._log(losses)
        if self.training:
            self.before.copy_(logs.detach())
            if present is None:
                self.seen.fill_(True)
            else:
                self.seen.copy_(present)
        z = softmax(self.logits, present)
        c = (z * (-logs.detach()).exp()).sum()
        c = torch.where(c > 0, c, 1)  # nothing is there
        return total(z * logs, present) / c

    @torch.no_grad()
    def update(self, losses: Losses, present: Present | None = None) -> None:
        """Move the weights.

        Args:
            losses: of the last call's batch, after the optimizer's step, in the same form.
            present: as in ``forward``.
        """
        values, here = self.gather(losses, present)
        both = self.seen if here is None else self.seen & here
        delta = torch.where(both, self.before - self._log(values), 0).to(self.logits.dtype)
        z = softmax(self.logits, both)
        grad = z * (delta - (z * delta).sum()) + self.weight_decay * self.logits
        self.steps.add_(1)
        self.exp_avg.lerp_(grad, 0.1)
        self.exp_avg_sq.lerp_(grad.square(), 0.001)
        mean = self.exp_avg / (1 - 0.9**self.steps)
        spread = self.exp_avg_sq / (1 - 0.999**self.steps)
        self.logits.sub_(self.lr * mean / (spread.sqrt() + 1e-8))


__all__ = ["DWA", "FAMO", "IMTL", "UNBOUNDED", "LearnedWeights", "Uncertainty"]
