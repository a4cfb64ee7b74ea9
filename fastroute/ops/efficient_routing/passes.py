"""All iterations of efficient vector routing over input vectors that come in chunks, and their gradient.

M and p are sums over the input vectors: a pass adds up those of its chunks, and the next pass needs nothing else of it.
The gradient goes over the chunks once more per iteration, last first. Vectors in one tensor are a single chunk.
Derived in ``docs/vector_routing.md`` and ``docs/capsules.md``.
Axes: B batch, T iterations, n input vectors in all, k of a chunk, m output vectors, d width of an input vector, h width
of an output vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..precision import precision_of
from ..vector_routing.contract import Grads, Passes, Step
from . import gram as gram
from .contract import Parameters
from .outputs import (
    first_betas,
    first_moments,
    norm_backward,
    outputs,
    outputs_backward,
    predictions,
    predictions_backward,
)
from .reference import cast, norm

#: The parameters that the passes over the input vectors read, and what a step and its gradients call them.
STEP_NAMES = {
    "W_A": "gate_weight", "B_A": "gate_bias", "W_S": "score_weight", "B_S": "score_bias",
    "beta_use": "use", "beta_ign": "ign", "bias_use": "use_bias", "bias_ign": "ign_bias",
}  # fmt: skip
PER_OUTPUT = tuple(name for name in Parameters._fields if name not in STEP_NAMES)
_GATE, _SCORE, _BETAS = ("W_A", "B_A"), ("W_S", "B_S"), ("beta_use", "bias_use", "beta_ign", "bias_ign")
_ONE_BETA = _BETAS[:2]

Form = Literal["pairs", "gram", "one beta"]


class Chunk(NamedTuple):
    number: int
    rows: slice | None  # where they are among all input vectors; None: they are all
    x: Tensor  # [B, k, d], k > 0
    mask: Tensor | None  # [B, k, m] bool
    lengths: Tensor | None  # [B] int64, how many of these rows are live
    kernel: ModuleType  # the backend of ``vector_routing``


class Call(NamedTuple):
    """Where the vectors come from, what is known of them before they come, and the options."""

    chunks: Callable[[], Iterable[Chunk]]  # the same ones every time
    whole: bool  # there is one chunk, and it may have a gradient
    form: Form  # of the first iteration
    scale: Tensor  # [B] acc
    n_iters: int
    normalize: bool
    precision: str  # autocast's, or ""
    over_ranks: Callable[..., tuple[Tensor, ...]] | None = None  # the sums of tensors, if others have more vectors

    @property
    def acc(self) -> torch.dtype:
        return self.scale.dtype

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """What is summed over these vectors, summed over all."""
        return parts if self.over_ranks is None else self.over_ranks(*parts)


class Saved(NamedTuple):
    """What the forward pass keeps for the backward pass: nothing with n x m or n x d elements."""

    gates: Sequence[Tensor]  # of each chunk, [B, k]
    M: Tensor  # [T, B, m, d]
    p: Tensor  # [T, B, m]
    y: Tensor  # [T, B, m, h], the output vectors before any norm
    G: Tensor  # [B, d, d], or [0]
    g: Tensor  # [B, d + 1], or [0]


def prepared(dtype: torch.dtype, w: Parameters, precision: str) -> tuple[torch.dtype, Parameters]:
    """The vectors' dtype and the parameters as kernels take them: in one dtype, or half precision with float32."""
    if precision:
        w = cast(w, torch.promote_types(w.W_F2.dtype, torch.float32))
    have = w.W_F2.dtype
    if dtype == have or (have == torch.float32 and dtype in (torch.bfloat16, torch.float16)):
        return dtype, w
    dtype = torch.promote_types(dtype, have)
    return dtype, cast(w, dtype)


def first_form(w: Parameters, *, whole: bool, masked: bool, n: int | None = None) -> Form:
    """How the first iteration is computed, from shapes alone.

    "pairs": as every other one. Linear betas without a mask make phi linear in x. Then there are also "gram",
    sum_i f_i x_i x_i^T, and "one beta", both betas in one. Multiplications per input vector, with x's gradient in
    parentheses:

    ========  ===============================  ===========
    form      forward                          backward
    ========  ===============================  ===========
    gram      d^2, 3/4 d^2 from d = 128 on     d^2
    one beta  2 m d                            3 m d (5)
    pairs     3 m d                            5 m d (8)
    ========  ===============================  ===========

    A stream, which has no gradient of x, may be forward alone: d^2 <= 2 m d. The whole takes "gram" where it is cheaper
    than even "one beta", forward and backward: 7/4 d^2 <= 7 m d. Beyond that it takes "pairs", whose gradients add up
    in place. So it does of a single input vector: phi x has x's direction then to the last digit, which a layer norm
    without much variance sees (float32: errors of 3e-7 and 2e-5).
    """
    m, d = w.W_F1.shape
    if w.bias_use is None or masked:
        return "pairs"
    if whole:
        return "gram" if d <= 4 * m and n != 1 else "pairs"
    return "gram" if d <= 2 * m else "one beta"


