"""``efficient_routing``: all iterations of efficient vector routing as one registered op and its gradient.

Heinsen (2022), "An Algorithm for Routing Vectors in Sequences". The passes over the inputs are ``vector_routing``'s
backends; what is per output ([m, d] and [m, h]) is plain PyTorch. Derived in ``docs/vector_routing.md``.
Axes: B batch, T iterations, n input vectors, m output vectors, d width of an input vector, h width of an output vector.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import efficient_routing as reference
from ..reference.efficient_routing import Parameters, cast, input_scale, norm
from ..reference.step import Grads, Passes, Step
from . import _gram as gram
from ._arguments import explained
from ._autocast import autocast_off
from ._autograd import asked_again, through, transformed
from ._backends import choose, record, requested
from ._registry import define, no_second_derivative
from ._routing_outputs import (
    LATER,
    first_betas,
    norm_backward,
    outputs,
    outputs_backward,
    predictions,
    predictions_backward,
    used,
)
from .vector_routing import autocast_precision, case_of, precision_of

_PARAMETERS = ", ".join(f"Tensor{'?' if name.startswith('bias') else ''} {name}" for name in Parameters._fields)
_INPUTS = (
    f"Tensor x, {_PARAMETERS}, Tensor? mask, Tensor? lengths, int n_iters, bool normalize, str backend, str precision"
)
_N = len(Parameters._fields)


def _at(*names: str) -> tuple[int, ...]:
    return tuple(1 + Parameters._fields.index(name) for name in names)


_ROWS = _at("W_A", "B_A", "W_S", "B_S", "beta_use", "beta_ign", "bias_use", "bias_ign")
_UNUSED_IN_ONE_ITERATION = _at(*LATER)


class _Call(NamedTuple):
    """The op's arguments, and what follows from their shapes."""

    x: Tensor
    w: Parameters
    mask: Tensor | None
    lengths: Tensor | None
    n_iters: int
    normalize: bool
    backend: str
    precision: str

    @classmethod
    def of(cls, args: Any) -> _Call:
        return cls(args[0], Parameters(*args[1 : 1 + _N]), *args[1 + _N :])

    @property
    def acc(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, self.w.W_F2.dtype)

    @property
    def any_length(self) -> bool:
        return self.w.bias_use is not None

    @property
    def uses_gram(self) -> bool:
        """With linear betas and no mask, the first iteration costs less by sum_i f_i x_i x_i^T when d is small."""
        m, d = self.w.W_F1.shape
        return self.any_length and self.mask is None and d <= 4 * m

    @property
    def is_empty(self) -> bool:
        return self.x.shape[0] == 0


class _Saved(NamedTuple):
    """What the forward pass keeps for the backward pass: nothing with n x m or n x d elements."""

    gate: Tensor  # [B, n]
    M: Tensor  # [T, B, m, d]
    p: Tensor  # [T, B, m]
    y: Tensor  # [T, B, m, h], the output vectors before any norm
    G: Tensor  # [B, d, d], or [0]
    g: Tensor  # [B, d + 1], or [0]


def _new_saved(call: _Call) -> _Saved:
    B, n, d = call.x.shape
    m, h, T = call.w.W_F1.shape[0], call.w.W_F2.shape[1], call.n_iters
    sizes = [(B, n), (T, B, m, d), (T, B, m), (T, B, m, h), (B, d, d), (B, d + 1)]
    if not call.uses_gram:
        sizes[4:] = [(0,), (0,)]
    return _Saved(*(call.x.new_empty(size, dtype=call.acc) for size in sizes))


def _step(
    call: _Call, scale: Tensor, gate: Tensor | None, pred: Tensor | None, *, first: bool, passes: Passes | None = None
) -> Step:
    """What iteration t gives the backend."""
    w = call.w
    return Step(
        call.x, gate, w.W_A if first else None, w.B_A if first else None, scale, pred,
        None if first else w.W_S, None if first else w.B_S, w.beta_use, w.beta_ign, w.bias_use, w.bias_ign,
        w.prior.to(call.acc) if first else None, call.mask, call.lengths, precision_of(call.x, call.precision),
        passes,
    )  # fmt: skip


def _forward(*args: Any) -> tuple[Tensor, ...]:
    call = _Call.of(args)
    saved = _new_saved(call)
    if call.is_empty:
        return saved.y[0].to(call.out_dtype, copy=True), *saved
    with autocast_off(call.x.device.type):
        return _routed(call, saved), *saved


