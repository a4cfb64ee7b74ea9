"""Every kernel of ``matrix_routing`` compiled for three architectures in the blocks its plan picks for known shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest

from tests import aot


class Case(NamedTuple):
    """A shape, in the words of ``plan``."""

    B: int
    n: int
    m: int
    c: int
    d: int
    h: int
    dtype: str = "float32"  #: of the parameters
    shared: bool = False
    masked: bool = False
    p_model: str = "gaussian"
    first: bool = False


CASES = {
    "own": Case(16, 4096, 64, 4, 4, 4),
    "shared": Case(4, 4096, 64, 4, 4, 4, shared=True),
    "odd-bf16": Case(3, 100, 7, 3, 5, 9, "bfloat16", masked=True, first=True),
    "vectors-skm": Case(20, 2000, 64, 1, 64, 64, shared=True, p_model="skm"),
}


FOLDED = {"output_grads_kernel", "shared_sums_kernel"}
KERNELS = {"pairs_kernel", "assign_kernel", "moments_kernel", "merge_kernel"}
KERNELS |= {"assign_backward_kernel", "gradient_kernel"} | FOLDED


def launches(case: Case) -> Iterator[Any]:
    """The launches of one iteration, forward and backward."""
    import torch

    from fastroute.kernels.matrix_routing import launch as matrix_routing
    from fastroute.ops.matrix_routing.contract import MatrixGrads, MatrixStep, Moments, OutputGrads, Outputs

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    B, n, m, c, d, h = case[:6]
    n1 = 1 if case.shared else n
    kind = getattr(torch, case.dtype)
    shapes = [(n1, m, d, h), (n1, m, c, h), (n1, m), (n1, m)]
    outputs = [empty(B, m, c, h), empty(B, m, c, h), empty(B, m, c, h), empty(B, m), empty(B, m)]
    step = MatrixStep(
        empty(B, n), empty(B, n, c, d), *(empty(*shape, dtype=kind) for shape in shapes),
        empty(B, n, m, dtype=torch.bool) if case.masked else None,
        None if case.first else Outputs(outputs[3], *outputs[:2]), case.p_model,
    )  # fmt: skip
    yield from aot.record(lambda: matrix_routing.forward(step))
    grads = MatrixGrads(True, empty(B, n), empty(B, n, c, d), *(empty(*shape) for shape in shapes))
    yield from aot.record(lambda: matrix_routing.backward(step, OutputGrads(*outputs), grads))
    kept = Moments(outputs[3], outputs[0], outputs[1], outputs[4], outputs[2])
    before = None if case.first else kept
    yield from aot.record(lambda: matrix_routing.folded_forward(step, kept, 1e-5))[-1:]
    sums = matrix_routing.Sums(empty(9, B, m), *(empty(9, B, m, c, h) for _ in range(2)))
    for d in (Outputs(outputs[3], *outputs[:2]), sums):
        made = aot.record(lambda: matrix_routing.folded_backward(step, kept, before, d, 1e-5, grads))  # noqa: B023
        yield from (launch for launch in made if launch.kernel.__name__ in FOLDED)


def check(name: str, found: list[aot.Report]) -> None:
    assert {r.kernel for r in found} == KERNELS - (set() if CASES[name].shared else {"shared_sums_kernel"})
    for r in found:
        fits(r)


def fits(r: aot.Report) -> None:
    """Shared memory is within every architecture's limit, and tiles stay in registers.

    A word or two of a thread may wait in memory while a loop runs: 16 bytes, where a tile's number takes 4 in each.
    """
    assert r.shared <= aot.SHARED_LIMIT[r.arch], r
    assert r.stack <= (0 if r.arch == 90 and r.kernel in FOLDED | {"merge_kernel"} else 16), r


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_fits(name: str) -> None:
    check(name, aot.reports(name, partial(launches, CASES[name])))
