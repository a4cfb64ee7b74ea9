"""Every kernel of ``vector_routing`` compiled for three architectures in the blocks its plan picks for known shapes."""

from __future__ import annotations

import sys
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
    d: int
    dtype: str
    precision: str = "ieee"
    linear: bool = False
    masked: bool = False  #: with a mask, and lengths


CASES = {
    "million-tf32": Case(1, 1_000_000, 100, 1024, "float32", "tf32"),
    "wide-bf16": Case(4, 2000, 1000, 1024, "bfloat16"),
    "head-bf16": Case(50, 4925, 64, 1024, "bfloat16", linear=True),
    "one-pass-bf16": Case(1, 500, 250, 256, "bfloat16", linear=True),
    "small-ieee": Case(4, 100, 10, 256, "float32", masked=True),
}


def launches(case: Case, first: bool) -> Iterator[Any]:
    """The launches of one iteration, forward and backward, parameters in float32."""
    import torch

    from fastroute.kernels import vector_routing
    from fastroute.reference.step import Grads, Step

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    B, n, m, d = case[:4]
    rows = 1 if case.linear else n
    betas = (m, d) if case.linear else (n, m)
    x = empty(B, n, d, dtype=getattr(torch, case.dtype))
    step = Step(
        x, None if first else empty(B, n), *((empty(rows, d), empty(rows), empty(B)) if first else (None,) * 3),
        None if first else empty(B, m, d), *((None,) * 2 if first else (empty(rows, m), empty(rows, m))),
        empty(*betas), empty(*betas), *((empty(m), empty(m)) if case.linear else (None,) * 2),
        empty(m) if first else None,
        empty(n, m, dtype=torch.bool).expand(B, n, m) if case.masked else None,
        empty(B, dtype=torch.int64) if case.masked else None,
        case.precision,
    )  # fmt: skip
    yield from aot.record(lambda: vector_routing.forward(step))
    done = step._replace(gate=empty(B, n))
    parameters = ("gate_weight", "gate_bias", "score_weight", "score_bias", "use", "ign", "use_bias", "ign_bias")
    like = {name: None if (t := getattr(done, name)) is None else torch.empty_like(t) for name in parameters}
    grads = Grads(not first, empty(B, n), torch.empty_like(x), **like)
    yield from aot.record(lambda: vector_routing.backward(done, empty(B, m, d), empty(B, m), grads))


def check(name: str, found: list[aot.Report]) -> None:
    """Shared memory is within every architecture's limit, registers suffice, and products are on tensor cores.

    Nothing spills on sm_90. On sm_80 and sm_100 what the widest tiles spill stays in first-level cache.
    """
    assert {r.kernel for r in found} >= {"forward_kernel", "backward_kernel", "aggregate_kernel", "spread_kernel"}
    for r in found:
        assert r.shared <= aot.SHARED_LIMIT[r.arch], r
        assert r.stack == 0 if r.arch == 90 else aot.spills_stay_near(r), r
        if r.kernel in ("aggregate_kernel", "spread_kernel", "score_kernel") and "ieee" not in name:
            assert r.tensor_ops, r


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_fits(name: str) -> None:
    check(name, aot.report_of(__file__, name))


@pytest.mark.long
@pytest.mark.parametrize("name", ["million-tf32", "wide-bf16", "one-pass-bf16"])
def test_fits_where_shared_memory_is_small(name: str) -> None:
    check(name, aot.report_of(__file__, name, (86,)))


if __name__ == "__main__":
    archs = [int(a) for a in sys.argv[2:]] or list(aot.ARCHS)
    for case_name in sys.argv[1].split(","):
        for first in (True, False):
            case = partial(launches, CASES[case_name], first)
            aot.print_reports([(f"{case_name} t{int(not first)}", case)], archs)
