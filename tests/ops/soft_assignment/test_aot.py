"""The kernels of ``soft_assignment`` compiled for three architectures: own and shared votes, both kinds of betas."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest

from tests import aot


class Case(NamedTuple):
    """A call, by the sizes and the names of what there is."""

    B: int
    n: int
    m: int
    h: int
    dtype: str = "float32"
    shared: str = ""  # axes of votes that are: of "bm"
    betas: str = ""  # "shared", "own" or none
    padded: bool = False
    first: bool = False


CASES = {
    "routing": Case(4, 1000, 10, 256, betas="shared"),
    "any length": Case(4, 1000, 10, 64, "bfloat16", betas="own", padded=True),
    "first": Case(4, 1000, 10, 64, betas="shared", padded=True, first=True),
    "memory": Case(8, 512, 32, 64, shared="b", betas="shared"),
    "slots": Case(16, 4096, 11, 64, shared="m", padded=True),
    "slots bf16": Case(16, 4096, 7, 64, "bfloat16", shared="m"),
    "wide": Case(2, 512, 500, 96),
    "wide gradients": Case(4, 1000, 512, 8, betas="shared", padded=True),
    "many slots": Case(2, 512, 64, 96, shared="m"),
    "wide slots": Case(2, 512, 500, 96, shared="m"),
}


KERNELS = {"forward_kernel", "backward_kernel", "votes_kernel"}


def launches(case: Case) -> Iterator[Any]:
    import torch

    from fastroute.kernels import soft_assignment
    from fastroute.ops.soft_assignment.contract import Grads, Pairs

    B, n, m, h = case[:4]
    dtype = getattr(torch, case.dtype)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    votes = empty(1 if "b" in case.shared else B, n, 1 if "m" in case.shared else m, h, dtype=dtype)
    scores = None if case.first else empty(B, n, m, dtype=dtype)
    gate = None if case.shared == "m" else empty(B, n)
    betas = [empty(B if case.betas == "own" else 1, n, m) if case.betas else None for _ in range(2)]
    pairs = Pairs(
        scores, gate, *betas, empty(m) if case.first else None,
        empty(B, n, m, dtype=torch.bool) if case.padded else None,
        empty(B, dtype=torch.int64) if case.padded else None, 1e-8 if case.shared == "m" else 0.0,
    )  # fmt: skip
    yield from aot.record(lambda: soft_assignment.forward(votes, pairs))
    grads = Grads(*(None if t is None else torch.empty_like(t) for t in (votes, scores, gate, *betas)))
    yield from aot.record(lambda: soft_assignment.backward(votes, pairs, empty(B, m, h), empty(B, m), grads))


def check(found: list[aot.Report]) -> None:
    assert {r.kernel for r in found} == KERNELS
    for r in found:
        fits(r)


def fits(r: aot.Report) -> None:
    """Shared memory is within every limit; on sm_90 four registers spill at most, elsewhere what the cache holds."""
    assert r.shared <= aot.SHARED_LIMIT[r.arch], r
    # four registers: of which kernel differs between Triton 3.6 and 3.9
    assert r.stack <= 16 if r.arch == 90 else aot.spills_stay_near(r), r


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_fits(name: str) -> None:
    check(aot.reports(name, partial(launches, CASES[name])))
