"""Weightings that learn by gradient descent along with the model.

Axes: T tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...ops.arguments import Tasks, checked
from .base import Weighting, fill, numbers, total, wide

UNBOUNDED = (
    "'auto' multiplies a loss by a weight that is learned, with nothing to hold it: its gradient is the loss itself, "
    "so it falls without bound, and below 0 the loss is maximised. Use weighting='uncertainty' (or 'imtl') instead."
)


#: A loss that is no larger does not move its s. At its minimum, exp(|s|) squared is still a number in float32.
_NOTHING = 1e-18


def _balanced(s: Tensor, losses: Tensor) -> Tensor:
    """exp(-s) L + s of each task, whose minimum is at s = log L: of a loss of 0 infinitely far away."""
    s = wide(s)
    s = torch.where(losses.abs() > _NOTHING, s, s.detach())
    return (-s).exp() * losses + s


class LearnedWeights(Weighting):
    """sum_i w_i L_i, w a parameter: torchMTL's ``loss_weight='auto'``. For compatibility only, see the warning.

    Args:
        tasks: names, or how many.
        init: the weights to begin with, one for all or one each.

    Warns:
        UserWarning: that the weights fall without bound.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     weighting = fastroute.LearnedWeights(["price", "kind"])
        >>> weighting(torch.tensor([4.0, 1.0])).item()
        5.0
    """

    @checked
    def __init__(
        self,
        tasks: Tasks,
        init: float | Mapping[str, float] | Sequence[float] = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks, device=device)
        warnings.warn(UNBOUNDED, UserWarning, stacklevel=3)
        T = len(self.tasks)
        self._init = [float(init)] * T if isinstance(init, (int, float)) else numbers("init", init, self.tasks, 1.0)
        self.weight = nn.Parameter(torch.empty(T, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with ``init`` again."""
        super().reset_parameters()
        fill(self.weight, self._init)

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        return total(self.weight * losses, present)


class _OneNumber(Weighting):
    """Learns a number for each task: the parameter that ``_learned`` names."""

    _learned: str

    @checked
    def __init__(
        self,
        tasks: Tasks,
        init: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks, device=device)
        self._init = float(init)
        self.register_parameter(self._learned, nn.Parameter(torch.empty(len(self.tasks), device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with ``init`` again."""
        super().reset_parameters()
        nn.init.constant_(self.get_parameter(self._learned), self._init)


class Uncertainty(_OneNumber):
    """Homoscedastic uncertainty (Kendall, Gal and Cipolla 2018, eq. 7): sum_i exp(-s_i) L_i / 2 + s_i / 2.

    s_i = log sigma_i^2 is learned along with the model: give the optimizer ``weighting.parameters()``, without weight
    decay. Its optimum is s_i = log L_i. The constants are those of the paper's regression likelihood, for every task,
    as in TorchJD and LibMTL; the paper's classification tasks have no 1/2 before the loss, which only adds log 2 to
    their s. TorchJD begins with s = 0 as here, LibMTL with s = -0.5.

    A loss of 0 (1e-18 and less) does not move its s, which would go on to minus infinity. None is to be negative.

    Args:
        tasks: names, or how many.
        init: s to begin with.

    Attributes:
        log_variance: s, [T].

    Examples:
        >>> weighting = fastroute.Uncertainty(["price", "kind"])
        >>> weighting(torch.tensor([4.0, 1.0])).item()  # with s = 0, half of the sum
        2.5
    """

    _learned = "log_variance"
    log_variance: nn.Parameter

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        return total(0.5 * _balanced(self.log_variance, losses), present)


class IMTL(_OneNumber):
    """Impartial multi-task learning's balance of losses, IMTL-L (Liu et al. 2021): sum_i exp(s_i) L_i - s_i.

    s_i is learned along with the model; its optimum makes every exp(s_i) L_i one. (IMTL-G, which balances gradients,
    is TorchJD's.)

    A loss of 0 (1e-18 and less) does not move its s, which would go on to infinity. None is to be negative.

    Args:
        tasks: names, or how many.
        init: s to begin with.

    Attributes:
        log_scale: s, [T].

    Examples:
        >>> weighting = fastroute.IMTL(["price", "kind"])
        >>> total = weighting({"price": torch.tensor(4.0), "kind": torch.tensor(1.0)})
        >>> total.item(), [name for name, _ in weighting.named_parameters()]
        (5.0, ['log_scale'])
    """

    _learned = "log_scale"
    log_scale: nn.Parameter

    def combine(self, losses: Tensor, present: Tensor | None) -> Tensor:
        return total(_balanced(-self.log_scale, losses), present)


__all__ = ["IMTL", "UNBOUNDED", "LearnedWeights", "Uncertainty"]
