"""The site builds without a warning, and fetches nothing from elsewhere when it is viewed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastroute

ROOT = Path(fastroute.__file__).resolve().parents[1]
#: What a browser fetches by itself; links that a reader follows are something else.
FETCHED = re.compile(
    r"""(?:<(?:script|img|link|iframe|source|video)\b[^>]*?(?:src|href)=|@import |url\()["']?https?://"""
)


@pytest.mark.long
def test_it_builds_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    for path in (*pages, *(tmp_path / "site").rglob("*.css")):
        text = path.read_text()
        assert not FETCHED.search(text), f"{path.name}: {FETCHED.search(text)}"
        assert "<mi>&</mi>" not in text and "<merror" not in text, f"{path.name}: an equation was not understood"
    code = re.sub("<[^>]*>", "", (tmp_path / "site" / "gallery.html").read_text())
    assert "plots.routing_over_time(seen" in code and "gallery.py:" not in code, "a snippet was not put in"
    equations = (tmp_path / "site" / "api" / "capsules.html").read_text()
    assert equations.count("<math") >= 5 and ".. math::" not in equations and ":class:" not in equations
