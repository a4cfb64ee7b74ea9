"""Every kernel of ``policy`` and ``agent_policy`` compiled for three architectures, in the blocks of known shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest

from tests import aot


class Case(NamedTuple):
    """Rows, agents, features in, choices and outputs of the critic; which kind and type."""

    N: int
    A: int
    F: int
    K: int
    C: int
    kind: int
    dtype: str
    tables: bool = False
    planned: bool = True
    all_forms: bool = True  #: also forced choices, and fewer gradients


CASES = {
    "routed": Case(1024, 20, 128, 20, 1, 0, "float32", all_forms=False),
    "wide-bf16": Case(65536, 4, 1024, 100, 100, 0, "bfloat16"),
    "most-choices-fp16": Case(4096, 8, 512, 256, 256, 2, "float16"),
    "tables": Case(1024, 20, 1, 20, 20, 2, "float32", tables=True),
    "one-agent-values": Case(4096, 1, 64, 10, 1, 1, "float32", planned=False),
}


KERNELS = {"forward_kernel", "backward_kernel", "agent_forward_kernel", "agent_parameters_kernel", "agent_input_kernel"}


def launches(case: Case) -> Iterator[Any]:
    """Of a draw with a coin (or a forced choice), and of every gradient."""
    import torch

    from fastroute.kernels import agent_policy, policy

    N, A, F, K, C = case[:5]
    dtype = getattr(torch, case.dtype)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sums, whole = torch.float32, torch.int64
    uniform, coin, actions = empty(N, K, dtype=sums), empty(N, dtype=sums), empty(N, dtype=whole)
    scores = empty(N, K)
    choices = ((uniform, coin, None), (None, None, actions))[: 1 + case.all_forms]
    for choice in choices:
        yield from aot.record(lambda choice=choice: policy.forward(scores, *choice, case.kind, 0.7, 0.3))
    yield from aot.record(lambda: policy.backward(coin, scores, actions, case.kind, 0.7))
    order, offsets = (empty(N, dtype=whole), empty(A + 1, dtype=whole)) if case.planned else (None, None)
    x = None if case.tables else empty(N, F)
    weight, critic_weight = (None, None) if case.tables else (empty(A, K, F), empty(A, C, F))
    nets = weight, empty(A, K), critic_weight, empty(A, C)
    has_mean = C == K and case.kind != 1
    for choice in choices:
        given = x, order, offsets, *nets, *choice, case.kind, 0.7, 0.3, has_mean, "ieee"
        yield from aot.record(lambda given=given: agent_policy.forward(*given))
    grads = coin, scores, empty(N, C), coin
    rest = A, C, case.kind, 0.7, True, (not case.tables, True, not case.tables, True), "ieee"
    for only in (grads, (coin, None, None, coin))[: 1 + case.all_forms]:
        given = *only, scores, actions, x, order, offsets, weight, critic_weight, *rest
        yield from aot.record(lambda given=given: agent_policy.backward(*given))


def check(name: str, found: list[aot.Report]) -> None:
    assert {r.kernel for r in found} == KERNELS - ({"agent_input_kernel"} if "tables" in name else set())
    for r in found:
        fits(r)


def fits(r: aot.Report) -> None:
    """Shared memory is within every architecture's limit.

    Nothing spills on sm_90 but the widest tiles; what those, and others elsewhere, spill stays in first-level cache.
    """
    assert r.shared <= aot.SHARED_LIMIT[r.arch], r
    assert r.stack <= aot.SPARE if r.arch == 90 and CASES[r.case].K <= 128 else aot.spills_stay_near(r), r
    if r.kernel.startswith("agent") and "16" in r.case:
        assert r.tensor_ops, r


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_fits(name: str) -> None:
    check(name, aot.reports(name, partial(launches, CASES[name])))
