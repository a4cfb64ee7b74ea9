"""The ``native`` backend of ``vector_routing``: the C++ of csrc/cpu/vector_routing, given contiguous tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import library
from .contract import Grads, Step

_INPUTS = (
    "Tensor? gate_weight, Tensor? gate_bias, Tensor? scale, Tensor? pred, Tensor? score_weight, Tensor? score_bias, "
    "Tensor use, Tensor? ign, Tensor? use_bias, Tensor? ign_bias, Tensor? prior, Tensor? mask, Tensor? lengths"
)
library.define(f"_vector_routing_native(Tensor x, Tensor? gate, {_INPUTS}) -> (Tensor, Tensor, Tensor)")
library.define(
    f"_vector_routing_native_backward(Tensor x, Tensor gate, {_INPUTS}, Tensor dM, Tensor dp, bool fresh, "
    "Tensor(a!) dgate, Tensor(b!)? dx, Tensor(c!)? dgate_weight, Tensor(d!)? dgate_bias, Tensor(e!)? dscore_weight, "
    "Tensor(f!)? dscore_bias, Tensor(g!)? duse, Tensor(h!)? dign, Tensor(i!)? duse_bias, Tensor(j!)? dign_bias) "
    "-> Tensor"
)


def _row_dtype(step: Step) -> torch.dtype:
    """How the C++ reads parameters with a row per input: in bfloat16 if they all and x are, else in the sums' dtype."""
    rows = (step.use, step.ign, step.gate_weight, step.gate_bias, step.score_weight, step.score_bias)
    half = not step.linear and {t.dtype for t in (step.x, *rows) if t is not None} == {torch.bfloat16}
    return torch.bfloat16 if half else step.acc


def _plain(step: Step) -> tuple[Tensor | None, ...]:
    """The step as the C++ reads it: rows shared by all inputs in the dtype of sums; all contiguous but x and mask."""
    row_dtype = _row_dtype(step)

    def shared(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(step.acc).contiguous()

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(row_dtype).contiguous()

    return (
        step.x, shared(step.gate), rows(step.gate_weight), rows(step.gate_bias), shared(step.scale), shared(step.pred),
        rows(step.score_weight), rows(step.score_bias), rows(step.use), rows(step.ign), shared(step.use_bias),
        shared(step.ign_bias), shared(step.prior), step.mask, step.lengths,
    )  # fmt: skip


def forward(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    M, p, gate = torch.ops.fastroute._vector_routing_native(*_plain(step))
    return M, p, gate if step.gate is None else step.gate


def backward(step: Step, dM: Tensor, dp: Tensor, grads: Grads) -> Tensor | None:
    row_dtype, n = _row_dtype(step), step.x.shape[1]
    lent: list[tuple[Tensor, Tensor]] = []

    def rows(buffer: Tensor | None) -> Tensor | None:
        """The buffer, or one the C++ can write where parameters with a row per input are kept in different dtypes."""
        if buffer is None or step.linear or (buffer.shape[0] == 1 and n > 1) or buffer.dtype == row_dtype:
            return buffer
        other = torch.empty_like(buffer, dtype=row_dtype) if grads.fresh else buffer.to(row_dtype)
        lent.append((buffer, other))
        return other

    dpred: Tensor = torch.ops.fastroute._vector_routing_native_backward(
        *_plain(step), dM.contiguous(), dp.contiguous(), grads.fresh, grads.gate, grads.x,
        rows(grads.gate_weight) if step.gate_weight is not None else None,
        rows(grads.gate_bias) if step.gate_weight is not None else None,
        rows(grads.score_weight), rows(grads.score_bias), rows(grads.use), rows(grads.ign), grads.use_bias,
        grads.ign_bias,
    )  # fmt: skip
    for buffer, other in lent:
        buffer.copy_(other)
    return None if step.pred is None else dpred
