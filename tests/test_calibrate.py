"""The scripts behind the constants still time what they say."""

from __future__ import annotations

import pytest

from bench import calibrate_routing, calibrate_thresholds, selection_kinds
from bench.harness import least
from tests.helpers.backends import needs_native


@needs_native
def test_both_products_of_a_routing_pass_give_the_same_gradients() -> None:
    own, library = ([g.shape for g in made() if g.numel()] for made in calibrate_routing._passes(4, 8, 64))  # type: ignore[attr-defined]
    assert [*own, (4,)] == library and len(own) > 10  # the passes make prior's, too


def test_each_threshold_has_two_ways() -> None:
    """And is as it was afterwards."""
    for threshold in calibrate_thresholds.THRESHOLDS:
        if "_FEWEST" in threshold.constant:  # compiles
            continue
        size = threshold.sizes()[0]
        assert min(calibrate_thresholds.timed(threshold, size, 0)) > 0


@pytest.mark.parametrize("kind", ["Linear", "GroupNorm"])
def test_a_row_of_a_kind(kind: str) -> None:
    assert selection_kinds.row(kind, 5, 3, 0).startswith(f"| {kind} | 5 | 3 | ")


def test_steps_take_turns() -> None:
    """One round that is not timed, then as many as there have to be, each within what it was given."""
    ran: list[str] = []
    times = least([lambda: ran.append("a"), lambda: ran.append("b")], rounds=2)
    assert ran == ["a", "b"] * 3 and len(times) == 2
