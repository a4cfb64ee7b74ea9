"""The kernel of ``trajectory_loss`` compiled for three architectures: every class, many decisions, masks, no slopes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest

from fastroute.ops.trajectory_loss.contract import ALGORITHMS
from tests import aot


class Case(NamedTuple):
    """A trajectory, in the words of ``forward``."""

    kinds: tuple[str, ...]
    masked: bool = False
    own: bool = False
    want_slopes: bool = True
    rewards: str = ""  #: made here: of "classes" and a table, or of the loss and what was "counted"


CASES = {
    "one": Case(("REINFORCE",)),
    "wpl": Case(("WPL",) * 3, own=True),
    "all": Case(ALGORITHMS, masked=True, own=True),
    "rewards": Case(("REINFORCE",) * 3, masked=True, own=True, rewards="classes"),
    "shares": Case(("WPL",) * 3, rewards="counted"),
    "without slopes": Case(("REINFORCEBl2", "GumbelSoftmax", "EGreedyAAC"), want_slopes=False),
}


KERNELS = {"forward_kernel"}


def launches(case: Case, B: int = 1000) -> Iterator[Any]:
    import torch

    from fastroute.kernels import trajectory_loss
    from fastroute.ops.trajectory_loss.op import laid_out

    T = len(case.kinds)
    x, mask = torch.empty(B, device="meta"), torch.empty(B, dtype=torch.bool, device="meta")
    rows = [x] * T
    args = laid_out(
        case.kinds, rows, rows, rows, rows if case.own else [None] * T, rows, [mask if case.masked else None] * T, x,
        range(2, T + 2),
    )  # fmt: skip
    rewards = None
    if case.rewards:
        actions = torch.empty(T, B, dtype=torch.int64, device="meta")
        counted = case.rewards == "counted"
        rewards = trajectory_loss.Rewards(
            0.5, None if counted else torch.empty(B, 100, device="meta"), None if counted else actions[0],
            torch.empty(63, dtype=torch.int64 if counted else torch.float32, device="meta"), actions,
            [i for t in range(T) for i in (t, 21 * t, 20)], 0.1 if counted else None, torch.empty_like(x),
        )  # fmt: skip
    yield from aot.record(lambda: trajectory_loss.forward(x, *args, 0.9, True, case.want_slopes, rewards))


def fits(r: aot.Report) -> None:
    """Numbers stay in registers, whatever there is to compute."""
    assert r.kernel == "forward_kernel" and tuple(r.grid) == (8,), r
    assert r.stack == 0 and r.shared <= (2048 if r.case == "rewards" else 0), r  # scores change lanes


@pytest.mark.long
def test_fits() -> None:
    for name, case in CASES.items():
        found = aot.reports(name, partial(launches, case))
        assert found
        for r in found:
            fits(r)
