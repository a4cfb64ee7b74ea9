"""Where one output is open to an input, its share is exactly 1, and what only moves shares has a gradient of exactly 0.

A rest of 1e-7 there becomes a full-size step of Adam.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastroute import use_backend
from tests.helpers import assignment_cases, matrix_cases, routing_cases, seeds
from tests.helpers.backends import each_backend
from tests.helpers.budget import check
from tests.helpers.cases import Case, Function, evaluate
from tests.helpers.routing_cases import Size

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
B, N, M, D = 3, 70, 9, 12


def one_open() -> torch.Tensor:
    """[B, N, M] bool: every input reaches one output."""
    open_ = torch.randint(M, (B, N, 1), generator=seeds.generator(1))
    return torch.ones(B, N, M, dtype=torch.bool).scatter_(2, open_, False)


def _vector(m: int, dtype: torch.dtype, **options: Any) -> Case:
    return routing_cases.vector_case(Size(B, N, m, D), dtype=dtype, **options)


def _matrix(m: int, dtype: torch.dtype, **options: Any) -> Case:
    return matrix_cases.matrix_case(matrix_cases.Size(B, N, m, 2, 3, 4), dtype=dtype, **options)


def _efficient(m: int, dtype: torch.dtype, **options: Any) -> Case:
    return routing_cases.efficient_case(Size(B, N, m, D, 5), dtype=dtype, **options)


def _assignment(m: int, dtype: torch.dtype, mask: torch.Tensor | None = None) -> Case:
    return assignment_cases.case_of("routing", (B, N, m, D), dtype=dtype).with_inputs(mask=mask)


#: (op, its definition, a case of m outputs, what has no gradient)
OPS: dict[str, tuple[Function, Function, Any, tuple[str, ...]]] = {
    "vector_routing": (
        routing_cases.vector_op, routing_cases.vector_truth, _vector, ("score_weight", "score_bias", "pred", "ign"),
    ),
    "vector_routing, first": (
        routing_cases.vector_op, routing_cases.vector_truth,
        lambda m, dtype, **options: _vector(m, dtype, first=True, **options), ("ign",),
    ),
    "vector_routing, linear": (
        routing_cases.vector_op, routing_cases.vector_truth,
        lambda m, dtype, **options: _vector(m, dtype, linear=True, shared_scores=True, **options),
        ("score_weight", "score_bias", "pred", "ign", "ign_bias"),
    ),
    "efficient_routing": (
        routing_cases.efficient_op(), routing_cases.efficient_truth(), _efficient,
        ("W_S", "B_S", "W_G1", "W_G2", "B_G2", "beta_ign"),
    ),
    "matrix_routing": (matrix_cases.matrix_op(), matrix_cases.matrix_truth(), _matrix, ("beta_ign",)),
    "soft_assignment": (
        assignment_cases.of_form("routing"), assignment_cases.truth("routing"), _assignment, ("scores", "ign"),
    ),
}  # fmt: skip
each_op = pytest.mark.parametrize("op", OPS)


def _is_exact(backend: str, op: str, case: Case, dtype: torch.dtype) -> None:
    fn, truth, _, nothing = OPS[op]
    # the plain backend's products of outputs take operands in half precision (outputs.matmul)
    halves = backend == "reference" and op == "efficient_routing" and dtype == BF16
    operands = {"operands": dtype} if halves else {}
    found = check(use_backend(backend)(fn), truth, case, dtype=dtype, **operands)
    for name in nothing:
        g = found[f"d{name}"]
        assert g is not None and not g.any(), name


@each_backend
@each_op
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
def test_one_open_by_the_mask(backend: str, op: str, dtype: torch.dtype) -> None:
    _is_exact(backend, op, OPS[op][2](M, dtype, mask=one_open()), dtype)


@each_backend
@each_op
@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
def test_one_output_alone(backend: str, op: str, dtype: torch.dtype) -> None:
    _is_exact(backend, op, OPS[op][2](1, dtype), dtype)


@each_backend
@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
def test_one_output_far_above_the_others(backend: str, dtype: torch.dtype) -> None:
    """The others' shares are lost in the sum, which is the same as if they were closed."""
    case = _vector(M, dtype)
    bias = torch.full((N, M), -90.0, dtype=dtype)
    bias[:, 4] = -20.0
    far = case.with_inputs(score_bias=bias, score_weight=torch.zeros(N, M, dtype=dtype))
    found = evaluate(use_backend(backend)(routing_cases.vector_op), replace(far, wrt=("score_bias", "use")))
    rest = found["dscore_bias"]
    assert rest is not None
    assert rest.abs().max() < 1e-20
