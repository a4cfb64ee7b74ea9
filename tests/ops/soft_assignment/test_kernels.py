"""The Triton kernels of ``soft_assignment`` against float64: compiled on a GPU, else interpreted."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from fastroute import functional, use_backend
from fastroute.kernels.soft_assignment import OUTPUTS
from fastroute.ops.backends import BackendUnavailable
from tests.helpers.assignment_cases import FORMS, SHARED, case_of, op, truth
from tests.helpers.budget import check
from tests.helpers.cases import evaluate

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
each_form = pytest.mark.parametrize("form", FORMS)
each_shared = pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)


def check_op(form: str, size: tuple[int, int, int, int], shared: str, dtype: torch.dtype = F32, count: int = 2) -> None:
    cases = [case_of(form, size, shared, dtype, seed, device=DEVICE) for seed in range(count)]
    check(op("triton", form), truth(form), cases, dtype=dtype)


@pytest.mark.parametrize("shared", ["", "bm"], ids=["own", "by both"])
@each_form
def test_forms(form: str, shared: str) -> None:
    check_op(form, (3, 19, 5, 7), shared)


@pytest.mark.parametrize("form", ["padded", "masked mean"])
@pytest.mark.parametrize("shared", ["b", "m"], ids=["by samples", "by outputs"])
def test_shared_votes(form: str, shared: str) -> None:
    check_op(form, (3, 19, 5, 7), shared)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
@each_shared
def test_half_precision(dtype: torch.dtype, shared: str) -> None:
    check_op("routing", (2, 19, 5, 7), shared, dtype)


@pytest.mark.parametrize("size", [(1, 1, 2, 1), (2, 70, 3, 70), (1, 9, 130, 9), (1, 9, 40, 70)], ids=str)
@pytest.mark.parametrize("shared", ["", "m"], ids=["own", "by outputs"])
def test_sizes(size: tuple[int, int, int, int], shared: str) -> None:
    check_op("routing", size, shared)
    if shared and size[2] == 130:
        check_op("masked mean", size, "bm")


def test_betas_of_either_kind() -> None:
    """One of the two for all samples, the other for each."""
    case = case_of("routing", (3, 9, 5, 4), "", F32, device=DEVICE)
    case = case.with_inputs(ign=torch.randn(3, 9, 5, device=DEVICE))
    found, expected = evaluate(op("triton", "routing"), case), evaluate(op("reference", "routing"), case)
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t)


def test_only_some_gradients() -> None:
    case = case_of("routing", (3, 9, 5, 4), "", F32, device=DEVICE)
    whole = evaluate(op("triton", "routing"), case)
    for wanted in case.wrt:
        alone = {k: t.detach().requires_grad_(k == wanted) for k, t in case.inputs.items() if t is not None}
        y = op("triton", "routing")(**alone)["y"]
        (grad,) = torch.autograd.grad(y, alone[wanted], case.cotangents["y"])
        assert torch.equal(grad, whole[f"d{wanted}"])  # type: ignore[arg-type]


def test_extreme_scores() -> None:
    scores = torch.tensor(
        [[[1e4, -1e4, 0.0], [-3e38, -3e38, -3e38], [-torch.inf, 0.0, 3e38], [-500.0, -501.0, -600.0]]], device=DEVICE
    )
    with use_backend("triton"):
        R = functional.soft_assignment(scores, torch.eye(4, device=DEVICE)[None, :, None])
    torch.testing.assert_close(R.mT, scores.softmax(-1))


def test_padding_is_not_read() -> None:
    case = case_of("padded", (3, 23, 6, 5), "", F32, device=DEVICE)
    lengths = torch.tensor([23, 5, 0], device=DEVICE)
    alone = evaluate(op("triton", "padded"), case.with_inputs(lengths=lengths))
    spoiled: dict[str, Tensor | None] = {k: case.inputs[k].clone() for k in ("scores", "votes", "gate")}  # type: ignore[union-attr]
    for b, length in enumerate((23, 5, 0)):
        for t in spoiled.values():
            t[b, length:] = torch.nan  # type: ignore[index]
    found = evaluate(op("triton", "padded"), case.with_inputs(**spoiled, lengths=lengths))
    for name, expected in alone.items():
        assert torch.equal(found[name], expected), name  # type: ignore[arg-type]


def test_same_bits_every_time() -> None:
    case = case_of("routing", (2, 100, 6, 20), "", F32, device=DEVICE)
    a, b = (evaluate(op("triton", "routing"), case) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)  # type: ignore[arg-type]


def test_too_many_outputs() -> None:
    scores, votes = torch.zeros(1, 2, OUTPUTS + 1, device=DEVICE), torch.zeros(1, 2, 1, 3, device=DEVICE)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match=f"up to {OUTPUTS} outputs, not {OUTPUTS + 1}"):
        functional.soft_assignment(scores, votes)
