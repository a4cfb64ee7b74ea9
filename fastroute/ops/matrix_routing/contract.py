"""What one iteration of matrix routing is given and gives back: the contract of op layer and backends.

Axes: B batch, n input capsules, m output capsules, c rows of a capsule's matrix (d_cov), d its columns before routing
(d_inp), h its columns after (d_out); i runs over inputs, j over outputs. ``acc`` is float64 where mu_inp or a parameter
is, and float32 otherwise: the dtype of votes, softmax, sums and variances, and of everything below but parameters.

A backend is a module with two functions::

    forward(step: MatrixStep) -> Moments
    backward(step: MatrixStep, out: OutputGrads, grads: MatrixGrads) -> PreviousGrads | None

where, with nothing of size n x m stored and O the pairs (i, j) that no mask closes,

    V_ijch = sum_d mu_icd W_ijdh + bias_ijch
    R_ij   = softmax over j in O of l_ij; 1 / |O_i| in a first iteration; 0 outside O
    l_ij   = logsigmoid(a_j) - 1/2 sum_ch log sig2_jch - sum_ch (V_ijch - mu_jch)^2 / (2 sig2_jch)    ("gaussian")
    l_ij   = logsigmoid(a_j) - sum_ch (V_ijch - mu_jch)^2                                             ("skm")
    D_ij   = gate_i R_ij

with a, mu and sig2 of ``previous``, and the forward pass gives

    N0_j = sum_i D_ij,  mean_jch = sum_i D_ij V_ijch / N0_j,  M2_jch = sum_i D_ij (V_ijch - mean_jch)^2,
    a_j  = sum_{i in O_j} beta_use_ij D_ij - beta_ign_ij (gate_i - D_ij).

and ``low``, what rounding took from ``mean`` (None: not known, which costs accuracy in gradients that are sums over all
inputs). Where N0_j is 0, mean_j and M2_j are 0. A row whose gate is exactly 0, or that is closed everywhere, adds
nothing whatever its votes are, not-a-numbers included. M2 must not be made by subtracting two large numbers: tiles of
rows make their own mean and centred M2, and Chan's formula puts them together. Threads do not change the order of sums.

What follows from the moments is per output, and the op layer's: ``settle`` and ``OutputGrads.of``. A backend may do it
itself. It then has ``folded() -> bool``, and where that is True the op layer calls, for at least one sample and input,

    folded_forward(step, kept: Moments, eps) -> Outputs
    folded_backward(step, kept: Moments, before: Moments | None, d, eps, grads: MatrixGrads) -> d

instead. ``kept`` and ``before`` are the moments of this iteration and of the one before it; the forward pass fills
``kept``. ``d`` is the gradient of an iteration's outputs: ``Outputs`` for the last iteration, and then whatever the
backend returned for the iteration after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Outputs(NamedTuple):
    """Output capsules after an iteration, in acc."""

    a: Tensor  # [B, m], before the sigmoid
    mu: Tensor  # [B, m, c, h]
    sig2: Tensor  # [B, m, c, h]


class MatrixStep(NamedTuple):
    """The inputs of one iteration: validated, on one device; gate, mu_inp and previous contiguous."""

    gate: Tensor  # [B, n] acc, sigmoid of the input activations
    mu_inp: Tensor  # [B, n, c, d] acc
    W: Tensor  # [n1, m, d, h] of any floating dtype, n1 = n or 1 (one for all inputs)
    bias: Tensor  # [n1, m, c, h]
    beta_use: Tensor  # [n1, m]
    beta_ign: Tensor  # [n1, m]
    mask: Tensor | None  # [B, n, m] bool, True = closed; any strides, zero ones included
    previous: Outputs | None  # None: the first iteration
    p_model: str  # "gaussian" or "skm"

    @property
    def acc(self) -> torch.dtype:
        return self.mu_inp.dtype

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, n, m, c, d, h."""
        B, n, c, d = self.mu_inp.shape
        return B, n, self.W.shape[1], c, d, self.W.shape[3]

    @property
    def shared(self) -> bool:
        """One set of parameters serves every input. (With a single input it is all the same.)"""
        return self.W.shape[0] == 1


