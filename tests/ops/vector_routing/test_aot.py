"""Every kernel of ``vector_routing`` compiled for three architectures in the blocks its plan picks for known shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

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
    narrow: bool = False  #: the first pass leaves x in half its bytes; forward passes alone


CASES = {
    "million-tf32": Case(1, 1_000_000, 100, 1024, "float32", "tf32"),
    "million-narrow": Case(1, 1_000_000, 100, 1024, "float32", "tf32", narrow=True),
    "wide-bf16": Case(4, 2000, 1000, 1024, "bfloat16"),
    "head-bf16": Case(50, 4925, 64, 1024, "bfloat16", linear=True),
    "one-pass-bf16": Case(1, 500, 250, 256, "bfloat16", linear=True),
    "small-ieee": Case(4, 100, 10, 256, "float32", masked=True),
}

KERNELS = {"forward_kernel", "aggregate_kernel", "score_kernel", "backward_kernel", "spread_kernel"}


def launches(case: Case) -> Iterator[Any]:
    """The launches of two iterations, forward and backward, parameters in float32."""
    import torch

    from fastroute.kernels.vector_routing import launch as vector_routing
    from fastroute.ops.vector_routing.contract import Grads, Passes, Step

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    B, n, m, d = case[:4]
    rows = 1 if case.linear else n
    betas = (m, d) if case.linear else (n, m)
    x = empty(B, n, d, dtype=getattr(torch, case.dtype))
    shared = (
        empty(*betas), empty(*betas), *((empty(m), empty(m)) if case.linear else (None,) * 2),
    )  # fmt: skip
    mask = empty(n, m, dtype=torch.bool).expand(B, n, m) if case.masked else None
    rest = mask, empty(B, dtype=torch.int64) if case.masked else None, case.precision
    first = Step(x, None, empty(rows, d), empty(rows), empty(B), None, None, None, *shared, empty(m), *rest)
    scores = empty(rows, m), empty(rows, m)
    after = Step(x, empty(B, n), None, None, None, empty(B, m, d), *scores, *shared, None, *rest)
    if case.narrow:
        passes = Passes(1)
        with mock.patch.object(vector_routing, "force_narrow", True):
            for step in (first, after):
                yield from aot.record(lambda step=step: vector_routing.forward(step._replace(passes=passes)))
        return
    for step in (first, after):
        yield from aot.record(lambda step=step: vector_routing.forward(step))
    first = first._replace(gate=empty(B, n))
    parameters = ("gate_weight", "gate_bias", "score_weight", "score_bias", "use", "ign", "use_bias", "ign_bias")
    found = {
        name: next((t for s in (first, after) if (t := getattr(s, name)) is not None), None) for name in parameters
    }
    like = {name: None if t is None else torch.empty_like(t) for name, t in found.items()}
    grads = Grads(True, empty(B, n), torch.empty_like(x), **like, to_come=1)
    yield from aot.record(lambda: vector_routing.backward(after, empty(B, m, d), empty(B, m), grads))
    grads.fresh, grads.to_come = False, 0
    yield from aot.record(lambda: vector_routing.backward(first, empty(B, m, d), empty(B, m), grads))


def check(name: str, found: list[aot.Report]) -> None:
    backward = {"backward_kernel", "spread_kernel"} if "narrow" not in name else {"score_kernel"}
    assert {r.kernel for r in found} >= {"forward_kernel", "aggregate_kernel", *backward}
    for r in found:
        fits(r)
    if ("tf32" in name or "narrow" in name) and any(r.arch == 90 for r in found):
        assert any(r.kernel == "aggregate_kernel" and set(r.copies) == {"16"} for r in found if r.arch == 90)


def fits(r: aot.Report) -> None:
    """Shared memory is within every architecture's limit, registers suffice, and products are on tensor cores.

    Nothing spills on sm_90. On sm_80 and sm_100 what the widest tiles spill stays in first-level cache.
    """
    assert r.shared <= aot.SHARED_LIMIT[r.arch], r
    assert r.stack == 0 if r.arch == 90 else aot.spills_stay_near(r), r
    if r.kernel in ("aggregate_kernel", "spread_kernel", "score_kernel") and "ieee" not in r.case:
        assert r.tensor_ops, r
        # in the backward pass coefficients lie as they do; float16 that becomes TF32 on its way is copied by 8
        other = "tf32" in r.case and r.kernel == "aggregate_kernel"
        by_8 = "narrow" in r.case and r.kernel == "score_kernel" and set(r.copies) == {"16", "8"}
        assert r.copies and (set(r.copies) == {"16"} or other or by_8), r


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_fits(name: str) -> None:
    check(name, aot.reports(name, partial(launches, CASES[name])))


@pytest.mark.long
@pytest.mark.parametrize("name", ["million-tf32", "million-narrow", "wide-bf16", "one-pass-bf16"])
def test_fits_where_shared_memory_is_small(name: str) -> None:
    check(name, aot.reports(name, partial(launches, CASES[name]), 86))
