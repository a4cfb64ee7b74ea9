"""The snippets of docs/migration run, and the pages say what they have to."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastroute import compat

PAGES = Path(compat.__file__).resolve().parents[2] / "docs" / "migration"


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in compat.UPSTREAMS]:
        del sys.modules[name]


@pytest.mark.parametrize("page", ["heinsen_routing", "pytorch_routing", "taskrouting", "torchmtl"])
def test_the_page_runs(page: str) -> None:
    text = (PAGES / f"{page}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), space)
    assert blocks and "## What stays" in text and "## What changes" in text and "## Random draws" in text
    for link in re.findall(r"\]\((\.\./[^)#]+)", text):
        assert (PAGES / link).resolve().exists(), link
