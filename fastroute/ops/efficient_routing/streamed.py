"""Efficient vector routing of input vectors that come in chunks, with gradients of the parameters.

Axes: B batch, n input vectors in all, k of a chunk, m output vectors, h width of an output vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import asked_again, transformed
from ..backends import choose
from ..masked import reaching
from ..precision import autocast_off
from ..vector_routing.op import case_of
from .contract import Parameters
from .outputs import LATER, used
from .passes import STEP_NAMES, Call, Chunk, backward, first_form, forward


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
    over_ranks: Callable[..., tuple[Tensor, ...]] | None = None  # as in ``Call``

    def chunks(self, n_out: int) -> Iterator[Chunk]:
        start = 0
        for number, x in enumerate(self.passes()):
            rows = slice(start, start + x.shape[1])
            mask = None if self.mask is None else self.mask[:, rows]
            x = reaching(x, mask)
            lengths = None if self.lengths is None else (self.lengths - start).clamp(0, x.shape[1])
            yield Chunk(number, rows, x, mask, lengths, choose(case_of(x, n_out), self.backend))
            start = rows.stop

    def of(self, w: Parameters) -> Call:
        chunks, form = partial(self.chunks, w.W_F1.shape[0]), first_form(w, whole=False, masked=self.mask is not None)
        return Call(chunks, False, form, self.scale, self.n_iters, self.normalize, self.precision, self.over_ranks)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Streamed, *w: Tensor | None) -> Tensor:
        with autocast_off(call.scale.device.type):
            y, saved = forward(call.of(parameters := Parameters._make(w)), parameters)
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
        want_rows = any(needs[name] for name in STEP_NAMES)
        with autocast_off(call.scale.device.type):
            found = backward(call.of(w), w, ctx.saved, dy.to(call.scale.dtype), want_rows=want_rows)
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
        return _Route.apply(call, *used(w, call.n_iters))
    with torch.no_grad(), autocast_off(call.scale.device.type):
        return forward(call.of(w), w)[0]
