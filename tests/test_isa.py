"""``make test-isa``: what it runs, and how it ends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tests import isa
from tests.conftest import _dealt


def test_the_covering_set_has_every_instruction_set_and_every_number_of_threads() -> None:
    assert isa.combinations(list(isa.SETTINGS), full=False) == [("default", 1), ("avx2", 2), ("avx512", 3)]
    assert isa.combinations(["default", "avx2"], full=False) == [("default", 1), ("avx2", 2), ("avx2", 3)]
    assert isa.combinations(["default"], full=False) == [("default", 1), ("default", 2), ("default", 3)]
    assert len(isa.combinations(list(isa.SETTINGS), full=True)) == 9


@pytest.mark.parametrize("best", range(len(isa.SETTINGS)))
def test_with_what_make_test_has_all_are_covered(best: int) -> None:
    isas = list(isa.SETTINGS)[: best + 1]
    runs = isa.combinations(isas, after_test=True)
    assert len(runs) == 2 and (isas[-1], 1) not in runs
    assert {name for name, _ in runs} | {isas[-1]} == set(isas)
    assert {n for _, n in runs} | {1} == set(isa.THREADS)
    given = [(name, *(share or ["whole"])) for (name, _), share in zip(runs, isa.shares(runs), strict=True)]
    every = [(name, "whole") for name in isas[:-1]] if best > 1 else [(isas[0], f"--share={k}/2") for k in range(2)]
    assert given == every


def test_every_case_is_dealt_to_one_share_and_some_of_every_test_to_each() -> None:
    def item(**given: object) -> Any:
        return SimpleNamespace(nodeid=f"test_sizes{list(given.values())}", callspec=SimpleNamespace(params=given))

    alone = SimpleNamespace(nodeid="test_alone")
    cases = [[item(size=size, backend=backend) for backend in ("native", "reference")] for size in (3, 4, 5)]
    items = [*itertools.chain(*cases), alone]
    assert list(_dealt(items, 0, 2)) == [*cases[0], *cases[2]]
    assert list(_dealt(items, 1, 2)) == [*cases[1], alone]
    assert list(_dealt(items, 0, 1)) == items


def test_files_that_compare_numbers_are_named_and_no_others() -> None:
    names = {str(path.relative_to(isa.ROOT / "tests")) for path in isa.numeric_files()}
    assert {"ops/policy/test_op.py", "capsules/test_vector.py", "networks/test_golden_trajectories.py"} <= names
    assert not names & {"ops/test_isa.py", "ops/policy/test_kernels.py", "test_isa.py", "test_onnx.py", "test_house.py"}


def test_nothing_is_left_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in isa.CHOSEN:
        monkeypatch.setenv(name, "outside")
    monkeypatch.setenv("FASTROUTE_TEST_SEED", "7")
    env = isa.environment("avx512", 3)
    assert "ONEDNN_MAX_CPU_ISA" not in env and "outside" not in env.values()
    assert env["FASTROUTE_ISA"] == "avx512" and env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "3"
    assert env["FASTROUTE_TEST_SEED"] == "7"


@pytest.mark.parametrize("best", ["default", "avx2", "avx512"])
def test_it_goes_on_after_a_failure(
    best: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def run(name: str, threads: int, arguments: Sequence[str]) -> bool:
        tried.append((name, threads))
        return threads != 1

    monkeypatch.setenv("FULL", "1")
    monkeypatch.setattr(isa, "probe", lambda environment: ["2", best, best])
    monkeypatch.setattr(isa, "run", run)
    count = 1 + list(isa.SETTINGS).index(best)
    assert isa.main([]) == 1 and len(tried) == 3 * count
    assert capsys.readouterr().out.splitlines()[-1] == f"{2 * count} passed, {count} failed"


def test_settings_that_do_not_take_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(isa, "probe", lambda environment: ["2", "avx2", "none"])
    assert not isa.run("avx2", 3, [])
    assert capsys.readouterr().out == "avx2, 3 threads: not so: torch has 2, avx2, the kernels none\n"
