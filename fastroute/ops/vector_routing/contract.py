"""What one routing iteration is given and what its backward pass fills: the contract of op layer and backends.

Axes: B batch, n input vectors, m output vectors, d width of an input vector. ``acc`` is float64 for float64 inputs and
float32 otherwise: the dtype of sums, softmax, gates and moments.

A backend is a module with two functions::

    forward(step: Step) -> (M, p, gate)
    backward(step: Step, dM, dp, grads: Grads) -> dpred | None

where, with R, D and phi as in ``ops/vector_routing/reference.py`` and nothing of size n x m stored,

    M_jd = sum_i phi_ij x_id  [B, m, d] acc,    p_j = sum_i phi_ij  [B, m] acc,    gate [B, n] acc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import accumulating


@dataclass
class Passes:
    """What the forward passes of all iterations share: how many are to come, and what a backend keeps for them."""

    to_come: int
    kept: Any = None


class Step(NamedTuple):
    """The inputs of one iteration, validated, on one device, last axis contiguous.

    The first iteration has no ``pred`` and takes R from ``prior``; it may also be asked to make the gates itself, from
    ``gate_weight``, ``gate_bias`` and ``scale``: gate_i = sigmoid(scale_b <x_i, gate_weight_i> + gate_bias_i).
    With ``use_bias`` (and ``ign_bias``) the betas are linear in x: beta_ij = <x_i, use_j> + use_bias_j.
    Without ``ign``, phi_ij = gate_i beta_use_ij R_ij.
    """

    x: Tensor  # [B, n, d]
    gate: Tensor | None  # [B, n] acc, or None: make it (first iteration)
    gate_weight: Tensor | None  # [n, d], or [1, d] for every row
    gate_bias: Tensor | None  # [n], or [1]
    scale: Tensor | None  # [B] acc
    pred: Tensor | None  # [B, m, d] acc, or None: first iteration
    score_weight: Tensor | None  # [n, m], or [1, m] for every row; None in a first iteration
    score_bias: Tensor | None  # of as many rows
    use: Tensor  # [n, m]; with use_bias: [m, d]
    ign: Tensor | None  # likewise
    use_bias: Tensor | None  # [m]
    ign_bias: Tensor | None  # [m]
    prior: Tensor | None  # [m] acc, for a first iteration
    mask: Tensor | None  # [B, n, m] bool, True = closed; any strides, zero ones included
    lengths: Tensor | None  # [B] int64: rows from there on are never read
    precision: str = "ieee"  # of the products on a GPU: "ieee", "tf32", "bf16" or "fp16"
    passes: Passes | None = None  # None: this pass stands alone

    @property
    def acc(self) -> torch.dtype:
        return accumulating(self.x.dtype)

    @property
    def linear(self) -> bool:
        """Betas are linear in x (any input length)."""
        return self.use_bias is not None

    @property
    def n_out(self) -> int:
        return self.use.shape[0] if self.linear else self.use.shape[1]


@dataclass
class Grads:
    """Buffers that the backward passes of all iterations, last first, fill together; None: not wanted.

    ``fresh`` is True for the first pass to write them (they hold nothing yet) and False for those that add. ``to_come``
    is how many passes of the same backend follow this one: it may leave its part of ``x`` to the last. Parameter
    buffers are wanted all together or not at all (``use`` is None), apart from those that this kind of step lacks.
    A first iteration that made the gates is the last to be differentiated: ``gate`` is complete once it has added its
    own part, and it then fills ``gate_weight`` and ``gate_bias`` and adds the gates' part to ``x``.
    Shared rows ([1, m], [m, d], [m], [1, d], [1]) have buffers in acc, per-row ones ([n, m], [n, d], [n]) in the
    parameter's dtype.
    """

    fresh: bool
    gate: Tensor  # [B, n] acc
    x: Tensor | None = None  # [B, n, d] dtype of x
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    score_weight: Tensor | None = None
    score_bias: Tensor | None = None
    use: Tensor | None = None
    ign: Tensor | None = None
    use_bias: Tensor | None = None
    ign_bias: Tensor | None = None
    to_come: int = 0
    left: Any = None  # what a backend leaves for its next pass
