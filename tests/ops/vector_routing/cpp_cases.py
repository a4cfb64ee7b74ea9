"""What runs under the sanitizers: every form of the native passes on small odd sizes, inputs and gradients fenced."""

from __future__ import annotations

import importlib.util
import math
import sys
from itertools import product

import torch

import fastroute.ops.vector_routing.native as native
from fastroute import use_backend
from fastroute.ops import backends
from fastroute.ops.vector_routing.contract import Grads, Step
from tests.helpers import seeds
from tests.helpers.cases import evaluate
from tests.helpers.layouts import LAYOUTS, Fenced
from tests.helpers.opcheck import assert_same
from tests.helpers.poison import poisoned_memory
from tests.helpers.routing_cases import (
    Size,
    efficient_case,
    efficient_op,
    efficient_truth,
    some_mask,
    vector_case,
    vector_op,
    vector_truth,
)
from tests.ops.agent_policy.cpp_cases import agent_policies
from tests.ops.efficient_routing.cpp_cases import one_call
from tests.ops.grouped_linear.cpp_cases import grouped_linears, plans, policies
from tests.ops.matrix_routing.cpp_cases import matrix_iterations, matrix_passes
from tests.ops.soft_assignment.cpp_cases import soft_assignments
from tests.ops.task_mask.cpp_cases import masked_batch_norms, task_masks
from tests.ops.trajectory_loss.cpp_cases import trajectory_losses

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SIZES = (Size(1, 1, 2, 1), Size(3, 37, 7, 13), Size(9, 70, 33, 5), Size(2, 600, 17, 9))


def load(library: str) -> None:
    """Use this build of the extension."""
    spec = importlib.util.spec_from_file_location("fastroute._C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fastroute._C"] = module
    assert backends.extension()[0] == library
    assert torch.ops.fastroute._isas() == [torch.ops.fastroute._isa()], "sanitized code is for one instruction set"


def one_iteration() -> None:
    for size, dtype, first, linear, ign, padded in product(SIZES, (F32, F64, BF16), *[(False, True)] * 4):
        parameters = {BF16: (BF16, F32), F32: (F32, BF16), F64: (F64, F32)}[dtype]
        for parameter_dtype in parameters:
            b, n, m, _, _ = size
            case = vector_case(
                size, dtype=dtype, parameter_dtype=parameter_dtype, first=first, linear=linear, shared_scores=linear,
                ign=ign, mask=some_mask(b, n, m) if padded else None,
                lengths=[n * (b - k) // b for k in range(b)] if padded else None,
            )  # fmt: skip
            found = evaluate(vector_op, case)
            unwritten = [k for k, t in found.items() if t is not None and not t.isfinite().all()]
            assert not unwritten, (unwritten, str(size), dtype, parameter_dtype, first, linear, ign, padded)
            if dtype == parameter_dtype == F64:
                for name, expected in evaluate(vector_truth, case).items():
                    got = found[name]
                    assert got is not None and expected is not None
                    assert_same(got, expected, name)


def fenced() -> None:
    """Straight into the passes, with a redzone either side of everything they are given."""
    for size, first, linear, fresh in product(SIZES, *[(False, True)] * 3):
        case = vector_case(size, first=first, linear=linear, shared_scores=linear)
        fences = {k: Fenced(t) for k, t in case.inputs.items() if t is not None}
        step = Step(
            gate_weight=None,
            gate_bias=None,
            scale=None,
            **{k: fences[k].tensor if k in fences else None for k in case.inputs},
        )
        native.forward(step)
        filled = {
            k: Fenced(torch.full_like(fences[k].tensor, math.nan if fresh else 0.0))
            for k in case.wrt
            if k != "pred" and k in fences
        }
        native.backward(
            step, case.cotangents["M"], case.cotangents["p"], Grads(fresh, **{k: f.tensor for k, f in filled.items()})
        )
        assert all(f.intact() for f in (*fences.values(), *filled.values()))
        assert all(f.tensor.isfinite().all() for f in filled.values())


def all_iterations() -> None:
    for size, linear, n_iters in product(SIZES, (False, True), (1, 2, 3)):
        for mask in (None, some_mask(size.b, size.n, size.m)):
            case = efficient_case(size, linear=linear, mask=mask, lengths=[size.n] * size.b, dtype=F64)
            found = evaluate(efficient_op(n_iters, False), case)
            for name, expected in evaluate(efficient_truth(n_iters, False), case).items():
                got = found[name]
                assert (got is None) == (expected is None)
                if got is not None and expected is not None:
                    assert_same(got, expected, name)


def layouts() -> None:
    for layout, dtype in product(LAYOUTS.values(), (F32, BF16)):
        case = vector_case(Size(3, 37, 7, 13), dtype=dtype, mask=some_mask(3, 37, 7))
        evaluate(
            lambda layout=layout, **inputs: vector_op(
                **{k: None if t is None else layout(t) for k, t in inputs.items()}
            ),
            case,
        )


def run() -> None:
    seeds.manual_seed(0)
    with use_backend("native"), poisoned_memory():
        capsules = one_iteration, fenced, all_iterations, one_call, layouts, matrix_iterations, matrix_passes
        networks = plans, grouped_linears, policies, agent_policies, trajectory_losses
        for part in (*capsules, soft_assignments, *networks, task_masks, masked_batch_norms):
            part()
            print(part.__name__, flush=True)
    print("no findings")
