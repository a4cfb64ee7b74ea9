"""Examples as a test runs them: imported as scripts are, on little data, leaving nothing set behind them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastroute
from fastroute import data

EXAMPLES = Path(fastroute.__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Examples import each other as scripts do, and set the process's threads and environment."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred digits."""
    digits = few(100)
    monkeypatch.setattr(data, "digits", lambda: digits)


def few(count: int) -> data.Digits:
    """So many digits."""
    return data.Digits(*(t[:count] for t in data.digits()))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def cells(text: str) -> list[list[str]]:
    """The rows of the markdown tables in a text, without their heads' rules."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