def _routed(call: _Call, saved: _Saved) -> Tensor:
    x, w = call.x, call.w
    d = x.shape[-1]
    kernel = choose(case_of(x, w.W_F1.shape[0]), call.backend)
    scale = input_scale(x, call.lengths)
    passes = Passes(call.n_iters)
    for t in range(call.n_iters):
        passes.to_come -= 1
        if t > 0:
            pred = predictions(saved.y[t - 1], w).P
            M, p, _ = kernel.forward(_step(call, scale, saved.gate, pred, first=False, passes=passes))
        elif call.uses_gram:
            gate, G, g = gram.forward(x, w.W_A, w.B_A, scale, call.lengths)
            for kept, made in zip((saved.gate, saved.G, saved.g), (gate, G, g), strict=True):
                kept.copy_(made)
            v, e = first_betas(w, call.acc)
            M, p = v @ G + e[:, None] * g[:, None, :d], g[:, :d] @ v.mT + e * g[:, d:]
        else:
            M, p, gate = kernel.forward(_step(call, scale, None, None, first=True, passes=passes))
            saved.gate.copy_(gate)
        saved.M[t] = M
        saved.p[t] = p
        saved.y[t] = outputs(M, p, scale, w)
    y = saved.y[-1]
    return (norm(y) if call.normalize else y.clone()).to(call.out_dtype)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    call = _Call.of(args)
    saved = _new_saved(call)
    record(case_of(call.x, call.w.W_F1.shape[0]))
    return saved.y.new_empty(saved.y.shape[1:], dtype=call.out_dtype), *saved


