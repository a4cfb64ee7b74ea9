"""The hidden layer of ``expert_ffn`` by the C++ of csrc/cpu/expert_ffn."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import NUMBERS
from ..dtypes import accumulating
from ..registry import library, register_fake


def _hidden(u: Tensor, weights: Tensor | None, activation: int, gated: bool) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1] // 2 if gated else u.shape[1])


def _hidden_backward(
    t: Tensor, u: Tensor, weights: Tensor | None, activation: int, gated: bool, want_u: bool, want_weights: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulating(u.dtype)
    return u.new_empty(u.shape if want_u else 0), u.new_empty(u.shape[0] if want_weights else 0, dtype=dtype)


library.define("_expert_ffn_native_hidden(Tensor u, Tensor? weights, int activation, bool gated) -> Tensor")
register_fake("_expert_ffn_native_hidden", _hidden)
library.define(
    "_expert_ffn_native_hidden_backward(Tensor t, Tensor u, Tensor? weights, int activation, bool gated, bool want_u, "
    "bool want_weights) -> (Tensor, Tensor)"
)
register_fake("_expert_ffn_native_hidden_backward", _hidden_backward)


class Hidden:
    """What ``plain.Hidden`` is, in one pass of C++ each way; w is in ``accumulating`` dtype."""

    def __init__(self, u: Tensor, activation: str, gated: bool) -> None:
        self._u, self._how = u, (NUMBERS[activation], gated)

    def weighted(self, w: Tensor | None) -> Tensor:
        """As of ``plain.Hidden``."""
        made: Tensor = torch.ops.fastroute._expert_ffn_native_hidden(self._u, w, *self._how)
        return made

    def gradients(
        self, t: Tensor, w: Tensor | None, want_u: bool, want_weights: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """As of ``plain.Hidden``."""
        op = torch.ops.fastroute._expert_ffn_native_hidden_backward
        d_u, d_weights = op(t, self._u, w, *self._how, want_u, want_weights)
        return d_u if want_u else None, d_weights if want_weights else None
