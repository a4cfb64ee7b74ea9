"""The Triton backend of ``vector_routing``: launches the kernels of one iteration, forward and backward.

The kernels are in ``vector_routing_forward`` and ``vector_routing_backward`` (what belongs to an input row) and
``vector_routing_products`` (the matrix products around it); ``vector_routing_plan`` chooses between them.
Axes: B batch, n input vectors, m output vectors, d width of an input vector, G stacked operands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastroute.ops.vector_routing.contract import Grads, Step

from .. import launch as start
from ..launch import cdiv, chunks, dense, multiprocessors, on, shared_memory
from .backward import backward_kernel
from .forward import forward_kernel
from .plan import MAX_OUTPUTS, Plan, leaves, padded, plan, product_dtype
from .products import aggregate_kernel, score_kernel, spread_kernel

__all__ = ["backward", "forward", "plan", "unsupported"]

#: For tests: True or False takes that path wherever it exists; None lets ``plan`` choose.
force_one_pass: bool | None = None

#: Likewise: whether operands of TF32 products lie as tensor cores take them.
force_turned: bool | None = None

#: Likewise: whether dx is written by the last pass of a backward alone, where several follow one another.
force_left: bool | None = None

#: True: the first pass leaves x in half its bytes to what follows, see ``_Narrow``, where products are TF32 and another
#: pass follows. None is False: all read x.
force_narrow: bool | None = None


def unsupported(device_type: str, dtype: torch.dtype, B: int, n: int, m: int, d: int) -> str | None:
    """Why this backend cannot take a case, or None if it can."""
    if why := start.refuses(device_type, dtype):
        return why
    if m > MAX_OUTPUTS:
        return f"the triton kernels keep a row of outputs on chip: at most {MAX_OUTPUTS}, not {m}"
    if max(n, d) >= 2**31 - 2**16:
        return f"the triton kernels count input vectors and their width in 32 bits: n={n}, d={d}"
    return None


class _Call:
    """One iteration's inputs as the kernels take them."""

    def __init__(self, step: Step, *, backward: bool, want_rows: bool = False) -> None:
        self.step = step
        self.B, self.n, self.d = step.x.shape
        self.m = step.n_out
        self.scored = step.pred is not None
        self.x = step.x if step.x.stride(2) == 1 or self.d == 1 else step.x.contiguous()
        self.multiplied = self.x  #: x as products read it
        self.betas = [b for b in (step.use, step.ign) if b is not None] if step.linear else []
        self.operands = int(backward) + int(self.scored) + len(self.betas)
        self.dtype = product_dtype(step.x.dtype, step.precision)
        self.precision = "tf32" if step.precision == "tf32" else "ieee"
        single = self.dtype == torch.float32
        self.nearest = single and self.precision == "tf32"
        self.turned = single and (self.nearest if force_turned is None else force_turned)
        self.score_weight, self.score_bias = (
            (dense(step.score_weight), dense(step.score_bias)) if self.scored else (None, None)
        )
        own_rows = not step.linear or _row_stride(self.score_weight) != 0
        self.plan: Plan = plan(
            self.B, self.n, self.m, self.d, step.x.dtype, step.precision,
            operands=self.operands, backward=backward, made_gate=backward and step.gate_weight is not None,
            own_rows=want_rows and own_rows, one_pass=force_one_pass, sms=multiprocessors(step.x.device),
            shared=shared_memory(step.x.device),
        )  # fmt: skip
        self.mask = None if step.mask is None else step.mask.expand(self.B, self.n, self.m).view(torch.uint8)
        self.mask_strides = (0, 0, 0) if self.mask is None else self.mask.stride()
        self.use, self.ign = (None, None) if step.linear else (dense(step.use), dense(step.ign))

    def stack(self, samples: slice, dM: Tensor | None) -> Tensor | None:
        """[samples, G, m padded, d]: what multiplies x, in the dtype of the products."""
        if not self.operands:
            return None
        found = [w[samples] for w in (dM, self.step.pred) if w is not None] + self.betas
        shape = (samples.stop - samples.start, self.operands, padded(self.m), self.d)
        new = self.x.new_empty if padded(self.m) == self.m else self.x.new_zeros
        packed = new(shape, dtype=self.dtype)
        for g, w in enumerate(found):
            packed[:, g, : self.m] = w
        return nearest_tf32(packed) if self.nearest else packed

    def scratch(self, *operands_and_dtype: tuple[int, torch.dtype]) -> list[Tensor]:
        rows = (self.plan.batch, self.plan.rows)
        return [self.x.new_empty((*rows, g, padded(self.m)), dtype=t) for g, t in operands_and_dtype]

    def phi(self) -> _Kept:
        """Of the forward pass; if ``turned``, rows lie dense, with room for whole blocks of them."""
        batch, rows, pad, depth = self.plan.batch, self.plan.rows, padded(self.m), self.plan.aggregate.depth
        if not self.turned:
            return _Kept(self.x.new_empty((batch, rows, pad), dtype=self.dtype), False)
        made = self.x.new_empty((batch, pad, cdiv(rows, depth) * depth), dtype=self.dtype)
        return _Kept(made.mT, True)

    def common(self, x: Tensor) -> dict[str, object]:
        return {"X_ROW": x.stride(1), "D": self.d, "RAGGED": self.step.lengths is not None}

    def row_constants(self, x: Tensor) -> dict[str, object]:
        step, tile = self.step, self.plan.row
        return {
            **self.common(x),
            "M": self.m, "M_PAD": padded(self.m), "G": self.operands,
            "SCORED": self.scored, "LINEAR": step.linear, "IGN": step.ign is not None,
            "ONE_PASS": self.plan.one_pass, "NEAREST": self.nearest,
            "PRECISION": self.precision,
            "SCORE_ROW": _row_stride(self.score_weight),
            "BLOCK_N": tile.rows, "BLOCK_M": tile.columns, "BLOCK_D": tile.depth,
            "warps": tile.warps, "stages": tile.stages,
        }  # fmt: skip

    def score(self, samples: slice, first: int, last: int, packed: Tensor, out: Tensor) -> None:
        tile = self.plan.score
        K = self.operands * padded(self.m)
        start.launch(
            score_kernel, (cdiv(last - first, tile.rows) * cdiv(K, tile.columns), samples.stop - samples.start),
            self.multiplied[samples], self.multiplied.stride(0), packed, out, _part(self.step.lengths, samples),
            first, last, self.plan.rows,
            K=K, PRECISION=self.precision, BLOCK_N=tile.rows, BLOCK_K=tile.columns, BLOCK_D=tile.depth,
            warps=tile.warps, stages=tile.stages, **self.common(self.multiplied),
        )  # fmt: skip


