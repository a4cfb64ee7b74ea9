"""All iterations of efficient vector routing over input vectors that come in chunks, once per iteration.

A pass adds the moments of its chunks up, since M and p are sums over the input vectors; between two passes only they
are needed. The gradient goes over the chunks once more per iteration, last first. Derived in ``docs/capsules.md``.
Axes: B batch, n input vectors in all, k of a chunk, m output vectors, d width of an input vector, h of an output one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.efficient_routing import Parameters, norm
from ..reference.step import Grads, Step
from . import _gram as gram
from ._autocast import autocast_off
from ._autograd import asked_again, transformed
from ._backends import choose
from ._masked import only, reaches
from ._routing_outputs import (
    LATER,
    Predictions,
    first_betas,
    norm_backward,
    outputs,
    outputs_backward,
    predictions,
    predictions_backward,
    used,
)
from .vector_routing import case_of, precision_of

_ROWS = ("W_A", "B_A", "W_S", "B_S", "beta_use", "beta_ign")
_LINEAR = (*_ROWS, "bias_use", "bias_ign")


class Streamed(NamedTuple):
    """A call: where the vectors come from, what is known of them before they come, and the options."""

    passes: Callable[[], Iterator[Tensor]]  # every call gives the same [B, k, d], k > 0, n rows in all
    scale: Tensor  # [B] acc
    mask: Tensor | None  # [B, n, m] bool
    lengths: Tensor | None  # [B] int64
    n_iters: int
    normalize: bool
    backend: str
    precision: str  # autocast's, or ""

    @property
    def acc(self) -> torch.dtype:
        return self.scale.dtype


class _Chunk(NamedTuple):
    number: int
    rows: slice
    x: Tensor  # [B, k, d]
    mask: Tensor | None
    lengths: Tensor | None  # of this chunk's rows, how many are live


class _Saved(NamedTuple):
    gates: list[Tensor]  # of each chunk, [B, k]
    M: list[Tensor]  # of each iteration, [B, m, d]
    p: list[Tensor]  # [B, m]
    y: list[Tensor]  # [B, m, h], the output vectors before any norm
    G: Tensor | None  # [B, d, d], [B, d + 1] where the first iteration is in Gram form
    g: Tensor | None


def _chunks(call: Streamed) -> Iterator[_Chunk]:
    start = 0
    for number, x in enumerate(call.passes()):
        rows = slice(start, start + x.shape[1])
        mask = None if call.mask is None else call.mask[:, rows]
        x = x if mask is None else only(x, reaches(mask))
        lengths = None if call.lengths is None else (call.lengths - start).clamp(0, x.shape[1])
        yield _Chunk(number, rows, x, mask, lengths)
        start = rows.stop


class _Total:
    """A sum over chunks. In float64 where there is one: it may have thousands of terms, and costs nothing per row."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._acc = dtype
        self._sum: Tensor | None = None

    @property
    def filled(self) -> bool:
        return self._sum is not None

    def add(self, t: Tensor) -> None:
        t = t if t.device.type == "mps" else t.double()
        if self._sum is None:
            self._sum = t.clone()  # a buffer is filled again by the next chunk
        else:
            self._sum += t

    def get(self) -> Tensor:
        assert self._sum is not None
        return self._sum.to(self._acc)


def _form(call: Streamed, w: Parameters) -> str:
    """How the first iteration is computed, from shapes alone.

    "pairs": as every other. With linear betas and no mask phi is linear in x, too, and needs no betas of its own:
    "gram": by sum_i f_i x_i x_i^T, d^2 multiplications a row; "betas": by both betas in one, 2 m d.
    """
    m, d = w.W_F1.shape
    if w.bias_use is None or call.mask is not None:
        return "pairs"
    return "gram" if d <= 2 * m else "betas"


def _own(t: Tensor, chunk: _Chunk, linear: bool) -> Tensor:
    """A chunk's part of a parameter that has a row per input vector."""
    return t if linear else t[chunk.rows]


def _step(
    call: Streamed,
    w: Parameters,
    chunk: _Chunk,
    gate: Tensor | None,
    pred: Tensor | None,
    betas: tuple[Tensor, Tensor] | None,
) -> Step:
    linear, first = w.bias_use is not None, pred is None
    own = {name: _own(getattr(w, name), chunk, linear) for name in _ROWS}
    prior = w.prior.to(call.acc) if first else None
    use, ign, use_bias, ign_bias = own["beta_use"], own["beta_ign"], w.bias_use, w.bias_ign
    if first and betas is not None:
        use, use_bias, prior = *betas, torch.ones_like(betas[1])
    return Step(
        chunk.x, gate, own["W_A"] if first else None, own["B_A"] if first else None, call.scale, pred,
        None if first else own["W_S"], None if first else own["B_S"], use, None if betas else ign, use_bias,
        None if betas else ign_bias, prior, chunk.mask, chunk.lengths, precision_of(chunk.x, call.precision),
    )  # fmt: skip


