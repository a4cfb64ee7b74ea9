"""``efficient_routing``: all iterations of efficient vector routing as one registered op and its gradient.

Heinsen (2022), "An Algorithm for Routing Vectors in Sequences". The passes over the inputs are ``vector_routing``'s
backends; what is per output ([m, d] and [m, h]) is plain PyTorch. On a CPU most calls are one op of C++ a pass instead
(``native``). Derived in ``docs/vector_routing.md``.
Axes: B batch, T iterations, n input vectors, m output vectors, d width of an input vector, h width of an output vector.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import explained
from ..autograd import apply, asked_again, called, through, transformed
from ..backends import Case, choose, has_extension, is_explaining, record, requested
from ..host import is_exporting, is_traced
from ..masked import reaching
from ..precision import autocast_off, autocast_precision
from ..registry import define, no_second_derivative
from ..vector_routing.op import case_of
from . import native as native
from . import passes as passes
from . import reference as reference
from .contract import Parameters, check_sizes
from .outputs import LATER, used
from .passes import PER_OUTPUT, STEP_NAMES, Chunk, Form, Saved, first_form, new_moments, new_rows, prepared
from .reference import Functions as Functions
from .reference import cast as cast
from .reference import first_or_next as first_or_next
from .reference import input_scale as input_scale
from .reference import predict as predict

__all__ = ["efficient_routing"]

_TENSORS = native.NAMES
_OPTIONS = ("n_iters", "normalize", "backend", "precision")
_INPUTS = f"{native.INPUTS}, str backend, str precision"


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
        x, *w, mask, lengths, n_iters, normalize, backend, precision = args
        return cls(x, Parameters(*w), mask, lengths, n_iters, normalize, backend, precision)

    @property
    def acc(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, self.w.W_F2.dtype)

    @property
    def case(self) -> Case:
        return case_of(self.x, self.w.W_F1.shape[0])

    @property
    def form(self) -> Form:
        return first_form(self.w, whole=True, masked=self.mask is not None, n=self.x.shape[1])

    @property
    def is_empty(self) -> bool:
        return self.x.shape[0] == 0

    @property
    def is_one_call(self) -> bool:
        """Whether ``native``'s ops take it, of which an exported graph has the bits, too."""
        return (
            not self.precision
            and not self.is_empty
            and self.x.device.type == "cpu"
            and self.backend in ("auto", "native")
            and native.takes(self.x, self.w)
            and has_extension()
        )

    def of_native(self) -> tuple[Any, ...]:
        return self.x, *self.w, self.mask, self.lengths, self.n_iters, self.normalize

    def of_one_chunk(self) -> passes.Call:
        chunks = (Chunk(0, None, self.x, self.mask, self.lengths, choose(self.case, self.backend)),)
        scale = input_scale(self.x, self.lengths)
        return passes.Call(lambda: chunks, True, self.form, scale, self.n_iters, self.normalize, self.precision)


def _new_outputs(call: _Call) -> tuple[Tensor, ...]:
    """The result's memory, and that of what is saved."""
    (B, n, d), new = call.x.shape, partial(call.x.new_empty, dtype=call.acc)
    M, p, y = new_moments(new(B), call.w, call.n_iters)
    G, g = ((B, d, d), (B, d + 1)) if call.form == "gram" else ((0,), (0,))
    return y.new_empty(y.shape[1:], dtype=call.out_dtype), new((B, n)), M, p, y, new(G), new(g)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    call = _Call.of(args)
    if call.is_empty:
        return _new_outputs(call)
    if call.is_one_call:
        y, kept = torch.ops.fastroute._efficient_routing_native(*native.widened(call.of_native()))
        return y.to(call.out_dtype), *(t.clone() for t in native.parts(kept, call.x, call.w, call.mask, call.n_iters))
    with autocast_off(call.x.device.type):
        y, saved = passes.forward(call.of_one_chunk(), call.w)
        return y.to(call.out_dtype), *saved.gates, *saved[1:]


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    call = _Call.of(args)
    record(call.case)
    return _new_outputs(call)


def _new_grads(call: _Call, want_x: bool, want_rows: bool) -> list[Tensor]:
    """A gradient of x and of each parameter, [0] where none is wanted."""
    per_output = {k: call.x.new_empty(getattr(call.w, k).shape, dtype=call.acc) for k in PER_OUTPUT}
    return _listed(_new_dx(call, want_x), per_output | (new_rows(call.w, call.acc) if want_rows else {}))


def _new_dx(call: _Call, want_x: bool) -> Tensor:
    return call.x.new_empty(call.x.shape if want_x else (0,))


def _listed(dx: Tensor, found: dict[str, Tensor]) -> list[Tensor]:
    return [dx, *(found[name] if name in found else dx.new_empty(0) for name in Parameters._fields)]


def _backward(*args: Any) -> list[Tensor]:
    *inputs, dout, gate, M, p, y, G, g, want_x, want_rows = args
    call = _Call.of(inputs)
    if call.is_empty:
        return [t.zero_() for t in _new_grads(call, want_x, want_rows)]
    if call.is_one_call:
        kept = torch.cat([t.flatten() for t in (gate, M, p, y, G, g)])
        made = torch.ops.fastroute._efficient_routing_native_backward(
            *native.widened(call.of_native()), dout.to(call.acc), kept, want_x, want_rows
        )
        expected = _new_grads(call, want_x, want_rows)
        made.append(torch.zeros_like(call.w.prior))
        return [g.to(like.dtype) if like.numel() else like for g, like in zip(made, expected, strict=True)]
    dx = _new_dx(call, want_x)
    saved = Saved([gate], M, p, y, G, g)
    with autocast_off(call.x.device.type):
        found = passes.backward(
            call.of_one_chunk(), call.w, saved, dout.to(call.acc), want_rows=want_rows, dx=dx if want_x else None
        )
    return _listed(dx, found)


