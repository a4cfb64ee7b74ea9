"""The code in docs/multitask.md runs, and raises what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastroute
from fastroute.multitask import MTLModel

PAGE = Path(fastroute.__file__).resolve().parents[1] / "docs" / "multitask.md"


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), space)
    assert len(blocks) == 3
    assert [y.shape for y in space["outputs"]] == [(32, 1)] and "tensor(" in capsys.readouterr().out
    assert list(space["each"]) == ["price", "sold"] and torch.isfinite(space["total"])


def test_the_errors_are_as_shown() -> None:
    shown = re.findall(r"^task_layers.*$", PAGE.read_text(), re.MULTILINE)
    misspelt = [{"name": n, "layers": nn.Identity()} for n in ("left", "right", "both")]
    circle = [{"name": a, "layers": nn.Identity(), "anchor_layer": b} for a, b in ("ab", "ba")]
    for nodes in ([*misspelt, {"name": "price", "layers": nn.Identity(), "anchor_layer": "lft"}], circle):
        with pytest.raises(ValueError) as caught:
            MTLModel(nodes, [nodes[-1]["name"]])
        assert str(caught.value) in shown
