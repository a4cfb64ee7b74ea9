"""``combine``: weighted sums over entries, against the definition and on budget.

Axes: B (b) samples, k entries of each, M (m) numbers in an entry.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastroute.functional import combine
from fastroute.ops.combine.reference import combine as reference
from tests.helpers import seeds
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.opcheck import assert_same, check_compiled, gradcheck

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def combine_case(B: int, k: int, M: int, *, dropped: bool = True, dtype: torch.dtype = F32, seed: int = 0) -> Case:
    generator = seeds.generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

    valid = torch.rand(B, k, generator=generator) < (0.7 if dropped else 2)
    z = normal(B, k, M) * valid[:, :, None]
    inputs: dict[str, Tensor | None] = {"z": z, "weights": normal(B, k), "valid": valid}
    axes = {"z": "bkm", "weights": "bk", "valid": "bk", "y": "bm"}
    return Case(inputs, {"y": normal(B, M)}, axes, ("z", "weights"))


def op(given: bool = True) -> Callable[..., dict[str, Tensor]]:
    return lambda z, weights, valid: {"y": combine(z, weights, valid if given else None)}


def truth(z: Tensor, weights: Tensor, valid: Tensor) -> dict[str, Tensor]:
    return {"y": reference(z, weights, valid)}


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("B, k, M", [(9, 1, 4), (9, 3, 17), (1, 8, 1), (0, 2, 3)])
def test_budget(B: int, k: int, M: int, dtype: torch.dtype) -> None:
    cases = [combine_case(B, k, M, dtype=dtype, seed=seed) for seed in range(2)]
    assert check(op(), truth, cases, dtype=dtype)["y"].dtype == dtype  # type: ignore[union-attr]


def test_gradcheck() -> None:
    gradcheck(op(), combine_case(4, 3, 2))
    gradcheck(op(given=False), combine_case(4, 3, 2, dropped=False))


def test_any_rank_of_entries() -> None:
    case = combine_case(5, 3, 12, dtype=F64)
    z, weights, valid = case.inputs.values()
    assert z is not None and weights is not None
    images = combine(z.view(5, 3, 2, 3, 2), weights, valid)
    assert images.shape == (5, 2, 3, 2) and torch.equal(images.flatten(1), combine(z, weights, valid))
    assert torch.equal(combine(z[:, :, 0], weights, valid), combine(z, weights, valid)[:, 0])


def test_what_is_not_valid_is_not_looked_at() -> None:
    case = combine_case(6, 3, 4, dtype=F64)
    gone = ~case.inputs["valid"]  # type: ignore[operator]
    poisoned = case.with_inputs(weights=case.inputs["weights"].masked_fill(gone, torch.nan))  # type: ignore[union-attr]
    expected = evaluate(op(), case)
    for name, t in evaluate(op(), poisoned).items():
        assert torch.equal(t, expected[name]), name  # type: ignore[arg-type]
    cotangent = {"y": torch.full_like(case.cotangents["y"], torch.nan)}
    found = evaluate(op(), Case(case.inputs, cotangent, case.axes, case.wrt))
    assert not found["dz"][gone].any() and not found["dweights"][gone].any()  # type: ignore[index]


def test_weights_of_another_dtype() -> None:
    """They do not promote: y has z's dtype, gradients their own tensor's."""
    case = combine_case(6, 3, 4, dropped=False, dtype=BF16)
    z, weights = case.inputs["z"].requires_grad_(), case.inputs["weights"].float().requires_grad_()  # type: ignore[union-attr]
    y = combine(z, weights)
    y.sum().backward()
    assert (y.dtype, z.grad.dtype, weights.grad.dtype) == (BF16, BF16, F32)  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=BF16):  # sums are not a product for autocast to round
        z = z.detach().float()
        assert torch.equal(combine(z, weights), reference(z, weights, torch.ones(6, 3, dtype=torch.bool)))


def test_compile() -> None:
    cases = [combine_case(B, 3, 4, dtype=F64) for B in (5, 8, 3)]
    calls = [(c.inputs["z"].requires_grad_(), c.inputs["weights"].requires_grad_(), c.inputs["valid"]) for c in cases]  # type: ignore[union-attr]
    check_compiled(combine, calls)


def test_the_definition() -> None:
    z, w = torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 3, dtype=F64)
    valid = torch.tensor([[True, False, True], [False, False, False]])
    assert_same(combine(z * valid[:, :, None], w, valid)[0], w[0, 0] * z[0, 0] + w[0, 2] * z[0, 2])
    assert not combine(z, w, valid)[1].any()


def test_bad_input() -> None:
    z, w = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    for error, message, args in (
        (TypeError, "z: expected a floating-point", (z.long(), w)),
        (TypeError, "weights: expected a floating-point", (z, w.long())),
        (ValueError, r"z: expected \[B, k, ...\], k at least 1, got \[2\]", (z[:, 0, 0], w)),
        (ValueError, r"z: expected \[B, k, ...\], k at least 1, got \[2, 0, 4\]", (z[:, :0], w[:, :0])),
        (ValueError, r"weights: expected one per entry, \[2, 3\], got \[2, 2\]", (z, w[:, 1:])),
        (ValueError, r"valid: expected one per entry, \[2, 3\], got \[2\]", (z, w, w[:, 0] > 0)),
    ):
        with pytest.raises(error, match=message):
            combine(*args)
