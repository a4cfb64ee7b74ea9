"""What passes between ``grouped_linear`` and its compiled backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class BackwardCall(NamedTuple):
    """The arguments of a compiled backward pass, in the order of its schema; see ``plain.backward``."""

    grad: Tensor
    x: Tensor
    take: Tensor | None
    spread: Tensor | None
    put: Tensor | None
    offsets: Tensor
    weights: Sequence[Tensor]
    modules: int
    want_x: bool
    want_weights: bool
    want_biases: bool
    activation: int
    kept: Tensor | None
    stacked: bool
    keep_empty: bool
