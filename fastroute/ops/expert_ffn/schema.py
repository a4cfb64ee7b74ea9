"""The hidden layer of ``expert_ffn`` for the dispatcher: schemas and fakes of what csrc/cpu/expert_ffn implements."""

from __future__ import annotations

import torch
from torch import Tensor

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


def hidden(u: Tensor, weights: Tensor | None, activation: int, gated: bool) -> Tensor:
    """[N, H]: what u [N, 2H] or [N, H] makes, times weights [N], which are in the dtype of sums."""
    return torch.ops.fastroute._expert_ffn_native_hidden(u, weights, activation, gated)


def hidden_backward(
    t: Tensor, u: Tensor, weights: Tensor | None, activation: int, gated: bool, want_u: bool, want_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of u and of weights [N], from t [N, H], that of what is weighted; None where not wanted."""
    op = torch.ops.fastroute._expert_ffn_native_hidden_backward
    d_u, d_weights = op(t, u, weights, activation, gated, want_u, want_weights)
    return d_u if want_u else None, d_weights if want_weights else None
