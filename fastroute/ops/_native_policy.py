"""``policy``'s ``native`` backend: the schemas and fakes of the C++ in ``csrc/cpu/policy.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.policy import accumulating
from ._registry import library

library.define(
    "_policy_native(Tensor scores, Tensor? noise, Tensor? coin, Tensor? forced, int kind, float temperature, "
    "float exploration) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "_policy_native_backward(Tensor grad, Tensor scores, Tensor actions, int kind, float temperature) -> Tensor"
)


@torch.library.register_fake("fastroute::_policy_native", lib=library)
def _(
    scores: Tensor, noise: Tensor | None, coin: Tensor | None, forced: Tensor | None, kind: int, temperature: float,
    exploration: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = scores.shape[:1]
    actions = scores.new_empty(rows, dtype=torch.int64)
    return actions, scores.new_empty(rows, dtype=accumulating(scores.dtype)), torch.empty_like(actions)


@torch.library.register_fake("fastroute::_policy_native_backward", lib=library)
def _(grad: Tensor, scores: Tensor, actions: Tensor, kind: int, temperature: float) -> Tensor:
    return scores.new_empty(scores.shape)
