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


def check_sizes(w: Parameters, n: int, d: int) -> None:
    """All are as large as n vectors of width d ask for: a smaller one would be broadcast, in silence, by some backends.

    Betas of three axes, each sample's own, are taken as they are.

    Raises:
        ValueError: naming the first that is not.
    """
    m, h, own = w.prior.shape[0], w.W_F2.shape[-1], w.beta_use.dim() == 3
    n1, beta = (1, (m, d)) if w.bias_use is not None else (1 if own else n, (n, m))
    sizes = (
        (n1, d), (n1,), (m, d), (d, h), (m, h), (h, d), (m, d), (m, d), (n1, m), (n1, m),
        w.beta_use.shape if own else beta, w.beta_ign.shape if own else beta, (m,), (m,), (m,),
    )  # fmt: skip
    for name, t, size in zip(Parameters._fields, w, sizes, strict=True):
        if t is not None and t.shape != size:
            raise ValueError(f"{name}: expected a tensor {list(size)}, got {list(t.shape)}")
