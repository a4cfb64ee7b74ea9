"""The loss of a routed network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastroute import networks

from ...overrides import Overrides
from .._upstream import Literal


def _no_loss(ysest: Tensor, ystrue: Tensor) -> Tensor:
    raise ValueError("pytorch_loss_func: expected a loss, got None; with None every call needs external_losses")


class Loss(Overrides, Literal, networks.Loss):
    """``fastroute.networks.Loss`` that takes no notice of ``discounting``; ``pytorch_loss_func`` may be None."""

    _never_called: ClassVar[Mapping[str, str]] = {
        "_get_rl_loss_tuple_map": "routing_reward_func, or a decision's _loss"
    }

    def __init__(self, pytorch_loss_func: Any, routing_reward_func: Any, *args: Any, **kwargs: Any) -> None:
        loss = _no_loss if pytorch_loss_func is None else pytorch_loss_func
        super().__init__(loss, routing_reward_func, *args, **kwargs)

    def _losses(self, ysest: Tensor, ystrue: Tensor | None, external: Tensor | None, B: int) -> Tensor:
        if isinstance(external, Tensor) and B and external.numel() % B == 0:
            external = external.reshape(B, -1)  # upstream takes them in any shape, those of a sample side by side
        return super()._losses(ysest, ystrue, external, B)
