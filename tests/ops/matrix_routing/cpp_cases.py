"""``matrix_routing`` under the sanitizers: every form of the passes on small odd sizes, inputs and gradients fenced."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import fastroute.ops.matrix_routing.native as native
from fastroute.ops.matrix_routing import plain as matrix_tiles
from fastroute.ops.matrix_routing.contract import MatrixGrads, MatrixStep, OutputGrads, Outputs
from fastroute.ops.matrix_routing.op import Call
from fastroute.ops.matrix_routing.settling import settle
from tests.helpers.budget import assert_within_budget
from tests.helpers.cases import evaluate
from tests.helpers.layouts import Fenced, strided
from tests.helpers.matrix_cases import PARAMETERS, Size, matrix_case, matrix_op, matrix_truth
from tests.helpers.opcheck import assert_same
from tests.helpers.routing_cases import some_mask

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SIZES = (Size(1, 1, 2, 1, 1, 1), Size(3, 37, 7, 2, 3, 5), Size(9, 130, 17, 4, 4, 4), Size(2, 70, 33, 1, 21, 2))


def matrix_iterations() -> None:
    """All iterations, in every dtype, with and without a mask that closes an input and an output."""
    for size, dtype, shared, masked in product(SIZES, (F32, F64, BF16), *[(False, True)] * 2):
        mask = None
        if masked:
            mask = some_mask(size.b, size.n, size.m)
            mask[..., -1] = True
        case = matrix_case(size, dtype=dtype, shared=shared, mask=mask)
        found = evaluate(matrix_op(2), case)
        assert all(t is not None and t.isfinite().all() for t in found.values()), (str(size), dtype, shared, masked)
        if dtype == F64:
            for name, expected in evaluate(matrix_truth(2), case).items():
                got = found[name]
                assert got is not None and expected is not None
                assert_same(got, expected, name)


def weights_in_float64(step: MatrixStep) -> dict[str, Tensor]:
    def wide(t: Any) -> Any:
        return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

    previous = None if step.previous is None else Outputs(*map(wide, step.previous))
    return {
        "N0": matrix_tiles.forward(MatrixStep(*map(wide, step._replace(previous=None)))._replace(previous=previous)).N0
    }


def matrix_passes() -> None:
    """Straight into the passes, with a redzone either side of everything they are given."""
    for size, dtype, shared, fresh, first in product(SIZES, (F32, BF16), *[(False, True)] * 3):
        case = matrix_case(size, shared=shared, parameter_dtype=dtype)
        fences = {k: Fenced(t) for k, t in case.inputs.items() if t is not None}
        given = {k: f.tensor for k, f in fences.items()}
        a = given["a_inp"]
        if size.n > 1:
            a[:, 0] = -math.inf
        mask = strided(some_mask(size.b, size.n, size.m))
        call = Call.of((a, given["mu_inp"], *(given[k] for k in PARAMETERS), mask, 2, "gaussian", 1e-5, "native"))
        step = call.step(call.gate(), None)
        made = native.forward(step)
        assert all(t is not None and t.isfinite().all() for t in made)
        if not first:
            step = step._replace(previous=settle(made, 1e-5))
            made = native.forward(step)
        assert_within_budget({"N0": made.N0}, partial(weights_in_float64, step), F32, str(size))
        d = settle(made, 1e-5)
        like = {
            k: Fenced(torch.full(given[k].shape, math.nan if fresh else 0.0)) for k in ("a_inp", "mu_inp", *PARAMETERS)
        }
        names = ("gate", "mu_inp", "W", "bias", "beta_use", "beta_ign")
        buffers: dict[str, Tensor] = {name: fence.tensor for name, fence in zip(names, like.values(), strict=True)}
        grads = MatrixGrads(fresh, **buffers)
        sums = native.backward(step, OutputGrads.of(made, d, 1e-5), grads)
        assert (sums is None) == first
        assert sums is None or all(t.isfinite().all() for t in sums)
        native.backward(step, OutputGrads.of(made, d, 1e-5), replace(grads, fresh=False))
        assert all(f.intact() for f in (*fences.values(), *like.values()))
        assert all(f.tensor.isfinite().all() for f in like.values())
