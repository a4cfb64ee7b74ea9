"""``policy``: a discrete choice per row, drawn from scores, with its log-probability or value.

Axes: N rows, K choices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import policy as reference
from ..reference.policy import KINDS as KINDS
from ..reference.policy import Choice as Choice
from . import _native_policy as _native_policy  # defines the native ops
from ._backends import native_refuses, note, offer, taken
from ._checks import floating, shape

offer("policy", "native", "fastroute.ops._native_policy", native_refuses)
offer("policy", "reference", "fastroute.reference.policy", lambda case: None)


class _Policy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, noise: Tensor | None, coin: Tensor | None, forced: Tensor | None, kind: str,
        temperature: float, exploration: float, native: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if native:
            made = torch.ops.fastroute._policy_native(
                scores, noise, coin, forced, KINDS.index(kind), temperature, exploration
            )
        else:
            made = reference.forward(scores, noise, coin, forced, kind, temperature, exploration)
        actions, value, greedy = made
        if not native and forced is not None:
            actions = actions.clone()  # an autograd function's output is no input
        if not native and actions is greedy:
            greedy = greedy.clone()
        ctx.mark_non_differentiable(actions, greedy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, actions)
        ctx.options = kind, temperature, native
        return actions, value, greedy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, grad: Tensor | None, __: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        kind, temperature, native = ctx.options
        scores, actions = ctx.saved_tensors
        if native:
            made = torch.ops.fastroute._policy_native_backward(
                grad.contiguous(), scores, actions, KINDS.index(kind), temperature
            )
        else:
            made = reference.backward(grad, scores, actions, kind, temperature)
        return (made, *[None] * 7)


def policy(
    scores: Tensor,
    *,
    noise: Tensor | None = None,
    coin: Tensor | None = None,
    forced: Tensor | None = None,
    kind: str = "softmax",
    temperature: float = 1.0,
    exploration: float = 0.0,
) -> Choice:
    """Choose one of K per row, and say what the choice is worth.

    kind "softmax": p = softmax(z / temperature), value log p_a. "score": value z_a, and a draw is uniform. "shifted":
    p = (z - min z + 1e-6) / sum, value log p_a with p kept 1.2e-7 from 0 and 1 (Weighted Policy Learner).
    A draw is the winner of an exponential race, argmax_k p_k / E_k (the Gumbel-max trick).

    Args:
        scores: z, [N, K], K >= 1, floating; half precision is computed in float32.
        noise: E, [N, K], exponential with mean 1, in float32 (float64 for such scores). None: the greedy choice.
        coin: [N], uniform in [0, 1): where coin < exploration the draw is taken, elsewhere the greedy choice.
        forced: [N] int64, taken instead of all that. A row where it is negative has value zero and no gradient.

    Returns:
        ``Choice(actions [N] int64, value [N] float32 or float64, greedy [N] int64)``. ``value`` has a gradient.
    """
    floating("scores", scores)
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(f"scores: expected [N, K], K at least 1, got {list(scores.shape)}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    N, K = scores.shape
    for name, t, want in (("noise", noise, (N, K)), ("coin", coin, (N,)), ("forced", forced, (N,))):
        if t is not None:
            shape(name, t, want, "N, K" if len(want) == 2 else "N")
    note("policy", scores, N=N, K=K)
    native = taken("policy", scores.device.type, scores.dtype) == "native"
    if native and not scores.is_contiguous():
        scores = scores.contiguous()
    made = _Policy.apply(scores, noise, coin, forced, kind, float(temperature), float(exploration), native)
    return Choice(*made)
