"""The code in docs/multitask_weighting.md runs, and so does the hand-off to TorchJD, with it or without."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastroute
from fastroute.multitask import weighting
from tests.helpers import seeds

ROOT = Path(fastroute.__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "multitask_weighting.md"


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space: dict[str, Any] = {}
    seeds.manual_seed(0)
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), space)
    assert len(blocks) == 2 and all(p.isfinite().all() for p in space["model"].parameters())
    assert re.fullmatch(r"[+-]\d+\.\d%\n", capsys.readouterr().out)
    loss, _ = fastroute.task_losses({"a": torch.ones(3, 1)}, {"a": torch.zeros(3, 1)}, {"a": space["Relative"]()})
    assert loss["a"] == 1


def test_the_page_names_every_weighting() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    known = {name: kind.__name__ for name, kind in weighting.WEIGHTINGS.items()}
    assert rows == known, f"{PAGE.name} has a row | `name` | `Class` | … for each of WEIGHTINGS"


@pytest.mark.parametrize("installed", [True, False])
def test_gradient_methods(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    spec = importlib.util.spec_from_file_location("gradient_methods", ROOT / "examples" / "gradient_methods.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    if not installed:
        monkeypatch.setattr(example, "find_spec", lambda name: None)
    with torch.random.fork_rng(devices=[]):
        assert example.main(["--steps", "20"]) == 0
    out = capsys.readouterr().out
    assert ("TorchJD is not installed" in out) is not installed
    rows = [line for line in out.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    assert len(rows) == 1 + installed
    assert out.count("Cosine") == 3