def new_moments(like: Tensor, w: Parameters, n_iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for M, p and y; ``like`` is [B]."""
    (m, d), h, (B,) = w.W_F1.shape, w.W_F2.shape[1], like.shape
    return like.new_empty((n_iters, B, m, d)), like.new_empty((n_iters, B, m)), like.new_empty((n_iters, B, m, h))


def new_rows(w: Parameters, acc: torch.dtype) -> dict[str, Tensor]:
    """A buffer for each of ``STEP_NAMES``: in the parameter's dtype if it has a row per input vector, else in acc."""
    n = None if w.bias_use is not None else w.beta_use.shape[0]
    given = {name: t for name in STEP_NAMES if (t := getattr(w, name)) is not None}
    return {k: t.new_empty(t.shape, dtype=t.dtype if t.shape[0] == n else acc) for k, t in given.items()}


class _Sum:
    """A sum over chunks: of one, its part. Of more, in float64 where there is one: there may be thousands."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._dtype: torch.dtype | None = None  # of the parts, once there are two

    @property
    def filled(self) -> bool:
        return self._sum is not None

    def add(self, part: Tensor) -> None:
        if self._sum is None:
            self._sum = part
        elif self._dtype is not None:
            self._sum += part
        else:
            self._dtype = part.dtype
            self._sum = (self._sum if part.device.type == "mps" else self._sum.double()) + part

    def get(self) -> Tensor:
        assert self._sum is not None
        return self._sum if self._dtype is None else self._sum.to(self._dtype)


def _step(
    call: Call, w: Parameters, chunk: Chunk, gate: Tensor | None, pred: Tensor | None,
    one: tuple[Tensor, Tensor] | None, shared: Passes | None = None,
) -> Step:  # fmt: skip
    """What a chunk gives the backend; ``one``: both betas in one; ``shared``: of all iterations."""
    first = pred is None
    own = w
    if chunk.rows is not None and w.bias_use is None:
        own = w._replace(**{name: getattr(w, name)[chunk.rows] for name in (*_GATE, *_SCORE, "beta_use", "beta_ign")})
    betas = own.beta_use, own.beta_ign, w.bias_use, w.bias_ign, w.prior.to(call.acc) if first else None
    if one is not None:
        betas = one[0], None, one[1], None, torch.ones_like(one[1])  # type: ignore[assignment]
    return Step(
        chunk.x, gate, own.W_A if first else None, own.B_A if first else None, call.scale, pred,
        None if first else own.W_S, None if first else own.B_S, *betas, chunk.mask, chunk.lengths,
        precision_of(chunk.x, call.precision), shared,
    )  # fmt: skip


def forward(call: Call, w: Parameters) -> tuple[Tensor, Saved]:
    """The output vectors [B, m, h], with the last norm if there is one, and what the backward pass needs."""
    all_M, all_p, all_y = new_moments(call.scale, w, call.n_iters)
    gates: list[Tensor] = []
    G, g = (call.scale.new_empty(0) for _ in range(2))
    shared = Passes(call.n_iters) if call.whole else None
    for t in range(call.n_iters):
        if shared is not None:
            shared.to_come -= 1
        P = predictions(all_y[t - 1], w).P if t else None
        one = first_betas(w, call.acc) if call.form == "one beta" and not t else None
        sums = _Sum(), _Sum()
        for chunk in call.chunks():
            if t == 0 and call.form == "gram":
                gate, *parts = gram.forward(chunk.x, w.W_A, w.B_A, call.scale, chunk.lengths)
            else:
                before = gates[chunk.number] if t else None
                *parts, gate = chunk.kernel.forward(_step(call, w, chunk, before, P, one, shared))
            for total, part in zip(sums, parts, strict=True):
                total.add(part)
            if t == 0:
                gates.append(gate)
        M, p = (total.get() for total in sums)
        if t == 0 and call.form == "gram":
            G, g = M, p
            M, p = first_moments(G, g, *first_betas(w, call.acc))
        M, p = call.total(M, p)
        all_M[t] = M
        all_p[t] = p
        all_y[t] = outputs(M, p, call.scale, w)
    y = all_y[-1]
    return norm(y) if call.normalize else y.clone(), Saved(gates, all_M, all_p, all_y, G, g)


def backward(
    call: Call, w: Parameters, saved: Saved, dout: Tensor, *, want_rows: bool, dx: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradients of the parameters, by name; fills dx, of the whole. Those of ``STEP_NAMES`` only if wanted."""
    device = call.scale.device
    per_output = {name: torch.zeros(getattr(w, name).shape, dtype=call.acc, device=device) for name in PER_OUTPUT}
    dw = w._replace(**per_output)
    rows = _RowGradients(call, w, saved.gates, want_rows, dx)
    dy = norm_backward(dout, saved.y[-1]) if call.normalize else dout
    for t in reversed(range(call.n_iters)):
        dM, dp = outputs_backward(dy, saved.M[t], saved.p[t], call.scale, w, dw)
        if t == 0:
            break
        seen, dP = predictions(saved.y[t - 1], w), _Sum()
        for chunk in call.chunks():
            step = _step(call, w, chunk, saved.gates[chunk.number], seen.P, None)
            grads = rows.of(chunk, (*_SCORE, *_BETAS), to_come=t - (call.form == "gram"))
            dP.add(chunk.kernel.backward(step, dM, dp, grads))
            rows.add(grads, (*_SCORE, *_BETAS), {})
        rows.fresh = False
        (all_dP,) = call.total(dP.get())
        dy = predictions_backward(all_dP, seen, saved.y[t - 1], w, dw)
    if want_rows or dx is not None:  # else nothing is left to be found
        _first_backward(call, w, saved, dM, dp, rows)
    return per_output | rows.found()


def _first_backward(call: Call, w: Parameters, saved: Saved, dM: Tensor, dp: Tensor, rows: _RowGradients) -> None:
    form = call.form
    one = None if form == "pairs" else first_betas(w, call.acc)
    if form == "gram":
        assert one is not None
        (v, e), G, g, d = one, saved.G, saved.g[:, : w.W_F1.shape[1]], w.W_F1.shape[1]
        if rows.wanted:
            dv = torch.einsum("bjc,bac->ja", dM, G) + dp.mT @ g
            rows.add_first_betas(dv, torch.einsum("bjd,bd->j", dM, g) + saved.g[:, d] @ dp)
        dG = torch.einsum("ja,bjc->bac", v, dM)
        dg = torch.cat([torch.einsum("j,bjd->bd", e, dM) + dp @ v, (dp @ e)[:, None]], 1)
    names = _GATE + {"pairs": _BETAS, "gram": (), "one beta": _ONE_BETA}[form]
    of_one = {name: _Sum() for name in _ONE_BETA} if form == "one beta" else {}
    for chunk in call.chunks():
        gate, grads = saved.gates[chunk.number], rows.of(chunk, names)
        if form == "gram":
            gram.backward(chunk.x, gate, w.W_A, call.scale, chunk.lengths, dG, dg, grads)
        else:
            chunk.kernel.backward(_step(call, w, chunk, gate, None, one), dM, dp, grads)
        rows.add(grads, names, of_one)
    if of_one:
        rows.add_first_betas(*(total.get() for total in of_one.values()))


class _RowGradients:
    """Gradients of the gates, of x, and of the parameters that the passes over the input vectors read.

    A parameter with a row per input vector has one dense buffer, of which each chunk fills its rows. What all rows
    share is filled by the whole, in place in all passes; a chunk of many makes its part anew, and the parts are summed.
    """

    def __init__(self, call: Call, w: Parameters, gates: Sequence[Tensor], wanted: bool, dx: Tensor | None) -> None:
        self.fresh, self.wanted, self._w, self._acc = True, wanted, w, call.acc
        summed = wanted and not call.whole and w.bias_use is not None
        self._sums = {name: _Sum() for name in STEP_NAMES} if summed else {}
        self._buffers = new_rows(w, call.acc) if wanted and not summed else {}
        self._of_chunks = [Grads(True, torch.empty_like(gate), dx) for gate in gates]

    def of(self, chunk: Chunk, names: Sequence[str], to_come: int = 0) -> Grads:
        """What a pass over a chunk fills: of the parameters, those named."""
        grads = self._of_chunks[chunk.number]
        grads.fresh, grads.to_come = self.fresh, to_come
        for name, buffer in self._buffers.items() if self.fresh else ():
            setattr(grads, STEP_NAMES[name], buffer if chunk.rows is None else buffer[chunk.rows])
        for name in names if self._sums else ():
            like: Tensor = getattr(self._w, name)
            setattr(grads, STEP_NAMES[name], like.new_zeros(like.shape, dtype=self._acc))
        return grads

    def add(self, grads: Grads, names: Sequence[str], to: Mapping[str, _Sum]) -> None:
        """A chunk has filled those named; some may be summed apart."""
        for name in names if self._sums else ():
            to.get(name, self._sums[name]).add(getattr(grads, STEP_NAMES[name]))
            setattr(grads, STEP_NAMES[name], None)

    def add_first_betas(self, dv: Tensor, de: Tensor) -> None:
        """The gradient of ``first_betas``, taken on to the betas."""
        c = self._w.prior.to(self._acc)
        if self.fresh and self._buffers:  # a single iteration
            for name in (*_SCORE, *_BETAS):
                self._buffers[name].zero_()
        used, ignored = (c[:, None], c), (c[:, None] - 1, c - 1)
        for name, factor, part in zip(_BETAS, (*used, *ignored), (dv, de) * 2, strict=True):
            if self._sums:
                self._sums[name].add(factor * part)
            else:
                self._buffers[name].addcmul_(factor, part)

    def found(self) -> dict[str, Tensor]:
        return self._buffers | {name: total.get() for name, total in self._sums.items() if total.filled}