def _added(parts: Tensor, axis: int) -> Tensor:
    return parts.select(axis, 0) if parts.shape[axis] == 1 else parts.sum(axis)


class _Kept(NamedTuple):
    """Coefficients of a chunk, from its first row on: [batch, rows, operands * m padded]."""

    coefficient: Tensor
    whole: bool = False  #: zeros follow the last row, to the end of a block

    def args(self) -> tuple[Any, ...]:
        return self.coefficient, *self.coefficient.stride()


class _Narrow(NamedTuple):
    """x in half its bytes, with as many digits as TF32 has: float16 times a power of two for each row.

    A row's largest number has the exponent 14 there, so that whatever is larger than 2^-28 of it keeps all 11 digits
    that TF32 products read; what is smaller is off by 2^-39 of it at most. Products take the powers of two after their
    sums, or, where they sum over rows, with the coefficients.
    """

    x: Tensor  # [B, n, d] float16
    power: Tensor  # [B, n] float32

    @classmethod
    def of(cls, call: _Call) -> tuple[_Narrow | None, int]:
        """What this pass makes (1) or reads (2)."""
        passes = call.step.passes
        if passes is None:
            return None, 0
        if isinstance(passes.kept, cls):
            return passes.kept, 2
        # the pass that makes gates is the one that reads whole rows
        if force_narrow is not True or passes.to_come == 0 or not call.nearest or call.step.gate is not None:
            return None, 0
        if call.step.linear:  # its row kernel reads products of x in one pass as well
            return None, 0
        shape = call.B, call.n
        passes.kept = cls(
            call.x.new_empty((*shape, call.d), dtype=torch.float16), call.x.new_empty(shape, dtype=torch.float32)
        )
        return passes.kept, 1


