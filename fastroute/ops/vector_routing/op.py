"""``vector_routing``: one routing iteration, [B, n, d] to moments [B, m, d], as one registered op and its gradient.

Heinsen (2022), "An Algorithm for Routing Vectors in Sequences", section 2, equations for the E, D and M steps.
Axes: B batch, n input vectors, m output vectors, d width of an input vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..arguments import explained
from ..autograd import asked_again, called, through, transformed
from ..backends import Case, choose, offer, record, requested
from ..dtypes import accumulating
from ..masked import reaching
from ..precision import autocast_off, autocast_precision, precision_of
from ..registry import define, no_second_derivative
from . import native as native  # defines the native ops
from . import reference as reference
from .contract import Grads, Step
from .reference import assign as assign
from .reference import gates as gates
from .reference import row_is_live as row_is_live

OP = "vector_routing"

_INPUTS = (
    "Tensor x, Tensor gate, Tensor? pred, Tensor? score_weight, Tensor? score_bias, Tensor use, Tensor? ign, "
    "Tensor? use_bias, Tensor? ign_bias, Tensor? prior, Tensor? mask, Tensor? lengths, str backend, str precision"
)


def case_of(x: Tensor, n_out: int) -> Case:
    B, n, d = x.shape
    return Case(OP, x.device.type, x.dtype, (("B", B), ("n", n), ("m", n_out), ("d", d)))


offer(OP, "native")


def _step(inputs: list[Any], precision: str) -> Step:
    x, gate, *rest = inputs
    fields: tuple[Any, ...] = (x, gate, None, None, None, *rest, precision_of(x, precision))
    return Step(*fields)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend, precision = args
    step = _step(inputs, precision)
    B, n, d = step.x.shape
    if B == 0 or n == 0:
        return step.x.new_zeros((B, step.n_out, d), dtype=step.acc), step.x.new_zeros((B, step.n_out), dtype=step.acc)
    with autocast_off(step.x.device.type):
        M, p, _ = choose(case_of(step.x, step.n_out), backend).forward(step)
    return M, p


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, _, precision = args
    step = _step(inputs, precision)
    B, _, d = step.x.shape
    record(case_of(step.x, step.n_out))
    return step.x.new_empty((B, step.n_out, d), dtype=step.acc), step.x.new_empty((B, step.n_out), dtype=step.acc)


_GRADS = ("x", "gate", "pred", "score_weight", "score_bias", "use", "ign", "use_bias", "ign_bias")


def _empty_grads(step: Step, want_x: bool, want_rows: bool) -> dict[str, Any]:
    """A buffer per differentiable input: dtype of the input if it has a row per input vector, acc if rows share it."""

    def like(t: Tensor | None, shared: bool) -> Tensor | None:
        return None if t is None else t.new_empty(t.shape, dtype=step.acc if shared else t.dtype)

    n = step.x.shape[1]
    rows = {
        name: like(t, step.linear or t.shape[0] != n)
        for name in _GRADS[3:]
        if (t := getattr(step, name)) is not None and want_rows
    }
    return {"x": step.x.new_empty(step.x.shape) if want_x else None, "gate": like(step.gate, True), **rows}


def _backward(*args: Any) -> list[Tensor]:
    *inputs, precision, dM, dp, want_x, want_rows = args
    *tensors, backend = inputs
    step = _step(tensors, precision)
    buffers = _empty_grads(step, want_x, want_rows)
    B, n, _ = step.x.shape
    if B == 0 or n == 0:
        filled = {name: None if b is None else b.zero_() for name, b in buffers.items()}
        dpred = None if step.pred is None else torch.zeros_like(step.pred)
    else:
        filled = buffers
        with autocast_off(step.x.device.type):
            dpred = choose(case_of(step.x, step.n_out), backend).backward(step, dM, dp, Grads(True, **buffers))
    return _as_list(step, filled, dpred)


def _as_list(step: Step, buffers: dict[str, Any], dpred: Tensor | None) -> list[Tensor]:
    found = {**buffers, "pred": dpred}
    return [t if (t := found.get(name)) is not None else step.x.new_empty(0) for name in _GRADS]


def _backward_fake(*args: Any) -> list[Tensor]:
    *inputs, precision, _, _, want_x, want_rows = args
    *tensors, _ = inputs
    step = _step(tensors, precision)
    record(case_of(step.x, step.n_out))
    dpred = None if step.pred is None else step.pred.new_empty(step.pred.shape)
    return _as_list(step, _empty_grads(step, want_x, want_rows), dpred)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.backend, ctx.precision = inputs
    ctx.save_for_backward(*tensors)


def _plain(x: Tensor, gate: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The reference, in the dtype of sums."""
    *parameters, use_bias, ign_bias, prior, mask, lengths = (
        t.to(gate.dtype) if t is not None and t.is_floating_point() else t for t in rest
    )
    more = dict(use_bias=use_bias, ign_bias=ign_bias, prior=prior, mask=mask, lengths=lengths)
    return reference.vector_routing(x.to(gate.dtype), gate, *parameters, **more)


