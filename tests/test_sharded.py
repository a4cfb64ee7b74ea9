"""Data parallel and sharded: two processes train every layer to the weights of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.matrix import cell, tried
from tests.helpers.subprocesses import ROOT


@cache
def failed() -> dict[str, dict[str, str]]:
    """By column and layer; the processes try all of them, once."""
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"fastroute-sharded-{os.getpid()}"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.sharded", str(rank), str(file)],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    found: dict[str, dict[str, str]] = {"DDP": {}, "FSDP2": {}}
    try:
        for process in pair:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-4000:]
            for column, errors in json.loads(out.splitlines()[-1]).items():
                found[column].update(errors)
    finally:
        for process in pair:
            process.kill()
        file.unlink(missing_ok=True)
    return found


@pytest.mark.long
@pytest.mark.parametrize("column", ["DDP", "FSDP2"])
def test_two_processes(column: str) -> None:
    def run(name: str) -> None:
        error = failed()[column].get(name)
        if error is not None:
            raise AssertionError(error)

    wrong = {}
    for name in tried(column):
        try:
            cell(name, column, lambda name=name: run(name))  # type: ignore[misc]
        except (AssertionError, pytest.fail.Exception) as error:
            wrong[name] = str(error)
    assert not wrong