class _Left:
    """What passes of a backward leave to the last one, which alone writes dx: their coefficients and operands."""

    def __init__(self, call: _Call, grads: Grads) -> None:
        self.columns = call.operands * padded(call.m)
        all_columns = grads.to_come * self.columns
        self.coefficient = call.x.new_empty((call.B, call.n, all_columns), dtype=call.dtype)
        shape = (call.d, all_columns) if call.turned else (all_columns, call.d)
        self.packed = call.x.new_empty((call.B, *shape), dtype=call.dtype)
        self.turned, self.fresh, self.own = call.turned, grads.fresh, slice(0, self.columns)

    @classmethod
    def of(cls, call: _Call, grads: Grads) -> _Left | None:
        """Where this pass leaves its part of dx; None: it makes that, and what earlier passes left."""
        if grads.to_come == 0 or grads.x is None:
            return None
        if grads.left is not None:
            before = grads.left.own.stop
            grads.left.own = slice(before, before + grads.left.columns)
            return grads.left
        sizes = call.n, call.m, call.d, call.operands, grads.to_come, call.step.x.dtype, call.step.precision
        if not (leaves(*sizes) if force_left is None else force_left):
            return None
        grads.left = cls(call, grads)
        return grads.left

    def keep(self, samples: slice, packed: Tensor) -> None:
        """The operands of this pass, as ``spread`` takes them."""
        of_all = self.packed.mT if self.turned else self.packed
        of_all[samples, self.own] = packed.flatten(1, 2)

    def part(self, samples: slice, first: int) -> _Kept:
        """Of this pass."""
        return _Kept(self.coefficient[samples, first:, self.own])

    def all(self, samples: slice, first: int) -> _Kept:
        return _Kept(self.coefficient[samples, first:])


class _Sums:
    """[B or 1, operands * m, d] sums over rows of some columns of ``coefficient``; splits are kept apart to the end."""

    def __init__(self, call: _Call, columns: tuple[int, int], *, over_batch: bool) -> None:
        self.call, self.columns, self.over_batch = call, columns, over_batch
        groups, width = (1 if over_batch else call.B), (columns[1] - columns[0]) * call.m
        splits = call.plan.shared_splits if over_batch else call.plan.splits
        self.total = call.x.new_empty((splits, groups, width, call.d), dtype=torch.float32)
        # the gradients of linear betas' biases: over the batch too
        self.sums = call.x.new_empty((splits, groups, width), dtype=torch.float32) if over_batch else None

    def add(self, samples: slice, first: int, last: int, kept: _Kept) -> None:
        call, tile = self.call, self.call.plan.aggregate
        pad = padded(call.m)
        k_tiles = cdiv((self.columns[1] - self.columns[0]) * pad, tile.rows)
        batch = samples.stop - samples.start
        splits, groups = self.total.shape[0], 1 if self.over_batch else batch
        own = slice(None) if self.over_batch else samples
        start.launch(
            aggregate_kernel, (splits * k_tiles * (cdiv(call.d, tile.columns) + self.over_batch), groups),
            call.multiplied[samples], call.multiplied.stride(0), *kept.args(), self.total[:, own],
            None if self.sums is None else self.sums[:, own], _part(call.step.lengths, samples),
            self.total.stride(0), self.total.stride(1), *((0, 0) if self.sums is None else self.sums.stride()[:2]),
            first, last, splits, cdiv(cdiv(last - first, splits), tile.depth) * tile.depth,
            batch, batch if self.over_batch else 1, 1.0,
            K_FROM=self.columns[0] * pad, K_TO=self.columns[1] * pad, M=call.m, M_PAD=pad,
            ADD=first > 0 or (self.over_batch and samples.start > 0), PRECISION=call.precision,
            TURNED=call.turned, WHOLE=kept.whole, SUMS=self.over_batch,
            BLOCK_K=tile.rows, BLOCK_D=tile.columns, BLOCK_N=tile.depth, warps=tile.warps, stages=tile.stages,
            **call.common(call.multiplied),
        )  # fmt: skip

    def result(self) -> Tensor:
        return _added(self.total, 0)

    def results(self) -> tuple[Tensor, Tensor]:
        assert self.sums is not None
        return _added(self.total, 0), _added(self.sums, 0)