class Moments(NamedTuple):
    """What a forward pass gives, in acc; all that is kept of an iteration for the backward pass."""

    N0: Tensor  # [B, m]
    mean: Tensor  # [B, m, c, h]
    M2: Tensor  # [B, m, c, h]
    a: Tensor  # [B, m]
    low: Any = None  # [B, m, c, h], or None: sum_i D_ij (V_ij - mean_j) / N0_j, which is not quite 0


class OutputGrads(NamedTuple):
    r"""The gradient of an iteration's outputs, as the backward pass reads it, in acc. With e = V - center:

    dD_ij = sum_ch e (g1 + g2 e) - k_j + da_j (beta_use_ij + beta_ign_ij),
    dgate_i += sum_j dD_ij R_ij - da_j beta_ign_ij,    dV_ijch += D_ij (g1 + 2 g2 e),
    dbeta_use_ij += da_j D_ij,    dbeta_ign_ij -= da_j (gate_i - D_ij),

    over open pairs; and where there is a ``previous``, with dR = gate_i dD and dl_ij = R_ij (dR_ij - sum_k R_ik dR_ik),

    dV_ijch -= dl_ij (V - mu) / sig2   ("gaussian"),    dV_ijch -= 2 dl_ij (V - mu)   ("skm").

    From dV: dW_ijdh += sum_bc mu_icd dV, dbias_ijch += sum_b dV, dmu_inp_icd += sum_jh dV W_ijdh; all summed over i
    too where parameters are shared.
    """

    center: Tensor  # [B, m, c, h]: mean of this iteration
    g1: Tensor  # [B, m, c, h]
    g2: Tensor  # [B, m, c, h]
    k: Tensor  # [B, m]
    da: Tensor  # [B, m]

    @classmethod
    def of(cls, made: Moments, d: Outputs, eps: float) -> OutputGrads:
        """From the gradient ``d`` of what an iteration made.

        sum_i D_ij e_ij = 0 is what keeps the parts of the votes' gradients apart that nearly cancel in their sum; with
        e from a rounded mean it is not, and ``low`` makes up for that.
        """
        s = (made.N0 + eps)[..., None, None]
        rest = eps / s
        shift = rest * made.mean  # mean - mu
        along = d.mu + 2 * rest * d.sig2 * shift
        through = d.mu - 2 * rest * d.sig2 * (made.mean - shift)
        k = d.sig2 * (made.M2 / s - rest * shift.square()) - through * shift
        if made.low is not None:
            k = k + made.low * (along - d.sig2 * made.low)
            along = along - 2 * d.sig2 * made.low
        return cls(made.mean, along / s, d.sig2 / s, (k / s).sum((-2, -1)), d.a)


class PreviousGrads(NamedTuple):
    """Sums over inputs of dl, dl (V - mu) and dl (V - mu)^2, mu of ``previous``, in acc."""

    A0: Tensor  # [B, m]
    A1: Tensor  # [B, m, c, h]
    A2: Tensor  # [B, m, c, h]; "skm": not read

    def of(self, previous: Outputs, p_model: str) -> Outputs:
        """The gradient of the previous iteration's outputs."""
        da = self.A0 * torch.sigmoid(-previous.a)
        if p_model == "skm":
            return Outputs(da, 2 * self.A1, torch.zeros_like(self.A1))
        precision = previous.sig2.reciprocal()
        return Outputs(da, self.A1 * precision, 0.5 * precision * (self.A2 * precision - self.A0[..., None, None]))


@dataclass
class MatrixGrads:
    """Contiguous buffers in acc that the backward passes of all iterations, last first, fill together.

    ``fresh`` is True for the first pass to write them (they hold nothing yet), False for those that add. None: not
    wanted; the parameters' four are wanted together or not at all.
    """

    fresh: bool
    gate: Tensor  # [B, n]
    mu_inp: Tensor | None = None  # [B, n, c, d]
    W: Tensor | None = None  # [n1, m, d, h]
    bias: Tensor | None = None  # [n1, m, c, h]
    beta_use: Tensor | None = None  # [n1, m]
    beta_ign: Tensor | None = None  # [n1, m]


class Capsules(NamedTuple):
    """The parameters of matrix routing, under the names of the papers. n1 is n, or 1 for any number of inputs."""

    W: Tensor  # [n1, m, d, h]
    B: Tensor  # [n1, m, c, h]
    beta_use: Tensor  # [n1, m]
    beta_ign: Tensor  # [n1, m]
