"""README and docs: every Python snippet runs, every link leads somewhere, every page and every public name is found."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastroute
from tests.helpers import seeds
from tests.test_docstrings import FACES, PUBLIC

ROOT = Path(fastroute.__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "GPU.md"])
#: Pages whose snippets take seconds: exports, Inductor, the import of transformers. Other tests try the same.
LONG = {"docs/export.md", "docs/mixtures.md", "docs/monitor.md"}
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(autouse=True)
def _as_it_was(imports_as_before: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Pages install upstreams' names, set seeds, and write pictures where they run."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        yield


WITH_SNIPPETS = [
    pytest.param(page, id=named(page), marks=[pytest.mark.long] if named(page) in LONG else [])
    for page in PAGES
    if SNIPPET.search(page.read_text())
]


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_the_snippets_run(page: Path) -> None:
    """In the order of the page, in one namespace, with nothing given."""
    for needed in ("matplotlib", "sklearn"):
        pytest.importorskip(needed)
    text = page.read_text()
    space: dict[str, Any] = {"__name__": "__main__"}
    seeds.fixed_seed(0)
    for block in SNIPPET.finditer(text):
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], named(page), "exec"), space)


def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them of headings."""
    found = set()
    for heading in re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", page.read_text())):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        plain = unicodedata.normalize("NFC", plain)
        found.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"(?ms)^```.*?^```|`[^`\n]+`", "", page.read_text())  # code has no links
    for shown, target in re.findall(r"\[([^\]\n]*)\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), f"{target}: expected https"
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists() and found.is_relative_to(ROOT), f"[{shown}]({target})"
        assert not anchor or anchor in anchors(found), f"[{shown}]({target}): {sorted(anchors(found))}"


def test_every_page_is_in_the_navigation() -> None:
    nav = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    elsewhere = set(re.findall(r'"([\w/]+\.md)": "', (ROOT / "docs" / "build_hooks.py").read_text()))
    there = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert nav == there | elsewhere


def test_every_public_name_is_in_the_api_reference() -> None:
    pages = (ROOT / "docs" / "api").glob("*.md")
    listed = [name for page in pages for name in re.findall(r"(?m)^::: (\S+)", page.read_text())]
    assert len(set(listed)) == len(listed)
    found = {id(_thing(name)) for name in listed}
    modules = {*FACES, "fastroute.ops"}
    missing = [name for name, thing in PUBLIC.items() if name not in modules and id(thing) not in found]
    assert not missing


def _thing(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    __import__(module)
    return getattr(sys.modules[module], attribute)


@pytest.mark.parametrize("page", ["heinsen_routing", "pytorch_routing", "taskrouting", "torchmtl"])
def test_a_migration_page_says_what_it_has_to(page: str) -> None:
    text = (ROOT / "docs" / "migration" / f"{page}.md").read_text()
    assert "## What stays" in text and "## What changes" in text and "## Random draws" in text


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