def _forward(call: Streamed, w: Parameters) -> tuple[Tensor, _Saved]:
    saved = _Saved([], [], [], [], None, None)
    form, d = _form(call, w), w.W_F1.shape[1]
    for t in range(call.n_iters):
        M_total, p_total, G_total, g_total = (_Total(call.acc) for _ in range(4))
        P = predictions(saved.y[-1], w).P if t else None
        betas = first_betas(w, call.acc) if form == "betas" and not t else None
        for chunk in _chunks(call):
            if t == 0 and form == "gram":
                gate, G, g = gram.forward(chunk.x, w.W_A, w.B_A, call.scale, chunk.lengths)
                G_total.add(G)
                g_total.add(g)
            else:
                kernel = choose(case_of(chunk.x, w.W_F1.shape[0]), call.backend)
                before = saved.gates[chunk.number] if t else None
                M, p, gate = kernel.forward(_step(call, w, chunk, before, P, betas))
                M_total.add(M)
                p_total.add(p)
            if t == 0:
                saved.gates.append(gate)
        if t == 0 and form == "gram":
            saved = saved._replace(G=G_total.get(), g=g_total.get())
            assert saved.G is not None and saved.g is not None
            v, e = first_betas(w, call.acc)
            M, p = v @ saved.G + e[:, None] * saved.g[:, None, :d], saved.g[:, :d] @ v.mT + e * saved.g[:, d:]
        else:
            M, p = M_total.get(), p_total.get()
        saved.M.append(M)
        saved.p.append(p)
        saved.y.append(outputs(M, p, call.scale, w))
    y = saved.y[-1]
    return norm(y) if call.normalize else y, saved


def _backward(call: Streamed, w: Parameters, saved: _Saved, dout: Tensor, want_rows: bool) -> dict[str, Tensor]:
    """The gradient of every parameter, by name; of rows' parameters only if wanted."""
    acc, form = call.acc, _form(call, w)
    dw = Parameters(*(None if t is None else t.new_zeros(t.shape, dtype=acc) for t in _per_output(w)))  # type: ignore[arg-type]
    rows = _RowGradients(call, w, want_rows)
    dy = norm_backward(dout, saved.y[-1]) if call.normalize else dout
    for t in reversed(range(call.n_iters)):
        dM, dp = outputs_backward(dy, saved.M[t], saved.p[t], call.scale, w, dw)
        if t == 0:
            break
        seen: Predictions = predictions(saved.y[t - 1], w)
        dP = _Total(acc)
        for chunk in _chunks(call):
            step = _step(call, w, chunk, saved.gates[chunk.number], seen.P, None)
            kernel = choose(case_of(chunk.x, w.W_F1.shape[0]), call.backend)
            found = kernel.backward(step, dM, dp, rows.of(chunk))
            assert found is not None
            dP.add(found)
            rows.done(_LINEAR[2:])
        rows.fresh = False
        dy = predictions_backward(dP.get(), seen, saved.y[t - 1], w, dw)
    if want_rows:  # else nothing is left to be found
        _first_backward(call, w, saved, dM, dp, form, rows)
    return {k: g for k, g in dw._asdict().items() if g is not None} | rows.found()


def _per_output(w: Parameters) -> Parameters:
    """The parameters but for those of rows."""
    return w._replace(**dict.fromkeys(_LINEAR))  # type: ignore[arg-type]


def _first_backward(
    call: Streamed, w: Parameters, saved: _Saved, dM: Tensor, dp: Tensor, form: str, rows: _RowGradients
) -> None:
    acc, d = call.acc, w.W_F1.shape[1]
    betas = None if form == "pairs" else first_betas(w, acc)
    dG = dg = None
    if form == "gram":
        assert betas is not None and saved.G is not None and saved.g is not None
        v, e = betas
        rows.add_first_betas(
            torch.einsum("bjc,bac->ja", dM, saved.G) + dp.mT @ saved.g[:, :d],
            torch.einsum("bjd,bd->j", dM, saved.g[:, :d]) + saved.g[:, d] @ dp,
        )
        dG = torch.einsum("ja,bjc->bac", v, dM)
        dg = torch.cat([torch.einsum("j,bjd->bd", e, dM) + dp @ v, (dp @ e)[:, None]], 1)
    for chunk in _chunks(call):
        gate, grads = saved.gates[chunk.number], rows.of(chunk, one_beta=form == "betas")
        if dG is not None and dg is not None:
            gram.backward(chunk.x, gate, w.W_A, call.scale, chunk.lengths, dG, dg, grads)
            rows.done(("W_A", "B_A"))
        else:
            kernel = choose(case_of(chunk.x, w.W_F1.shape[0]), call.backend)
            kernel.backward(_step(call, w, chunk, gate, None, betas), dM, dp, grads)
            rows.done(("W_A", "B_A", "beta_use", "bias_use", *(() if betas else ("beta_ign", "bias_ign"))))
    if form == "betas":
        rows.spread_first_betas()


