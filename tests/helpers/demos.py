"""Demos as a test runs them."""

from __future__ import annotations

import re

import pytest

from fastroute.cli import main


def run_demo(capsys: pytest.CaptureFixture[str], name: str | None, *argv: str) -> tuple[int, float, str]:
    """``fastroute demo [name]``, on a CPU unless argv says another: exit status, accuracy, what it printed."""
    status = main(["demo", *([name] if name else []), "--device", "cpu", *argv])
    said = capsys.readouterr().out
    found = re.search(r"held-out accuracy: ([0-9.]+)", said)
    assert found is not None, said
    return status, float(found[1]), said