def _new_grads(call: _Call, want_x: bool) -> tuple[Tensor, Parameters]:
    """(dx, a gradient per parameter): a row per input vector in the parameter's dtype, all else in acc."""
    n = call.x.shape[1]

    def like(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        per_row = not call.any_length and t.shape[0] == n
        return t.new_empty(t.shape, dtype=t.dtype if per_row else call.acc)

    w = call.w
    rows = {"W_A", "B_A", "W_S", "B_S", "beta_use", "beta_ign"}
    made = {
        name: like(t) if name in rows else None if t is None else t.new_empty(t.shape, dtype=call.acc)
        for name, t in w._asdict().items()
    }
    return call.x.new_empty(call.x.shape if want_x else (0,)), Parameters(**made)  # type: ignore[arg-type]


def _listed(dx: Tensor, dw: Parameters) -> list[Tensor]:
    return [dx, *(t if t is not None else dx.new_empty(0) for t in dw)]


def _backward(*args: Any) -> list[Tensor]:
    *inputs, dout, gate, M, p, y, G, g, want_x, want_rows = args
    call = _Call.of(inputs)
    dx, dw = _new_grads(call, want_x)
    if call.is_empty:
        return [t.zero_() for t in _listed(dx, dw)]
    with autocast_off(call.x.device.type):
        _differentiate(call, _Saved(gate, M, p, y, G, g), dout.to(call.acc), dx if want_x else None, dw, want_rows)
    return _listed(dx, dw)


def _backward_fake(*args: Any) -> list[Tensor]:
    *inputs, _, _, _, _, _, _, _, want_x, _ = args
    call = _Call.of(inputs)
    record(case_of(call.x, call.w.W_F1.shape[0]))
    return _listed(*_new_grads(call, want_x))


def _differentiate(
    call: _Call, saved: _Saved, dout: Tensor, dx: Tensor | None, dw: Parameters, want_rows: bool
) -> None:
    """Last iteration first; dx and the parameters' gradients are filled in place."""
    w = call.w
    kernel = choose(case_of(call.x, w.W_F1.shape[0]), call.backend)
    scale = input_scale(call.x, call.lengths)
    for per_output in (dw.W_F1, dw.W_F2, dw.B_F2, dw.W_G1, dw.W_G2, dw.B_G2, dw.prior):
        per_output.zero_()
    grads = Grads(True, torch.empty_like(saved.gate), dx)
    if want_rows:
        grads.gate_weight, grads.gate_bias, grads.score_weight, grads.score_bias = dw.W_A, dw.B_A, dw.W_S, dw.B_S
        grads.use, grads.ign, grads.use_bias, grads.ign_bias = dw.beta_use, dw.beta_ign, dw.bias_use, dw.bias_ign
    dy = norm_backward(dout, saved.y[-1]) if call.normalize else dout
    for t in reversed(range(call.n_iters)):
        first = t == 0
        dM, dp = outputs_backward(dy, saved.M[t], saved.p[t], scale, w, dw)
        if first:
            break
        seen = predictions(saved.y[t - 1], w)
        grads.to_come = t - call.uses_gram
        dP = kernel.backward(_step(call, scale, saved.gate, seen.P, first=False), dM, dp, grads)
        grads.fresh = False
        dy = predictions_backward(dP, seen, saved.y[t - 1], w, dw)
    if call.uses_gram:
        _differentiate_gram(call, saved, scale, dM, dp, dw, grads)
    else:
        grads.to_come = 0
        kernel.backward(_step(call, scale, saved.gate, None, first=True), dM, dp, grads)


def _differentiate_gram(
    call: _Call, saved: _Saved, scale: Tensor, dM: Tensor, dp: Tensor, dw: Parameters, grads: Grads
) -> None:
    """The first iteration in Gram form, M = G v + e g and p = <g, v> + e f."""
    d = call.x.shape[-1]
    v, e = first_betas(call.w, call.acc)
    if grads.use is not None:
        c = call.w.prior.to(call.acc)
        dv = torch.einsum("bjc,bac->ja", dM, saved.G) + dp.mT @ saved.g[:, :d]
        de = torch.einsum("bjd,bd->j", dM, saved.g[:, :d]) + saved.g[:, d] @ dp
        assert grads.ign is not None and grads.use_bias is not None and grads.ign_bias is not None
        if grads.fresh:  # a single iteration
            for buffer in (dw.W_S, dw.B_S, grads.use, grads.ign, grads.use_bias, grads.ign_bias):
                buffer.zero_()
        grads.use.addcmul_(c[:, None], dv)
        grads.ign.addcmul_(c[:, None] - 1, dv)
        grads.use_bias.addcmul_(c, de)
        grads.ign_bias.addcmul_(c - 1, de)
    dG = torch.einsum("ja,bjc->bac", v, dM)
    dg = torch.cat([torch.einsum("j,bjd->bd", e, dM) + dp @ v, (dp @ e)[:, None]], 1)
    gram.backward(call.x, saved.gate, call.w.W_A, scale, call.lengths, dG, dg, grads)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, *rest = inputs
    ctx.options = inputs[-4:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *rest[: _N + 2], *output[1:])


def _plain(call: _Call) -> Tensor:
    """The reference, in the dtype of sums."""
    with autocast_off(call.x.device.type):
        y = reference.efficient_routing(
            call.x.to(call.acc), cast(call.w, call.acc), n_iters=call.n_iters, normalize=call.normalize,
            mask=call.mask, lengths=call.lengths,
        )  # fmt: skip
    return y.to(call.out_dtype)


def _gradient(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    nothing = (None,) * 6
    if dout is None:
        return (*[None] * (1 + _N), *nothing)
    tensors = ctx.saved_tensors  # once: under checkpointing each look is a computation
    inputs, saved = tensors[: _N + 3], tensors[_N + 3 :]
    if asked_again(dout):

        def plain(*given: Any) -> list[Tensor]:
            return [_plain(_Call.of((*given, *ctx.options)))]

        return *through(plain, inputs, needs[: _N + 3], [dout]), *nothing[2:]
    made = torch.ops.fastroute.efficient_routing_backward(
        *inputs, *ctx.options, dout.contiguous(), *saved, needs[0], any(needs[i] for i in _ROWS)
    )
    unused = _UNUSED_IN_ONE_ITERATION if ctx.options[0] == 1 else ()
    grads = [
        g.to(t.dtype) if need and i not in unused else None
        for i, (g, t, need) in enumerate(zip(made, inputs, needs, strict=False))
    ]
    return *grads, *nothing


_SAVED = "Tensor gate, Tensor M, Tensor p, Tensor y, Tensor G, Tensor g"
define(
    "efficient_routing_backward",
    f"({_INPUTS}, Tensor dout, {_SAVED}, bool want_x, bool want_rows) -> Tensor[]",
    _backward,
    _backward_fake,
    autograd=no_second_derivative("efficient_routing"),
)
define(
    "efficient_routing",
    f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    autograd=(_gradient, _setup),
)


def _promoted(x: Tensor, w: Parameters) -> tuple[Tensor, Parameters]:
    """One dtype, or half-precision inputs with float32 parameters: the pairs the kernels take."""
    have = w.W_F2.dtype
    if x.dtype == have or (have == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        return x, w
    to = torch.promote_types(x.dtype, have)
    return x.to(to), cast(w, to)


@explained
def efficient_routing(
    x: Tensor,
    w: Parameters,
    *,
    n_iters: int,
    normalize: bool,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Route input vectors x [B, n, d] to output vectors [B, m, h], Heinsen (2022), section 2.

    The arguments are taken as ``EfficientVectorRouting`` has checked them: ``w`` as in
    ``reference.efficient_routing.Parameters``, ``mask`` bool [B, n, m] (any strides), ``lengths`` int64 [B].
    Returns x_out in the promoted dtype of x and w, float32 under autocast.
    """
    autocast = autocast_precision(x.device.type)
    if autocast:
        w = cast(w, torch.promote_types(w.W_F2.dtype, torch.float32))
    x, w = _promoted(x, w)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    args = x, *used(w, n_iters), mask, lengths, n_iters, normalize, requested(), autocast
    if transformed():
        return _plain(_Call.of(args))
    out: Tensor = torch.ops.fastroute.efficient_routing(*args)[0]
    return out
