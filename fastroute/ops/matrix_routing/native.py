"""The ``native`` backend of ``matrix_routing``: the C++ of csrc/cpu/matrix_routing, given contiguous parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import library
from .contract import MatrixGrads, MatrixStep, Moments, OutputGrads, PreviousGrads
from .settling import log_prior

_INPUTS = (
    "Tensor gate, Tensor mu_inp, Tensor W, Tensor bias, Tensor beta_use, Tensor beta_ign, Tensor? mask, "
    "Tensor? prior, Tensor? mu, Tensor? weight"
)
library.define(f"_matrix_routing_native({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
library.define(
    f"_matrix_routing_native_backward({_INPUTS}, Tensor center, Tensor g1, Tensor g2, Tensor k, Tensor da, bool fresh, "
    "Tensor(a!) dgate, Tensor(b!)? dmu_inp, Tensor(c!)? dW, Tensor(d!)? dbias, Tensor(e!)? duse, Tensor(f!)? dign) "
    "-> (Tensor, Tensor, Tensor)"
)


def _plain(step: MatrixStep) -> tuple[Tensor | None, ...]:
    """The step as the C++ reads it: l_ij = prior_j - sum_ch weight_jch (V_ijch - mu_jch)^2."""
    parameters: tuple[Tensor, ...] = (step.W, step.bias, step.beta_use, step.beta_ign)
    half = {t.dtype for t in parameters} == {torch.bfloat16} and step.acc == torch.float32
    parameters = tuple(t.to(torch.bfloat16 if half else step.acc).contiguous() for t in parameters)
    if step.previous is None:
        return step.gate, step.mu_inp, *parameters, step.mask, None, None, None
    prior, sig2 = log_prior(step.previous, step.p_model), step.previous.sig2
    weight = torch.ones_like(sig2) if step.p_model == "skm" else 0.5 / sig2
    return (
        step.gate, step.mu_inp, *parameters, step.mask, prior.contiguous(), step.previous.mu.contiguous(),
        weight.contiguous(),
    )  # fmt: skip


def forward(step: MatrixStep) -> Moments:
    return Moments(*torch.ops.fastroute._matrix_routing_native(*_plain(step)))


def backward(step: MatrixStep, out: OutputGrads, grads: MatrixGrads) -> PreviousGrads | None:
    sums = torch.ops.fastroute._matrix_routing_native_backward(
        *_plain(step), *(t.contiguous() for t in out), grads.fresh, grads.gate, grads.mu_inp, grads.W, grads.bias,
        grads.beta_use, grads.beta_ign,
    )  # fmt: skip
    return None if step.previous is None else PreviousGrads(*sums)