class _RowGradients:
    """Gradients of the parameters that the passes over the inputs fill.

    With a row per input vector, a chunk writes its own rows of one dense gradient. Shared by all rows, each chunk
    makes its part anew, and the parts are added up here, apart for the first iteration's two betas in one.
    """

    def __init__(self, call: Streamed, w: Parameters, wanted: bool) -> None:
        self.fresh = True
        self._call, self._w, self._wanted, self._linear = call, w, wanted, w.bias_use is not None
        self._gates: list[Tensor] = []
        names = (_LINEAR if self._linear else _ROWS) if wanted else ()
        like = {name: getattr(w, name) for name in names}
        self._buffers = {k: t.new_empty(t.shape, dtype=call.acc if self._linear else t.dtype) for k, t in like.items()}
        self._totals = {k: _Total(call.acc) for k in names if self._linear}
        self._first = {k: _Total(call.acc) for k in ("beta_use", "bias_use")}
        self._one_beta = False

    def of(self, chunk: _Chunk, *, one_beta: bool = False) -> Grads:
        """What a chunk's backward pass fills."""
        if chunk.number == len(self._gates):
            self._gates.append(chunk.x.new_empty(chunk.x.shape[:2], dtype=self._call.acc))
        self._one_beta = one_beta
        if self._linear:
            for buffer in self._buffers.values():
                buffer.zero_()
        own = {name: _own(t, chunk, self._linear) for name, t in self._buffers.items()}
        if one_beta:
            own["beta_ign"] = own["bias_ign"] = None  # type: ignore[assignment]
        return Grads(
            self.fresh, self._gates[chunk.number], None, own.get("W_A"), own.get("B_A"), own.get("W_S"),
            own.get("B_S"), own.get("beta_use"), own.get("beta_ign"), own.get("bias_use"), own.get("bias_ign"),
        )  # fmt: skip

    def done(self, names: tuple[str, ...]) -> None:
        """The chunk has filled these."""
        for name in names:
            if name in self._totals:
                totals = self._first if self._one_beta and name in self._first else self._totals
                totals[name].add(self._buffers[name])

    def add_first_betas(self, dv: Tensor, de: Tensor) -> None:
        """The gradient of ``first_betas``, taken on to the betas."""
        c = self._w.prior.to(self._call.acc)
        self._totals["beta_use"].add(c[:, None] * dv)
        self._totals["beta_ign"].add((c[:, None] - 1) * dv)
        self._totals["bias_use"].add(c * de)
        self._totals["bias_ign"].add((c - 1) * de)

    def spread_first_betas(self) -> None:
        self.add_first_betas(self._first["beta_use"].get(), self._first["bias_use"].get())

    def found(self) -> dict[str, Tensor]:
        if not self._linear:
            return self._buffers
        return {name: total.get() for name, total in self._totals.items() if total.filled}


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Streamed, *w: Tensor | None) -> Tensor:
        with autocast_off(call.scale.device.type):
            y, saved = _forward(call, Parameters(*w))  # type: ignore[arg-type]
        ctx.call, ctx.saved = call, saved
        ctx.save_for_backward(*w)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if asked_again(dy):
            raise NotImplementedError(
                "stream: its gradient is not differentiated again; give the layer the vectors in one tensor for that"
            )
        call: Streamed = ctx.call
        w = Parameters(*ctx.saved_tensors)
        needs = dict(zip(Parameters._fields, ctx.needs_input_grad[1:], strict=True))
        with autocast_off(call.scale.device.type):
            found = _backward(call, w, ctx.saved, dy.to(call.acc), any(needs[k] for k in _LINEAR))
        unused = ("prior", *(LATER if call.n_iters == 1 else ()))
        grads = (
            found[k].to(t.dtype) if t is not None and needs[k] and k not in unused else None
            for k, t in w._asdict().items()
        )
        return None, *grads


def route(call: Streamed, w: Parameters) -> Tensor:
    """[B, m, h] in the dtype of sums; parameters have gradients, the vectors have none."""
    if transformed():
        raise NotImplementedError(
            "stream: expected no torch.func transform and no forward mode; give the layer the vectors in one tensor"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in w):
        made: Tensor = _Route.apply(call, *used(w, call.n_iters))  # type: ignore[no-untyped-call]
        return made
    with torch.no_grad(), autocast_off(call.scale.device.type):
        return _forward(call, w)[0]
