"""``dispatch`` on every backend: the plan against its definition.

Axes: B samples, k modules that each takes, N = B k entries, K modules.
"""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastroute import use_backend
from fastroute.ops import dispatch
from fastroute.ops.dispatch import reference as reference
from tests.helpers import seeds
from tests.helpers.backends import each_backend, needs_native
from tests.helpers.dispatch_cases import HISTOGRAMS, actions_of
from tests.helpers.opcheck import opcheck


def defined(actions: Tensor, K: int) -> tuple[list[int], list[int], int]:
    """The plan, from its definition."""
    found = [k if 0 <= k < K else K for k in actions.tolist()]
    order = sorted(range(len(found)), key=lambda b: (found[b], b))
    offsets = [sum(a < k for a in found) for k in range(K + 1)]
    return order, offsets, sum(a >= K for a in actions.tolist())


def raw_plan(backend: str, actions: Tensor, K: int) -> dispatch.Plan:
    """Without the check that raises for actions out of range."""
    if backend == "native":
        return dispatch.Plan(*torch.ops.fastroute._dispatch_plan_native(actions, K))
    return reference.plan(actions, K)


# ---------------------------------------------------------------------------------------------------------- plans


@each_backend
@hypothesis.given(data=st.data())
def test_plans(backend: str, data: st.DataObject) -> None:
    K = data.draw(st.one_of(st.integers(1, 6), st.sampled_from([63, 64, 65, 1000])))
    span = data.draw(st.sampled_from([(0, K - 1), (-2, K - 1), (-2, K + 2), (K - 1, K - 1), (-1, -1)]))
    actions = torch.tensor(data.draw(st.lists(st.integers(*span), max_size=70)), dtype=torch.int64)
    made = raw_plan(backend, actions, K)
    order, offsets, beyond = defined(actions, K)
    assert made.order.tolist() == order and made.offsets.tolist() == offsets and made.beyond.tolist() == [beyond]
    assert all(t.dtype == torch.int64 and t.is_contiguous() for t in made[:3])
    with use_backend(backend):
        if beyond:
            with pytest.raises(IndexError, match=rf"^agents: .*below {K}, got {beyond} of {len(actions)} out of range"):
                dispatch.plan(actions, K, "agents")
        else:
            planned = dispatch.plan(actions, K)
            assert all(map(torch.equal, planned[:3], made[:3])) and planned.bounds == offsets


@each_backend
@pytest.mark.parametrize("extreme", [torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max])
def test_plans_of_extreme_actions(backend: str, extreme: int) -> None:
    actions = torch.tensor([1, extreme, 0])
    made = raw_plan(backend, actions, 2)
    assert made.order.tolist() == [2, 0, 1] and made.offsets.tolist() == [0, 1, 2] and int(made.beyond) == (extreme > 0)


@each_backend
def test_plans_of_strided_actions(backend: str) -> None:
    actions = actions_of(HISTOGRAMS["uneven"])
    apart = torch.stack([actions, torch.full_like(actions, 3)], 1)[:, 0]
    with use_backend(backend):
        assert all(map(torch.equal, dispatch.plan(apart, 5)[:3], dispatch.plan(actions, 5)[:3]))


def test_actions_as_users_give_them() -> None:
    row = torch.tensor([1, 0])
    for given in (row[:, None], row.int(), row.byte(), [1, 0], row.numpy()):
        made = dispatch.as_actions(given, 2, torch.device("cpu"))
        assert made.dtype == torch.int64 and made.tolist() == [1, 0]
    for given, error in (
        (torch.tensor([1.0, 0.0]), TypeError),
        (torch.tensor([True, False]), TypeError),
        (["1", "0"], TypeError),
        ([1.0, 0.0], TypeError),
        (None, TypeError),
        (torch.tensor([1, 0, 1]), ValueError),
        (torch.tensor([[1, 0], [0, 1]]), ValueError),
    ):
        with pytest.raises(error, match=r"^agents: "):
            dispatch.as_actions(given, 2, torch.device("cpu"), "agents")


@each_backend
@pytest.mark.parametrize("k", [1, 2, 5])
def test_plans_of_several_modules_a_sample(backend: str, k: int) -> None:
    """Entries are those of the flattened actions; a sample may name a module twice, or none."""
    actions = torch.randint(-1, 4, (17, k), generator=seeds.generator(0))
    with use_backend(backend):
        made, flat = dispatch.plan(actions, 4), dispatch.plan(actions.reshape(-1), 4)
    assert all(map(torch.equal, made[:3], flat[:3])) and made.bounds == flat.bounds and made.per_sample == k
    assert (made.samples is None) == (k == 1)
    assert made.samples is None or made.samples.tolist() == [n // k for n in made.order.tolist()]


@pytest.mark.parametrize("shape", [(), (2, 2, 2)])
def test_plans_of_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^agents: expected \[B\] or \[B, k\], got \["):
        dispatch.plan(torch.zeros(shape, dtype=torch.int64), 3, "agents")


@needs_native
def test_opcheck_of_plans() -> None:
    for actions in (torch.tensor([2, -1, 0, 7]), torch.empty(0, dtype=torch.int64)):
        opcheck(torch.ops.fastroute._dispatch_plan_native.default, (actions, 3))