def nearest_tf32(t: Tensor) -> Tensor:
    """As ``launch.nearest_tf32``."""
    return torch.where(t.isnan(), t, t.view(torch.int32).add(0x1000).bitwise_and_(-0x2000).view(torch.float32))


def _row_stride(t: Tensor | None) -> int:
    """0 where one row serves every input vector."""
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)


def _part(t: Tensor | None, samples: slice) -> Tensor | None:
    return None if t is None else t[samples]


def forward(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """(M [B, m, d], p [B, m], gate [B, n]), all float32."""
    with on(step.x):
        return _forward(_Call(step, backward=False))


def _forward(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    step, chosen = call.step, call.plan
    make_gate = step.gate is None
    narrow, role = _Narrow.of(call)
    x = call.x
    if narrow is not None:
        call.multiplied = narrow.x
        x = x if role == 1 else narrow.x
    gate = call.x.new_empty((call.B, call.n), dtype=torch.float32) if step.gate is None else dense(step.gate)
    gate_weight, gate_bias, scale = (dense(t) for t in (step.gate_weight, step.gate_bias, step.scale))
    prior = dense(step.prior)
    phi = call.phi()
    two_phase = not chosen.one_pass
    score = call.scratch((call.operands, torch.float32))[0] if two_phase else None
    M = _Sums(call, (0, 1), over_batch=False)
    p = call.x.new_empty((call.B, call.m), dtype=torch.float32)
    assert gate is not None
    for samples, first, last in chunks(call.B, call.n, call.plan):
        if first == 0:
            packed = call.stack(samples, None)
        if two_phase:
            assert packed is not None and score is not None
            call.score(samples, first, last, packed, score)
        batch = samples.stop - samples.start
        per_program = cdiv(batch, chosen.groups)
        depth = chosen.aggregate.depth
        rows = cdiv(last - first, depth) * depth if phi.whole else last - first
        phi_sums = call.x.new_empty((batch, cdiv(rows, chosen.row.rows), call.m), dtype=torch.float32)
        start.launch(
            forward_kernel, (phi_sums.shape[1], cdiv(batch, per_program)),
            x[samples], x.stride(0),
            *((None, None) if narrow is None else (narrow.x[samples], narrow.power[samples])),
            gate[samples], gate_weight, gate_bias, _part(scale, samples),
            packed, score, call.score_weight, call.score_bias, call.use, call.ign, step.use_bias, step.ign_bias, prior,
            _part(call.mask, samples), *call.mask_strides, _part(step.lengths, samples), *phi.args(), phi_sums,
            gate.stride(0), first, last, chosen.rows, rows, batch, per_program,
            GATE_ROW=_row_stride(gate_weight), GATE_BIAS_ROW=_row_stride(gate_bias), MAKE_GATE=make_gate, NARROW=role,
            **call.row_constants(x),
        )  # fmt: skip
        M.add(samples, first, last, phi)
        if last - first == call.n and batch == call.B:
            p = _added(phi_sums, 1)
        else:
            (p[samples].add_ if first else p[samples].copy_)(_added(phi_sums, 1))
    return M.result(), p, gate


def backward(step: Step, dM: Tensor, dp: Tensor, grads: Grads) -> Tensor | None:
    """dpred [B, m, d] float32, or None in a first iteration; the other gradients go to ``grads``."""
    with on(step.x):
        return _backward(_Call(step, backward=True, want_rows=grads.use is not None), dM, dp, grads)


def _backward(call: _Call, dM: Tensor, dp: Tensor, grads: Grads) -> Tensor | None:
    step, chosen = call.step, call.plan
    want_rows, want_x = grads.use is not None, grads.x is not None
    gate, dp, prior = dense(step.gate), dp.contiguous(), dense(step.prior)
    assert gate is not None  # the forward pass made it
    shared_score = call.scored and want_rows and _row_stride(call.score_weight) == 0
    left = _Left.of(call, grads)
    own = None if left is not None else _Kept(call.scratch((call.operands, call.dtype))[0].flatten(2))
    score = None if chosen.one_pass else call.scratch((call.operands, torch.float32))[0]
    dpred = _Sums(call, (1, 2), over_batch=False) if call.scored else None
    betas = (
        _Sums(call, (call.operands - len(call.betas), call.operands), over_batch=True)
        if want_rows and step.linear
        else None
    )
    gate_part = _GatePart(call, gate, grads)
    score_total = None
    for samples, first, last in chunks(call.B, call.n, call.plan):
        if first == 0:
            packed = call.stack(samples, dM)
            assert packed is not None  # dM is in it
            to_spread = packed.flatten(1, 2).mT.contiguous() if call.turned else packed.flatten(1, 2)
            if left is not None:
                left.keep(samples, packed)
        kept = own if left is None else left.part(samples, first)
        if score is not None:
            call.score(samples, first, last, packed, score)
        batch = samples.stop - samples.start
        per_program = cdiv(batch, chosen.groups)
        grid = (cdiv(last - first, chosen.row.rows), cdiv(batch, per_program))
        score_sums = call.x.new_empty((grid[0] * grid[1], 2, call.m), dtype=torch.float32) if shared_score else None
        start.launch(
            backward_kernel, grid,
            call.x[samples], call.x.stride(0), gate[samples], packed, score, dp[samples],
            call.score_weight, call.score_bias, call.use, call.ign, step.use_bias, step.ign_bias, prior,
            _part(call.mask, samples), *call.mask_strides, _part(step.lengths, samples), *kept.args()[:3],
            grads.gate[samples], grads.score_weight, grads.score_bias, grads.use, grads.ign, score_sums,
            gate.stride(0), grads.gate.stride(0), first, last, chosen.rows, batch, per_program,
            WANT_X=want_x, WANT_ROWS=want_rows, ADD_GATE=not grads.fresh, ADD_ROWS=not grads.fresh or samples.start > 0,
            **call.row_constants(call.x),
        )  # fmt: skip
        if score_sums is not None:
            part = score_sums.sum(0)
            score_total = part if score_total is None else score_total + part
        if dpred is not None:
            dpred.add(samples, first, last, kept)
        if betas is not None:
            betas.add(samples, first, last, kept)
        if left is None:
            gate_part.spread(samples, first, last, to_spread, kept)

    if betas is not None:
        weights, biases = betas.results()
        for g, (weight, bias) in enumerate(
            ((grads.use, grads.use_bias), (grads.ign, grads.ign_bias))[: len(call.betas)]
        ):
            own = slice(g * call.m, (g + 1) * call.m)
            _put(weight, weights[0, own], grads.fresh)
            _put(bias, biases[0, own], grads.fresh)
    if score_total is not None:
        _put(grads.score_weight, score_total[0], grads.fresh)
        _put(grads.score_bias, score_total[1], grads.fresh)
    if want_rows and grads.fresh and not call.scored:
        for buffer in (grads.score_weight, grads.score_bias):
            if buffer is not None:
                buffer.zero_()
    gate_part.finish()
    return None if dpred is None else dpred.result()


def _put(buffer: Tensor | None, value: Tensor, fresh: bool) -> None:
    """Fill a shared parameter's buffer, or add to it."""
    if buffer is not None:
        (buffer.copy_ if fresh else buffer.add_)(value.reshape(buffer.shape))


class _GatePart:
    """dx, and in a first iteration that made its gates, their part of it and the gradients of their parameters."""

    def __init__(self, call: _Call, gate: Tensor, grads: Grads) -> None:
        self.call, self.gate, self.grads = call, gate, grads
        step = call.step
        self.made = step.gate_weight is not None
        self.wanted = self.made and grads.use is not None and grads.gate_weight is not None
        self.weight, self.scale = dense(step.gate_weight), dense(step.scale)
        self.shared = _row_stride(self.weight) == 0
        self.total: Tensor | None = None

    def spread(self, samples: slice, first: int, last: int, packed: Tensor, kept: _Kept) -> None:
        call, grads, tile, dx = self.call, self.grads, self.call.plan.spread, self.grads.x
        if dx is None and not self.wanted:
            return
        batch = samples.stop - samples.start
        # With a row of its own per input row, the weight's gradient adds up over the samples inside one program.
        groups = 1 if self.wanted and not self.shared else batch
        left: _Left | None = grads.left
        before = (None,) * 4 if left is None else (left.packed[samples], *left.all(samples, first).args()[:3])
        grid = (cdiv(last - first, tile.rows) * cdiv(call.d, tile.columns), groups)
        out = grads.gate_weight
        if self.wanted and self.shared:
            out = call.x.new_empty((cdiv(last - first, tile.rows), groups, call.d), dtype=torch.float32)
        start.launch(
            spread_kernel, grid,
            call.x[samples], call.x.stride(0), _part(dx, samples), 0 if dx is None else dx.stride(0),
            packed, *kept.args()[:3], *before,
            self.gate[samples], grads.gate[samples], self.weight, _part(self.scale, samples), out,
            _part(call.step.lengths, samples), self.gate.stride(0), grads.gate.stride(0),
            first, last, batch, cdiv(batch, groups),
            DX_ROW=0 if dx is None else dx.stride(1), K=packed.shape[2 if call.turned else 1],
            LEFT=0 if left is None else left.coefficient.shape[2], GATE_ROW=_row_stride(self.weight),
            MADE_GATE=self.made, WANT_X=dx is not None, WANT_GATE=self.wanted,
            ADD_X=not (grads.fresh if left is None else left.fresh), ADD_GATE=samples.start > 0,
            TURNED=call.turned, PRECISION=call.precision,
            BLOCK_N=tile.rows, BLOCK_D=tile.columns, BLOCK_K=tile.depth, warps=tile.warps, stages=tile.stages,
            **call.common(call.x),
        )  # fmt: skip
        if self.wanted and self.shared:
            assert out is not None
            part = out.sum((0, 1))
            self.total = part if self.total is None else self.total + part

    def finish(self) -> None:
        """The gates' own parameters, from the gates' gradient: [B, n] work."""
        grads = self.grads
        if not self.wanted:
            return
        if self.total is not None:
            _put(grads.gate_weight, self.total, True)
        slope = self.gate * (1.0 - self.gate)
        da = torch.where(slope == 0, 0, grads.gate * slope)  # behind a gate that is shut: 0, not 0 inf
        if grads.gate_bias is not None:
            _put(grads.gate_bias, da.sum() if grads.gate_bias.shape[0] == 1 else da.sum(0), True)