def _gradient(ctx: Any, dM: Tensor, dp: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if asked_again(dM, dp):
        return (*through(_plain, tensors, needs[: len(tensors)], [dM, dp]), None, None)
    found = called(
        f"{OP}_backward", *tensors, ctx.backend, ctx.precision, dM.contiguous(), dp.contiguous(), needs[0],
        any(needs[3:9]),
    )  # fmt: skip
    found = [g.to(t.dtype) if need else None for g, t, need in zip(found, tensors, needs, strict=False)]
    return (*found, None, None, None, None, None)


define(
    "vector_routing_backward",
    f"({_INPUTS}, Tensor dM, Tensor dp, bool want_x, bool want_rows) -> Tensor[]",
    _backward,
    _backward_fake,
    autograd=no_second_derivative("vector_routing"),
)
define(OP, f"({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_fake, autograd=(_gradient, _setup))


@explained
def vector_routing(
    x: Tensor,
    gate: Tensor,
    pred: Tensor | None,
    score_weight: Tensor | None,
    score_bias: Tensor | None,
    use: Tensor,
    ign: Tensor | None,
    *,
    use_bias: Tensor | None = None,
    ign_bias: Tensor | None = None,
    prior: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One iteration of routing by agreement, with a softmax over outputs and a sum over inputs.

    .. math::
        S_{ij} &= \log\sigma(\langle x_i, P_j\rangle\, W_{ij} + B_{ij}), \qquad R_{ij} = \mathrm{softmax}_j\, S_{ij} \\
        \phi_{ij} &= \beta^{use}_{ij} f_i R_{ij} - \beta^{ign}_{ij} (f_i - f_i R_{ij}) \\
        M_j &= \sum_i \phi_{ij} x_i, \qquad p_j = \sum_i \phi_{ij}

    Nothing of size n x m is stored, forward or backward. A row whose every pair is masked contributes zero,
    whatever is in it.

    Args:
        x: input vectors [B, n, d]; float16, bfloat16, float32 or float64.
        gate: f [B, n], how much of each input is used at all; float32, or float64 with float64 inputs.
        pred: P [B, m, d], each output's prediction of an input, dtype of gate. None: first iteration, R is ``prior``.
        score_weight, score_bias: W, B, each [n, m], or [1, m] for every row. None without ``pred``.
        use, ign: betas [n, m]; with ``use_bias`` and ``ign_bias`` [m], weights [m, d] of betas linear in x.
            ign may be None: nothing is subtracted.
        prior: [m], dtype of gate, the first iteration's R. Where it is learned, plain PyTorch makes this iteration.
        mask: bool [B, n, m] or what broadcasts to it; True closes the pair.
        lengths: int64 [B]; rows from there on are not read and get zero gradient.

    Returns:
        M [B, m, d] and p [B, m], dtype of gate.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> x, gate = torch.randn(2, 6, 8), torch.rand(2, 6)
        >>> pred, weight, bias = torch.randn(2, 3, 8), torch.randn(6, 3), torch.zeros(6, 3)
        >>> M, p = fastroute.functional.vector_routing(x, gate, pred, weight, bias, torch.rand(6, 3), torch.rand(6, 3))
        >>> M.shape, p.shape
        (torch.Size([2, 3, 8]), torch.Size([2, 3]))
    """
    checks.floating("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected [B, n, d], got {checks.shown(x)}")
    B, n, d = x.shape
    acc = accumulating(x.dtype)
    linear = use_bias is not None
    m = use.shape[0] if linear else use.shape[-1]
    tensors = {"gate": gate, "pred": pred, "score_weight": score_weight, "score_bias": score_bias, "use": use,
               "ign": ign, "use_bias": use_bias, "ign_bias": ign_bias, "prior": prior, "mask": mask}  # fmt: skip
    checks.together(("x", x), tensors)
    checks.shape("gate", gate, (B, n), "B, n")
    beta = ((m, d), "m, d") if linear else ((n, m), "n, m")
    checks.shape("use", use, *beta)
    if ign is not None:
        checks.shape("ign", ign, *beta)
        if (ign_bias is None) == linear:
            raise ValueError("ign_bias: expected one exactly when use_bias and ign are given")
    for name in ("use_bias", "ign_bias"):
        if (bias := tensors[name]) is not None:
            checks.shape(name, bias, (m,), "m")
    for name in ("use", "ign", "score_weight", "score_bias", "use_bias", "ign_bias"):
        if (rows := tensors[name]) is not None:
            checks.floating(name, rows)
    if pred is None:
        if prior is None:
            raise ValueError("prior: expected [m] when pred is None (a first iteration), got None")
        checks.shape("prior", prior, (m,), "m")
        score_weight = score_bias = None
    else:
        checks.shape("pred", pred, (B, m, d), "B, m, d")
        for name in ("score_weight", "score_bias"):
            if (score := tensors[name]) is None:
                raise ValueError(f"{name}: expected [n, m] with pred, got None")
            checks.shape(name, score, (1 if score.shape[:1] == (1,) else n, m), "n or 1, m")
        prior = None
        if score_weight.shape[0] != score_bias.shape[0]:  # type: ignore[union-attr]
            score_weight, score_bias = score_weight.expand(n, m), score_bias.expand(n, m)  # type: ignore[union-attr]
    for name in ("gate", "pred", "prior"):
        if (t := tensors[name]) is not None and t.dtype != acc:
            raise TypeError(f"{name}: expected {acc} with x {x.dtype}, got {t.dtype}")
    if mask is not None:
        mask = checks.as_mask(mask, (B,), n, m)
        x, gate = reaching(x, mask), reaching(gate, mask)
    if lengths is not None:
        lengths = checks.as_lengths(lengths, (B,), n, x.device)
    if transformed() or (prior is not None and prior.requires_grad and torch.is_grad_enabled()):  # no kernel has that
        rest = pred, score_weight, score_bias, use, ign, use_bias, ign_bias, prior, mask, lengths
        with autocast_off(x.device.type):
            return _plain(x, gate, *rest)
    M, p = called(
        OP, _rows_contiguous(x), gate, pred, score_weight, score_bias, use, ign, use_bias, ign_bias, prior, mask,
        lengths, requested(), autocast_precision(x.device.type),
    )  # fmt: skip
    return M, p


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
