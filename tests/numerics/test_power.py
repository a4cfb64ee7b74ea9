"""The error budget finds faults: planted one by one, as in the table of docs/numerics.md."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.numerics.__main__ import POWER, power_of
from tests.numerics.faults import FAULTS, SUMS
from tests.numerics.problems import PROBLEMS

QUICK = ("trajectory_loss",)

#: Faults that move a result by more typical errors than this are seen whatever its own error is: 1 + 1.5 (1 + 10 sd),
#: with an sd of 0.8 of the mean.
SURE = 14.5


#: Rows of problems in which one long run is lost among other errors however many there are: it is planted in as many.
SHORT = SUMS["one long run"][1]


def sure(places: list[dict[str, float]]) -> list[dict[str, float]]:
    return [place for place in places if place["effect"] > SURE]


def assert_power(op: str) -> dict[str, Any]:
    """A problem is as long as in the table only where that makes a fault sure; what is sure there is sure here."""
    recorded = json.loads(POWER.read_text())["ops"][op]["faults"]
    faults: dict[str, Any] = power_of(op, rows=None if sure(recorded["one long run"]) else SHORT)["faults"]
    assert [fault for fault in recorded if sure(recorded[fault])] == [fault for fault in faults if sure(faults[fault])]
    for fault, places in faults.items():
        missed = [place for place in sure(places) if not place["new"] > 1]
        assert not missed, f"{fault}: not seen in {len(missed)} of {len(places)} places: {missed}"
    return faults


@pytest.mark.parametrize("op", QUICK)
def test_planted_faults_are_seen(op: str) -> None:
    faults = assert_power(op)
    assert set(faults) == set(FAULTS) and any(faults.values())


@pytest.mark.long
@pytest.mark.parametrize("op", [op for op in PROBLEMS if op not in QUICK])
def test_planted_faults_are_seen_in_every_op(op: str) -> None:
    assert_power(op)
