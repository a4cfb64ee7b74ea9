"""The Triton backend of ``matrix_routing``: launches the kernels of one iteration, forward and backward.

The kernels are in ``matrix_routing_forward`` and ``matrix_routing_backward``; ``matrix_routing_plan`` chooses blocks.
Axes: B batch, n inputs, m outputs, c rows of a capsule's matrix, d its columns before, h its columns after routing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastroute.ops.matrix_routing.contract import MatrixGrads, MatrixStep, Moments, OutputGrads, Outputs, PreviousGrads

from .. import launch as start
from ..launch import cdiv, chunks, multiprocessors, on, power_of_2
from .backward import assign_backward_kernel, gradient_kernel, output_grads_kernel, shared_sums_kernel
from .forward import assign_kernel, merge_kernel, moments_kernel, pairs_kernel
from .plan import MAX_CAPSULE, MAX_OUTPUTS, Plan, VoteTile, capsule, plan

__all__ = ["backward", "folded", "folded_backward", "folded_forward", "force_folded", "forward", "plan", "unsupported"]

force_folded: bool | None = None  #: None: folded, which has fewer launches and less traffic for every shape


def folded() -> bool:
    """Whether the op should call ``folded_forward`` and ``folded_backward``."""
    return force_folded is not False


class Sums(NamedTuple):
    """``PreviousGrads`` before the sums over slots."""

    A0: Tensor  # [slots, B, m]
    A1: Tensor  # [slots, B, m, c, h]
    A2: Tensor  # [slots, B, m, c, h]


def unsupported(device_type: str, dtype: torch.dtype, B: int, n: int, m: int, c: int, d: int, h: int) -> str | None:
    """Why this backend cannot take a case, or None if it can."""
    if why := start.refuses(device_type, dtype):
        return why
    if m > MAX_OUTPUTS:
        return f"the triton kernels keep a row of outputs on chip: at most {MAX_OUTPUTS}, not {m}"
    if capsule(c, h) > MAX_CAPSULE:
        return f"the triton kernels keep a capsule on chip: at most {MAX_CAPSULE} numbers, padded, not {c} x {h}"
    if n >= 2**31 - 2**16 or m * d * h >= 2**31 or m * c * h >= 2**31 or c * d >= 2**31:
        return f"the triton kernels count inputs, and an input's numbers, in 32 bits: n={n}, m={m}, c={c}, d={d}, h={h}"
    return None


class _Call:
    """One iteration's inputs as the kernels take them."""

    def __init__(self, step: MatrixStep, *, backward: bool) -> None:
        self.step = step
        self.B, self.n, self.m, self.c, self.d, self.h = step.sizes
        self.shared = step.shared and self.n > 1
        self.scored, self.gaussian = step.previous is not None, step.p_model == "gaussian"
        self.W, self.bias, self.use, self.ign = (
            t.contiguous() for t in (step.W, step.bias, step.beta_use, step.beta_ign)
        )
        self.mask = None if step.mask is None else step.mask.expand(self.B, self.n, self.m).view(torch.uint8)
        self.mask_strides = (0, 0, 0) if self.mask is None else self.mask.stride()
        self.plan: Plan = plan(
            *step.sizes, shared=self.shared, backward=backward, sms=multiprocessors(step.mu_inp.device)
        )

    def slots(self, split: int) -> int:
        """Partial sums over all inputs."""
        return sum(cdiv(min(self.plan.rows, self.n - f), split) for f in range(0, self.n, self.plan.rows))

    def new(self, *shape: int) -> Tensor:
        return self.step.mu_inp.new_empty(shape, dtype=torch.float32)

    def inputs(self, samples: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.step.gate[samples], self.step.mu_inp[samples], self.W, self.bias

    def before(self, samples: slice) -> tuple[Tensor | None, ...]:
        """a, mu and sig2 of the previous iteration."""
        previous = self.step.previous
        return (None, None, None) if previous is None else tuple(t[samples] for t in previous)

    def constants(self, tile: VoteTile) -> dict[str, object]:
        return {
            "M": self.m, "C": self.c, "D": self.d, "H": self.h, "SHARED": self.shared,
            "S": tile.lanes, "CP": tile.rows, "J": tile.outputs, "HP": tile.columns,
            "BLOCK_D": tile.depth, "DOT": tile.deep, "warps": tile.warps, "stages": 2,
        }  # fmt: skip

    def row_constants(self) -> dict[str, object]:
        row = self.plan.row
        return {
            "BETA_ROW": 0 if self.shared else self.m, "M": self.m, "SCORED": self.scored,
            "BLOCK_N": row.inputs, "BLOCK_M": row.outputs,
            "warps": row.warps, "stages": 1,
        }  # fmt: skip

    def strides(self) -> tuple[int, int]:
        """From one sample to the next, of the gate and of mu_inp."""
        return self.n, self.n * self.c * self.d

    def masked(self, samples: slice) -> tuple[Tensor | int | None, ...]:
        return None if self.mask is None else self.mask[samples], *self.mask_strides

    def batch_tiles(self, tile: VoteTile, batch: int) -> int:
        return batch if self.shared else cdiv(batch, tile.lanes)

    def pairs(
        self, samples: slice, first: int, last: int, logit: Tensor, out: OutputGrads | None, slope: Tensor | None
    ) -> None:
        tile, batch, per_split = self.plan.light, samples.stop - samples.start, self.plan.light_split
        splits, batch_tiles = cdiv(last - first, per_split), self.batch_tiles(tile, batch)
        given = (None,) * 4 if out is None else (t[samples] for t in (out.center, out.g1, out.g2, out.k))
        start.launch(
            pairs_kernel, (cdiv(self.m, tile.outputs) * splits * batch_tiles,),
            *self.inputs(samples), *self.before(samples), *given, logit, slope,
            *self.strides(), first, last, self.plan.rows, batch, per_split, splits,
            SCORED=self.scored, GAUSSIAN=self.gaussian, SLOPED=out is not None, **self.constants(tile),
        )  # fmt: skip


def forward(step: MatrixStep) -> Moments:
    """N0 [B, m], mean and M2 [B, m, c, h], a [B, m], low [B, m, c, h]; as ``reference.matrix_step`` says."""
    with on(step.mu_inp):
        return _forward(_Call(step, backward=False))


def folded_forward(step: MatrixStep, kept: Moments, eps: float) -> Outputs:
    """The moments go to ``kept``, the settled outputs into new memory; at least one sample and one input."""
    with on(step.mu_inp):
        call = _Call(step, backward=False)
        out = Outputs(call.new(*kept.a.shape), *(call.new(*kept.mean.shape) for _ in range(2)))
        _moments(call, kept, out, eps)
        return out


def _forward(call: _Call) -> Moments:
    few, many = (call.B, call.m), (call.B, call.m, call.c, call.h)
    made = Moments(*(call.new(*shape) for shape in (few, many, many, few, many)))
    if call.B == 0 or call.n == 0:
        return Moments(*(t.zero_() for t in made if t is not None))
    _moments(call, made, None, 0.0)
    return made


def _moments(call: _Call, made: Moments, out: Outputs | None, eps: float) -> None:
    chosen, B, m, c, h = call.plan, call.B, call.m, call.c, call.h
    N0, mean, M2, a, low = made
    slots, a_slots = call.slots(chosen.light_split), call.slots(chosen.row_split)
    parts = [call.new(slots, B, m), *(call.new(slots, B, m, c, h) for _ in range(3))]
    a_part = call.new(a_slots, B, m)
    weight = call.new(chosen.batch, chosen.rows, m)
    for samples, first, last in chunks(call.B, call.n, call.plan):
        batch, rows = samples.stop - samples.start, chosen.rows
        if call.scored:
            call.pairs(samples, first, last, weight, None, None)
        # Chunks before this one had whole splits.
        splits, slot = cdiv(last - first, chosen.row_split), first // rows * cdiv(rows, chosen.row_split)
        start.launch(
            assign_kernel, (splits * batch,),
            call.step.gate[samples], call.use, call.ign, *call.masked(samples), weight, a_part[:, samples],
            call.n, B * m, slot, first, last, rows, chosen.row_split, splits, **call.row_constants(),
        )  # fmt: skip
        tile = chosen.light
        splits, slot = cdiv(last - first, chosen.light_split), first // rows * cdiv(rows, chosen.light_split)
        batch_tiles = call.batch_tiles(tile, batch)
        start.launch(
            moments_kernel, (cdiv(m, tile.outputs) * splits * batch_tiles,),
            *call.inputs(samples), weight, *(t[:, samples] for t in parts),
            *call.strides(), B * m, slot, first, last, rows, batch, chosen.light_split, splits,
            **call.constants(tile),
        )  # fmt: skip
    ahead = min(128, power_of_2(max(slots, a_slots), 1))
    block = max(16, 1024 // ahead)
    start.launch(
        merge_kernel, (cdiv(B * m * c * h, block),),
        *parts, a_part, N0, mean, low, M2, a, *((None,) * 3 if out is None else out), eps, B * m, slots, a_slots,
        SETTLE=out is not None, CH=c * h, BLOCK_E=block, BLOCK_S=ahead, warps=4, stages=1,
    )  # fmt: skip


def backward(step: MatrixStep, out: OutputGrads, grads: MatrixGrads) -> PreviousGrads | None:
    """What the previous iteration's outputs get, None in a first iteration; the rest goes to ``grads``."""
    with on(step.mu_inp):
        call = _Call(step, backward=True)
        if call.B == 0 or call.n == 0:
            return _nothing(call, grads)
        sums = _backward(call, OutputGrads(*(t.contiguous() for t in out)), grads)
        return None if sums is None else PreviousGrads(*(t.sum(0) for t in sums))


def folded_backward(
    step: MatrixStep, kept: Moments, before: Moments | None, d: Outputs | Sums, eps: float, grads: MatrixGrads
) -> Sums | None:
    """As ``backward``, from the moments of this iteration and of the one before; the caller hands on what comes back.

    At least one sample and one input. ``step.previous`` is not read.
    """
    with on(step.mu_inp):
        out, previous = _output_grads(kept, before, d, eps, step.p_model == "gaussian")
        return _backward(_Call(step._replace(previous=previous), backward=True), out, grads, folded=True)


def _output_grads(
    kept: Moments, before: Moments | None, d: Outputs | Sums, eps: float, gaussian: bool
) -> tuple[OutputGrads, Outputs | None]:
    g1, g2 = torch.empty_like(kept.mean), torch.empty_like(kept.mean)
    k, da = torch.empty_like(kept.a), torch.empty_like(kept.a)
    previous = None
    if before is not None:
        previous = Outputs(before.a, torch.empty_like(before.mean), torch.empty_like(before.mean))
    given = isinstance(d, Outputs)
    slots = (0, 0) if isinstance(d, Outputs) else (d.A0.shape[0], d.A1.shape[0])
    outputs, numbers = kept.a.numel(), kept.mean.shape[-2] * kept.mean.shape[-1]
    padded = power_of_2(numbers, 1)
    ahead = max(1, min(32, power_of_2(max(slots), 1), 1024 // padded))
    group = max(1, 1024 // (ahead * padded))
    start.launch(
        output_grads_kernel, (cdiv(outputs, group),),
        *kept, *(d if given else (None,) * 3), *((None,) * 3 if given else d), g1, g2, k, da,
        *((None,) * 3 if before is None else before[:3]), *((None,) * 2 if previous is None else previous[1:]),
        eps, outputs, *slots,
        GIVEN=given, GAUSSIAN=gaussian, BEFORE=before is not None,
        CH=numbers, CHP=padded, BLOCK_O=group, BLOCK_S=ahead, warps=4, stages=1,
    )  # fmt: skip
    return OutputGrads(kept.mean, g1, g2, k, da), previous


def _backward(call: _Call, out: OutputGrads, grads: MatrixGrads, folded: bool = False) -> Sums | None:
    chosen, B, m, c, d, h = call.plan, call.B, call.m, call.c, call.d, call.h
    want_rows, want_mu = grads.W is not None, grads.mu_inp is not None
    tile, row, rows = chosen.heavy, chosen.row, chosen.rows
    outputs = cdiv(m, tile.outputs)
    weight, slope = call.new(chosen.batch, rows, m), call.new(chosen.batch, rows, m)
    scored, own_rows = call.scored, want_rows and not call.shared
    A0, A1, A2 = None, None, None
    if scored:
        A0 = call.new(call.slots(row.inputs), B, m)
        A1, A2 = (call.new(call.slots(chosen.heavy_split), B, m, c, h) for _ in range(2))
    shared_sums = _SharedSums(grads, folded)
    for samples, first, last in chunks(call.B, call.n, call.plan):
        batch = samples.stop - samples.start
        call.pairs(samples, first, last, weight, out, slope)

        tiles, slot = cdiv(last - first, row.inputs), first // rows * cdiv(rows, row.inputs)
        per_program = batch if own_rows else 1
        programs = tiles * cdiv(batch, per_program)
        beta_sums = call.new(programs, 2, m) if want_rows and call.shared else None
        later = not grads.fresh or samples.start > 0
        start.launch(
            assign_backward_kernel, (programs,),
            call.step.gate[samples], call.use, call.ign, out.da[samples], *call.masked(samples), weight, slope,
            grads.gate[samples], *((grads.beta_use, grads.beta_ign) if own_rows else (None, None)), beta_sums,
            None if A0 is None else A0[:, samples],
            call.n, B * m, slot, first, last, rows, batch, per_program, tiles,
            WANT_ROWS=want_rows, ADD_GATE=not grads.fresh, ADD_ROWS=later, **call.row_constants(),
        )  # fmt: skip

        if not (want_rows or want_mu or scored):
            continue
        splits, slot = cdiv(last - first, chosen.heavy_split), first // rows * cdiv(rows, chosen.heavy_split)
        batch_tiles = call.batch_tiles(tile, batch)
        groups = cdiv(batch_tiles, chosen.heavy_tiles)
        d_mu = call.new(outputs, batch, rows, c, d) if want_mu else None
        d_W, d_bias = grads.W, grads.bias
        if want_rows and call.shared:
            d_W, d_bias = call.new(groups * splits, m, d, h), call.new(groups * splits, m, c, h)
        start.launch(
            gradient_kernel, (outputs * splits * groups,),
            *call.inputs(samples), *call.before(samples)[1:], out.center[samples], out.g1[samples], out.g2[samples],
            weight, slope, d_mu, d_W, d_bias, *(None if A is None else A[:, samples] for A in (A1, A2)),
            *call.strides(), B * m * c * h, slot, first, last, rows, batch, chosen.heavy_split, splits, batch_tiles,
            chosen.heavy_tiles, int(later),
            SCORED=scored, GAUSSIAN=call.gaussian, WANT_MU=want_mu, WANT_ROWS=want_rows, **call.constants(tile),
        )  # fmt: skip
        if grads.mu_inp is not None and d_mu is not None:
            own = grads.mu_inp[samples, first:last]
            made = d_mu[0] if outputs == 1 else d_mu.sum(0)
            (own.copy_ if grads.fresh else own.add_)(made[:, : last - first])
        if beta_sums is not None and d_W is not None and d_bias is not None:
            shared_sums.add(d_W, d_bias, beta_sums)
    if A0 is None or A1 is None or A2 is None:
        return None
    return Sums(A0, A1, A2)


class _SharedSums:
    """Gradients of parameters that serve every input: chunk by chunk into their buffers."""

    def __init__(self, grads: MatrixGrads, folded: bool) -> None:
        self.buffers = (grads.W, grads.bias, grads.beta_use, grads.beta_ign)
        self.fresh, self.folded = grads.fresh, folded

    def add(self, d_W: Tensor, d_bias: Tensor, beta_sums: Tensor) -> None:
        if self.folded:
            sizes = d_W[0].numel(), d_bias[0].numel()
            ahead = min(32, power_of_2(max(d_W.shape[0], beta_sums.shape[0]), 1))
            block = 1024 // ahead
            start.launch(
                shared_sums_kernel, (sum(cdiv(size, block) for size in (*sizes, beta_sums[0].numel())),),
                d_W, d_bias, beta_sums, *self.buffers, *sizes, d_W.shape[0], beta_sums.shape[0],
                ADD=not self.fresh, M=beta_sums.shape[2], BLOCK=block, BLOCK_S=ahead, warps=4, stages=1,
            )  # fmt: skip
        else:
            for buffer, value in zip(self.buffers, (d_W.sum(0), d_bias.sum(0), *beta_sums.sum(0)), strict=True):
                if buffer is not None:
                    (buffer[0].copy_ if self.fresh else buffer[0].add_)(value)
        self.fresh = False


def _nothing(call: _Call, grads: MatrixGrads) -> PreviousGrads | None:
    """No samples: fresh buffers are zero, others stay."""
    if grads.fresh:
        for t in (grads.gate, grads.mu_inp, grads.W, grads.bias, grads.beta_use, grads.beta_ign):
            if t is not None:
                t.zero_()
    previous: Outputs | None = call.step.previous
    if previous is None:
        return None
    return PreviousGrads(*(torch.zeros_like(t) for t in previous))
