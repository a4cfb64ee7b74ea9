"""Programs in the manner of the upstreams' users: the same numbers by ``fastroute run`` and on the upstreams' formulas.

Each file of ``programs`` is run twice in float64, unchanged: by ``fastroute run``, and as plain Python on the layers of
``oracle.py``. What it leaves in ``result`` (losses, gradients, final weights) has to be the same.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastroute import compat
from fastroute.cli import main
from tests.compat.oracle import upstreams

PROGRAMS = sorted(path for path in (Path(__file__).parent / "programs").iterdir() if path.suffix in (".py", ".ipynb"))


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """float64, and nothing that a program leaves behind."""
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    for name in ("argv", "path", "meta_path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    states = random.getstate(), np.random.get_state()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    random.setstate(states[0])
    np.random.set_state(states[1])
    for name in [name for name in sys.modules if name.split(".")[0] in compat.UPSTREAMS]:
        del sys.modules[name]


def on_upstreams(path: Path, folder: Path) -> Any:
    """What a program leaves on the layers written out."""
    if path.suffix == ".ipynb":
        cells = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        text = "".join("".join(line for line in cell if line[0] != "%") + "\n" for cell in cells)
        path = folder / f"{path.stem}.py"
        path.write_text(text)
    with upstreams():
        return runpy.run_path(str(path), run_name="__main__")["result"]


def assert_same(found: Any, expected: Any, where: str) -> None:
    """Numbers to rounding, everything else exactly."""
    if isinstance(expected, dict):
        found, expected = list(found.items()), list(expected.items())
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(expected, (torch.Tensor, float)):
        torch.testing.assert_close(found, expected, msg=lambda said: f"{where}: {said}")
    else:
        assert found == expected, where


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_program(path: Path, tmp_path: Path) -> None:
    expected = on_upstreams(path, tmp_path)
    assert main(["run", str(path)]) == 0
    found = sys.modules["__main__"].result  # type: ignore[attr-defined]
    assert found.keys() == expected.keys()
    assert_same(found, expected, path.stem)


def test_there_are_thirty_of_them() -> None:
    families = [path.name.split("_")[0] for path in PROGRAMS]
    assert len(PROGRAMS) >= 30 and min(map(families.count, ("capsules", "tasks", "mtl", "routed"))) >= 5
