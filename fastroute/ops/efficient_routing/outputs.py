"""What efficient vector routing computes per output vector between two passes over the inputs, and its gradient.

Nothing here depends on the number of input vectors. Derived in ``docs/vector_routing.md``.
Axes: B batch, m output vectors, d width of an input vector, h width of an output vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import is_hooked
from ..gemm import product
from .contract import Parameters
from .reference import in_range, norm


class Predictions(NamedTuple):
    """The predictions of an iteration, and what their gradient needs."""

    z: Tensor  # [B, m, h], LN(y)
    Q: Tensor  # [B, m, d], LN(y) W_G1
    P: Tensor  # [B, m, d]


def matmul(a: Tensor, weight: Tensor) -> Tensor:
    """A per-output product: operands in the weight's dtype, the result in a's (the dtype of sums)."""
    return product(a.to(weight.dtype), weight).to(a.dtype)


def predictions(y: Tensor, w: Parameters) -> Predictions:
    """What the output vectors y [B, m, h] predict of an input vector."""
    z = norm(y)
    Q = matmul(z, w.W_G1)
    return Predictions(z, Q, torch.addcmul(w.B_G2.to(Q.dtype), Q, w.W_G2.to(Q.dtype)))


#: What the first iteration does not use.
LATER = ("W_G1", "W_G2", "B_G2", "W_S", "B_S")


def used(w: Parameters, n_iters: int) -> Parameters:
    """What a single iteration does not use is taken out of the graph if it has hooks: autograd would give them None."""
    if n_iters > 1 or torch.compiler.is_compiling():
        return w
    hooked = [name for name in LATER if is_hooked(getattr(w, name))]
    return w._replace(**{name: getattr(w, name).detach() for name in hooked})


def norm_backward(dz: Tensor, y: Tensor) -> Tensor:
    h = y.shape[-1:]
    if h[0] == 1:
        return dz
    wide = in_range(y)
    _, mean, rstd = torch.ops.aten.native_layer_norm(wide, h, None, None, 1e-5)
    args = dz.to(wide.dtype), wide, h, mean, rstd, None, None, [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(*args)[0].to(y.dtype)


def first_betas(w: Parameters, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """(v [m, d], e [m]): in a first iteration with linear betas, phi_ij = f_i (<x_i, v_j> + e_j)."""
    c = w.prior.to(acc)
    assert w.bias_use is not None and w.bias_ign is not None
    v = c[:, None] * w.beta_use.to(acc) - (1 - c)[:, None] * w.beta_ign.to(acc)
    return v, c * w.bias_use.to(acc) - (1 - c) * w.bias_ign.to(acc)


def first_moments(G: Tensor, g: Tensor, v: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """M and p of a first iteration in Gram form."""
    d = v.shape[1]
    return v @ G + e[:, None] * g[:, None, :d], g[:, :d] @ v.mT + e * g[:, d:]


def outputs(M: Tensor, p: Tensor, scale: Tensor, w: Parameters) -> Tensor:
    """y [B, m, h], before any norm, of the moments M [B, m, d] and p [B, m]."""
    U = M * scale[:, None, None] * w.W_F1.to(M.dtype)
    return torch.addcmul(matmul(U, w.W_F2), p[..., None], w.B_F2.to(M.dtype))


def outputs_backward(
    dy: Tensor, M: Tensor, p: Tensor, scale: Tensor, w: Parameters, dw: Parameters
) -> tuple[Tensor, Tensor]:
    """(dM, dp); adds to dw's W_F1, W_F2 and B_F2."""
    acc = dy.dtype
    M = M * scale[:, None, None]
    dw.B_F2.add_(torch.einsum("bj,bjh->jh", p, dy))
    dp = torch.einsum("bjh,jh->bj", dy, w.B_F2.to(acc))
    dU = matmul(dy, w.W_F2.mT)
    U = M * w.W_F1.to(acc)
    dw.W_F2.add_(matmul(U.flatten(0, 1).mT, dy.flatten(0, 1).to(w.W_F2.dtype)))
    dw.W_F1.add_((dU * M).sum(0))
    return dU * w.W_F1.to(acc) * scale[:, None, None], dp


def predictions_backward(dP: Tensor, seen: Predictions, y: Tensor, w: Parameters, dw: Parameters) -> Tensor:
    """dy of the output vectors that predicted; adds to dw's W_G1, W_G2 and B_G2."""
    dw.B_G2.add_(dP.sum(0))
    dw.W_G2.add_((dP * seen.Q).sum(0))
    dQ = dP * w.W_G2.to(dP.dtype)
    dw.W_G1.add_(matmul(seen.z.flatten(0, 1).mT, dQ.flatten(0, 1).to(w.W_G1.dtype)))
    return norm_backward(matmul(dQ, w.W_G1.mT), y)
