"""``vector_routing``'s ``native`` backend: the C++ of ``csrc/cpu/vector_routing.cpp``, given contiguous parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.step import Grads, Step
from ._registry import library

_INPUTS = (
    "Tensor? gate_weight, Tensor? gate_bias, Tensor? scale, Tensor? pred, Tensor? score_weight, Tensor? score_bias, "
    "Tensor use, Tensor? ign, Tensor? use_bias, Tensor? ign_bias, Tensor? prior, Tensor? mask, Tensor? lengths"
)
library.define("_prefers_onednn() -> bool")
library.define(f"_vector_routing_native(Tensor x, Tensor? gate, {_INPUTS}) -> (Tensor, Tensor, Tensor)")
library.define(
    f"_vector_routing_native_backward(Tensor x, Tensor gate, {_INPUTS}, Tensor dM, Tensor dp, bool fresh, "
    "Tensor(a!) dgate, Tensor(b!)? dx, Tensor(c!)? dgate_weight, Tensor(d!)? dgate_bias, Tensor(e!)? dscore_weight, "
    "Tensor(f!)? dscore_bias, Tensor(g!)? duse, Tensor(h!)? dign, Tensor(i!)? duse_bias, Tensor(j!)? dign_bias) "
    "-> Tensor"
)


def _plain(step: Step) -> tuple[Tensor | None, ...]:
    """The step as the C++ reads it: rows shared by all inputs in the dtype of sums; all contiguous but x and mask."""
    acc = step.acc

    def shared(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(acc).contiguous()

    per_row = {step.use.dtype} if not step.linear else set()
    for t in (step.gate_weight, step.gate_bias, step.score_weight, step.score_bias):
        if t is not None and not step.linear:
            per_row.add(t.dtype)
    # one dtype, the sums' or bfloat16, for all parameters with a row per input
    as_is = not step.linear and (per_row == {acc} or per_row == {torch.bfloat16} == {step.x.dtype})

    def rows(t: Tensor | None) -> Tensor | None:
        return t.contiguous() if t is not None and as_is else shared(t)

    return (
        step.x, shared(step.gate), rows(step.gate_weight), rows(step.gate_bias), shared(step.scale), shared(step.pred),
        rows(step.score_weight), rows(step.score_bias), rows(step.use), rows(step.ign), shared(step.use_bias),
        shared(step.ign_bias), shared(step.prior), step.mask, step.lengths,
    )  # fmt: skip


def forward(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    M, p, gate = torch.ops.fastroute._vector_routing_native(*_plain(step))
    return M, p, gate if step.gate is None else step.gate


def backward(step: Step, dM: Tensor, dp: Tensor, grads: Grads) -> Tensor | None:
    dpred: Tensor = torch.ops.fastroute._vector_routing_native_backward(
        *_plain(step), dM.contiguous(), dp.contiguous(), grads.fresh, grads.gate, grads.x, grads.gate_weight,
        grads.gate_bias, grads.score_weight, grads.score_bias, grads.use, grads.ign, grads.use_bias, grads.ign_bias,
    )  # fmt: skip
    return None if step.pred is None else dpred
