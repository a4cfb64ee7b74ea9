"""What passes between ``soft_assignment`` and its backends.

Axes: B batch, n inputs, m outputs, h width of a vote. ``acc`` is float64 for float64 votes and float32 otherwise.
A backend is a module with two functions::

    forward(votes, pairs: Pairs) -> (M [B, m, h] acc, p [B, m] acc)
    backward(votes, pairs: Pairs, dM, dp, grads: Grads) -> None
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Shares(NamedTuple):
    """How inputs are shared out, all [B, n, m]."""

    R: Tensor  #: probability that input i is assigned to output j; rows sum to 1 (0 when fully masked)
    D_use: Tensor  #: share of input i used by output j
    D_ign: Tensor  #: share of input i ignored by output j
    phi: Tensor  #: net benefit less cost


class Pairs(NamedTuple):
    """What is known of inputs and outputs before the votes; as ``ops.soft_assignment`` describes it."""

    scores: Tensor | None  # [B, n, m], or None: R is the prior
    gate: Tensor | None  # [B, n] acc
    use: Tensor | None  # [B or 1, n, m]
    ign: Tensor | None  # [B or 1, n, m]
    prior: Tensor | None  # [m] acc
    mask: Tensor | None  # [B, n, m] bool, True = closed
    lengths: Tensor | None  # [B] int64
    eps: float  # added to the weight of every open pair


def sizes(votes: Tensor, pairs: Pairs) -> tuple[int, int, int, int]:
    """B, n, m, h."""
    known = pairs.scores if pairs.scores is not None else pairs.gate
    assert known is not None
    m = pairs.scores.shape[-1] if pairs.scores is not None else pairs.prior.shape[0]  # type: ignore[union-attr]
    return known.shape[0], known.shape[1], m, votes.shape[-1]


class Grads(NamedTuple):
    """What the backward pass fills, in the inputs' dtypes; None: not wanted."""

    votes: Tensor | None
    scores: Tensor | None
    gate: Tensor | None
    use: Tensor | None
    ign: Tensor | None