def _backward_fake(*args: Any) -> list[Tensor]:
    *inputs, _, _, _, _, _, _, _, want_x, want_rows = args
    call = _Call.of(inputs)
    record(call.case)
    return _new_grads(call, want_x, want_rows)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[len(_TENSORS) :]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: len(_TENSORS)], *output[1:])


def _plain(call: _Call) -> Tensor:
    """The reference, in the dtype of sums."""
    with autocast_off(call.x.device.type):
        y = reference.efficient_routing(
            reaching(call.x, call.mask).to(call.acc), cast(call.w, call.acc),
            n_iters=call.n_iters, normalize=call.normalize, mask=call.mask, lengths=call.lengths,
        )  # fmt: skip
    return y.to(call.out_dtype)


def _gradient(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    found: dict[str, Tensor | None] = {}
    if dout is not None:
        given = ctx.saved_tensors  # once: under checkpointing each look is a computation
        inputs, saved = given[: len(_TENSORS)], given[len(_TENSORS) :]
        needs = dict(zip(_TENSORS, ctx.needs_input_grad, strict=False))
        if asked_again(dout):

            def plain(*tensors: Any) -> list[Tensor]:
                return [_plain(_Call.of((*tensors, *ctx.options)))]

            found = dict(zip(_TENSORS, through(plain, inputs, list(needs.values()), [dout]), strict=True))
        else:
            made = called(
                "efficient_routing_backward",
                *inputs,
                *ctx.options,
                dout.contiguous(),
                *saved,
                needs["x"],
                any(needs[name] for name in STEP_NAMES),
            )
            unused = LATER if ctx.options[0] == 1 else ()
            for name, t, g in zip(_TENSORS, inputs, made, strict=False):
                if needs[name] and name not in unused:
                    found[name] = g.to(t.dtype)
    return tuple(map(found.get, (*_TENSORS, *_OPTIONS)))


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


class _OneCall(torch.autograd.Function):
    """``native``'s ops, one a pass."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out: Tensor
        out, kept = torch.ops.fastroute._efficient_routing_native(*native.widened(args))
        ctx.save_for_backward(*args[:-2], kept)
        ctx.options = args[-2:]
        return native.narrowed(out, args)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        n_iters, normalize = ctx.options
        needs = ctx.needs_input_grad
        if asked_again(dout):

            def plain(*tensors: Any) -> list[Tensor]:
                return [_plain(_Call.of((*tensors, n_iters, normalize, "reference", "")))]

            return (*through(plain, inputs, needs[: len(inputs)], [dout]), None, None)
        rows = any(need for name, need in zip(native.NAMES, needs, strict=False) if name in native.ROWS)
        made = torch.ops.fastroute._efficient_routing_native_backward(
            *native.widened(inputs), n_iters, normalize, dout.to(kept.dtype).contiguous(), kept, needs[0], rows
        )
        if dout.dtype != kept.dtype or inputs[0].dtype != kept.dtype:
            made = [g if t is None else g.to(t.dtype) for t, g in zip(inputs, made, strict=False)]
        unused = LATER if n_iters == 1 else ()
        given = zip(native.NAMES, needs, made, strict=False)
        return (*(g if need and name not in unused else None for name, need, g in given), *[None] * 5)


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
    ``reference.efficient_routing.Parameters``, ``mask`` bool [B, n, m] (any strides), ``lengths`` int64 [B]. Inputs
    that reach no output, and those past a sample's length, are left out before anything is computed from them.
    Returns x_out in the promoted dtype of x and w, float32 under autocast.

    Examples:
        >>> from fastroute.ops.efficient_routing.contract import Parameters
        >>> n, m, d, h = 6, 3, 8, 4
        >>> sizes = [(n, d), (n,), (m, d), (d, h), (m, h), (h, d), (m, d), (m, d), (n, m), (n, m), (n, m), (n, m)]
        >>> w = Parameters(*(torch.randn(size) for size in sizes), None, None, torch.full((m,), 1 / m))
        >>> fastroute.functional.efficient_routing(torch.randn(2, n, d), w, n_iters=2, normalize=True).shape
        torch.Size([2, 3, 4])
    """
    autocast = autocast_precision(x.device.type)
    dtype, w = prepared(x.dtype, w, autocast)
    x = x.to(dtype)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    w = used(w, n_iters)
    call = _Call(x, w, mask, lengths, n_iters, normalize, requested(), autocast)
    if transformed() or (w.prior.requires_grad and torch.is_grad_enabled()):  # whose gradient no kernel has
        check_sizes(w, *x.shape[-2:])
        return _plain(call)
    # An exported or traced graph has the op that every backend implements; ``explain`` asks that one.
    if call.is_one_call and not (is_exporting() or is_traced() or is_explaining()):
        given = call.of_native()
        try:
            if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in w)):
                return apply(_OneCall, *given)
            made, _ = torch.ops.fastroute._efficient_routing_native(*native.widened(given))
        except RuntimeError:
            check_sizes(w, *x.shape[-2:])  # which the C++ does, in words of its own
            raise
        return native.narrowed(made, given)
    check_sizes(w, *x.shape[-2:])
    call = call._replace(x=reaching(x, mask))  # the C++ of one call does so itself
    return called("efficient_routing", call.x, *w, *call[2:])[0]
