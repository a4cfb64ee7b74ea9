"""One entry of what a decision learns from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class RLSample:
    """What upstream's loss functions are given of one decision for one sample. (Nothing upstream makes one.)"""

    is_terminal: Tensor | bool = False  #: the sample's last decision
    state: Tensor | None = None  #: [1, K, 5]
    next_state: Tensor | None = None  #: [1, K, 5]
    action: Tensor | None = None
    next_action: Tensor | None = None
    reward: Tensor | float = 0.0  #: r
    cum_return: Tensor | float = 0.0  #: R, the sum of r from here on
    final_reward: Tensor | float = 0.0  #: f
