"""Data parallel and sharded: two processes train every layer to the weights of one."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.matrix import cell, tried
from tests.helpers.subprocesses import ran


@cache
def failed() -> dict[str, dict[str, str]]:
    """By column and layer; the processes try all of them, once. Of no layer: that a process did not end well."""
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"fastroute-sharded-{os.getpid()}"
    command = [sys.executable, "-m", "tests.helpers.sharded"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found: dict[str, dict[str, str]] = {"DDP": {}, "FSDP2": {}}
    try:
        with ThreadPoolExecutor(2) as pool:
            pair = list(pool.map(lambda rank: ran([*command, str(rank), str(file)], 300, env), range(2)))
    finally:
        file.unlink(missing_ok=True)
    for done in pair:
        if done.returncode != 0:
            return {column: {"": done.stderr[-4000:]} for column in found}
        for column, errors in json.loads(done.stdout.splitlines()[-1]).items():
            found[column].update(errors)
    return found


@pytest.mark.long
@pytest.mark.parametrize("column", ["DDP", "FSDP2"])
def test_two_processes(column: str) -> None:
    def run(name: str) -> None:
        error = failed()[column].get(name)
        if error is not None:
            raise AssertionError(error)

    assert "" not in failed()[column], failed()[column][""]
    wrong = {}
    for name in tried(column):
        try:
            cell(name, column, lambda name=name: run(name))  # type: ignore[misc]
        except (AssertionError, pytest.fail.Exception) as error:
            wrong[name] = str(error)
    assert not wrong
