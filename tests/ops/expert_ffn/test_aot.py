"""The kernels of ``expert_ffn``'s hidden layer compiled for three architectures, in known sizes' blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest

from tests import aot


class Case(NamedTuple):
    """B samples with k of K experts each, D features in, H hidden ones."""

    B: int
    k: int
    K: int
    D: int
    H: int
    dtype: str
    precision: str = "ieee"
    activation: int = 4
    gated: bool = True
    weighted: bool = True


CASES = {
    "headline": Case(32768, 8, 128, 2048, 768, "bfloat16"),
    "gelu": Case(32768, 8, 128, 2048, 768, "bfloat16", activation=5),
    "plain": Case(32768, 1, 128, 2048, 768, "bfloat16", activation=1, gated=False, weighted=False),
    "tf32": Case(32768, 2, 8, 1024, 1024, "float32", "tf32"),
    "small": Case(512, 2, 20, 128, 64, "float32"),
    "odd-fp16": Case(1667, 3, 7, 77, 65, "float16", activation=6),
}


KERNELS = {"hidden_kernel", "backward_kernel"}


def launches(case: Case) -> Iterator[Any]:
    """Forward, with all gradients, and with those of w_in alone."""
    import torch

    from fastroute.kernels import expert_ffn

    own = getattr(torch, case.dtype)

    def empty(*shape: int, dtype: torch.dtype = own) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    B, k, K, D, H = case[:5]
    N, OUT = B * k, H * (1 + case.gated)
    order, offsets = empty(N, dtype=torch.int64), empty(K + 1, dtype=torch.int64)
    weights = empty(B, k, dtype=torch.float32) if case.weighted else None
    x, w_in, u, t = empty(B, D), empty(K, OUT, D), empty(N, OUT), empty(N, H)
    of_entries, options = (order, offsets, weights), (case.activation, case.gated)
    for want_h, want_u in ((True, False), (True, True), (False, True)):
        wants = {"want_h": want_h, "want_u": want_u}
        yield from aot.record(
            lambda wants=wants: expert_ffn.hidden(x, *of_entries, w_in, k, *options, case.precision, **wants)
        )
    for want_weights in {case.weighted, False}:
        yield from aot.record(
            lambda want=want_weights: expert_ffn.backward(t, u, *of_entries, *options, want_weights=want)
        )


def check(found: list[aot.Report]) -> None:
    assert {r.kernel for r in found} == KERNELS
    for r in found:
        fits(r)


def fits(r: aot.Report) -> None:
    """Within shared memory; products on tensor cores where they can be; on sm_90 nothing spills.

    But for GELU of the largest tiles where u is written, too: after the loop, into first-level cache.
    """
    case = CASES[r.case]
    assert r.shared <= aot.SHARED_LIMIT[r.arch], r
    assert aot.spills_stay_near(r), r
    if r.arch == 90 and not (r.kernel == "hidden_kernel" and r.case == "gelu"):
        assert r.stack <= aot.SPARE, r
    cores = case.dtype != "float32" or case.precision == "tf32"
    assert bool(r.tensor_ops) == (cores and r.kernel == "hidden_kernel"), r
    if r.tensor_ops and r.arch == 90:
        assert set(r.tensor_ops) == {"wgmma"}, r
    if r.arch == 90 and r.case not in ("small", "odd-fp16"):
        assert set(r.copies) == ({"16"} if r.kernel == "hidden_kernel" else set()), r
        assert r.stores["16"] == max(r.stores.values()), r


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_fits(name: str) -> None:
    check(aot.reports(name, partial(launches, CASES[name])))
