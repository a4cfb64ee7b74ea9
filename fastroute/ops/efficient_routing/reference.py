"""All iterations of efficient vector routing, as in Heinsen (2022), section 2, with the M-step's votes factored.

Axes: B batch, n input vectors, m output vectors, d width of an input vector, h width of an output vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..vector_routing.reference import Assignment, assign, gates, row_is_live, softmax_over_outputs
from .contract import Parameters


def cast(w: Parameters, dtype: torch.dtype) -> Parameters:
    """Every parameter in one dtype."""
    return Parameters._make(t if t is None else t.to(dtype) for t in w)


class Routing(NamedTuple):
    """What the last iteration saw and made."""

    a_inp: Tensor  # [B, n]
    pred_x_inp: Tensor | None  # [B, m, d], None when there is one iteration
    assignment: Assignment
    x_out: Tensor  # [B, m, h]


def input_scale(x: Tensor, lengths: Tensor | None) -> Tensor:
    """s = n**-0.5 of each sample, [B], in the dtype sums are kept in. A sample of length 0 has scale 1."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if lengths is None:
        return torch.full((x.shape[0],), x.shape[-2] ** -0.5, dtype=dtype, device=x.device)
    return lengths.clamp(min=1).to(dtype).rsqrt()


def in_range(y: Tensor) -> Tensor:
    """y in a dtype in which squares do not overflow: those of 1e20 do in float32."""
    return y.double() if y.dtype == torch.float32 and y.device.type != "mps" else y  # MPS has no float64


def norm(y: Tensor) -> Tensor:
    """Layer norm over the last axis without affine; the identity when that axis has one element."""
    return F.layer_norm(in_range(y), y.shape[-1:]).to(y.dtype) if y.shape[-1] > 1 else y


def predict(x_out: Tensor, w: Parameters, N: Callable[[Tensor], Tensor] = norm) -> Tensor:
    """Each output's prediction of an input vector, [B, m, d]."""
    return N(x_out) @ w.W_G1 * w.W_G2 + w.B_G2


class Functions(NamedTuple):
    """What an iteration applies, under the paper's names."""

    f: Callable[[Tensor], Tensor] = torch.sigmoid
    log_f: Callable[[Tensor], Tensor] = F.logsigmoid
    softmax: Callable[[Tensor], Tensor] = softmax_over_outputs
    N: Callable[[Tensor], Tensor] = norm


def first_or_next(
    x: Tensor,
    x_out: Tensor | None,
    w: Parameters,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    functions: Functions | None = None,
) -> Routing:
    """One iteration from the previous output vectors (None: the first iteration). No final layer norm.

    Betas may be each sample's own, [B, n, m].
    """
    functions = functions or Functions()
    scale = input_scale(x, lengths).to(x.dtype)
    if lengths is not None:
        live = row_is_live(x, lengths)
        x = x.masked_fill(~live[..., None], 0.0)
    a_inp = gates(x, w.W_A, w.B_A, scale)
    gate = functions.f(a_inp)
    if lengths is not None:
        gate = gate.masked_fill(~live, 0.0)
    pred = None if x_out is None else predict(x_out, w, functions.N)
    step = assign(
        x, gate, pred, w.W_S, w.B_S, w.beta_use, w.beta_ign,
        use_bias=w.bias_use, ign_bias=w.bias_ign, prior=w.prior, mask=mask,
        log_f=functions.log_f, softmax=functions.softmax,
    )  # fmt: skip
    M = step.phi.mT @ (x * scale[:, None, None])
    x_out = (M * w.W_F1) @ w.W_F2 + step.phi.sum(-2).unsqueeze(-1) * w.B_F2
    return Routing(a_inp, pred, step, x_out)


def efficient_routing(
    x: Tensor,
    w: Parameters,
    *,
    n_iters: int,
    normalize: bool,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Route x [B, n, d] to [B, m, h] in n_iters iterations; layer norm at the end if normalize."""
    x_out = None
    for _ in range(n_iters):
        x_out = first_or_next(x, x_out, w, mask=mask, lengths=lengths).x_out
    assert x_out is not None
    return norm(x_out) if normalize else x_out
