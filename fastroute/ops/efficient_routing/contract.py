"""What ``efficient_routing`` is given. Axes: n input vectors, m output vectors, d width of an input, h of an output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Parameters(NamedTuple):
    """The parameters of efficient vector routing, under their names in the paper. n1 is n, or 1 for any length."""

    W_A: Tensor  # [n1, d]
    B_A: Tensor  # [n1]
    W_F1: Tensor  # [m, d]
    W_F2: Tensor  # [d, h]
    B_F2: Tensor  # [m, h]
    W_G1: Tensor  # [h, d]
    W_G2: Tensor  # [m, d]
    B_G2: Tensor  # [m, d]
    W_S: Tensor  # [n1, m]
    B_S: Tensor  # [n1, m]
    beta_use: Tensor  # [n, m], or the weight [m, d] of a Linear when bias_use is given
    beta_ign: Tensor  # likewise
    bias_use: Tensor | None  # [m]
    bias_ign: Tensor | None  # [m]
    prior: Tensor  # [m], the first iteration's R (1/m)
