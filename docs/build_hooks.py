"""What mkdocs does not do by itself: pages from outside of docs/, equations as MathML, docstrings as Markdown.

Equations are rendered when the site is built, so that no script and no font is fetched when it is viewed. They are
written as GitHub takes them, in fences named ``math``, and in docstrings as ``.. math::`` and ``:math:``.
"""

from __future__ import annotations

import re
import textwrap
from html import escape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
#: Pages that stand elsewhere, by their path in the site.
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "architecture.md": "ARCHITECTURE.md", "gpu.md": "bench/GPU.md"}


def mathml(latex: str, display: bool) -> str:
    latex = latex.strip().replace("{aligned}", "{split}")  # GitHub knows the former, the converter the latter
    return convert(latex, display="block" if display else "inline")


def _fence(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="equation">{mathml(source, True)}</div>'


def on_config(config: Any) -> Any:
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": _fence}]
    return config


def on_files(files: Any, config: Any) -> Any:
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=_moved((ROOT / source).read_text(), source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return _moved(markdown, f"docs/{page.file.src_uri}") if page.file.src_uri not in ELSEWHERE else markdown


def _moved(text: str, source: str) -> str:
    """The links of a page of the repository as the site has them; those to files that are no pages become code."""

    def link(match: re.Match[str]) -> str:
        shown, target, anchor = match[1], match[2], match[3] or ""
        found = ((ROOT / source).parent / target).resolve()
        if "://" in target or not found.is_relative_to(ROOT):
            return match[0]
        name = str(found.relative_to(ROOT))
        for page, origin in ELSEWHERE.items():
            if name == origin:
                name = f"docs/{page}"
        if not name.startswith("docs/"):
            return f"`{name}`"
        depth = len(Path(source).parts) - 2 if source.startswith("docs/") else 0
        return f"[{shown}]({'../' * depth}{name.removeprefix('docs/')}{anchor})"

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)#\s]+)(#[^)\s]+)?\)", link, text)


class Docstrings(griffe.Extension):
    """Docstrings are read in terminals and editors, so they are plain text with some reStructuredText: to Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown_of(obj.docstring.value)


def markdown_of(text: str) -> str:
    text = re.sub(r"(?m)^( *)\.\. math::\n+((?:\1 +.*\n?|\n)+)", _equation, text)
    text = re.sub(r":math:`([^`]+)`", lambda m: mathml(m[1], False), text)
    text = re.sub(r":(?:class|func|meth|attr|mod):`~?([^`]+)`", lambda m: f"`{m[1].removeprefix('fastroute.')}`", text)
    text = re.sub(r"(?m)^( *)=+(?:  =+)+\n((?:.*\n)+?)\1=+(?:  =+)+ *$", _table, text)
    return re.sub(r"(?m)::$", ":", text)


def _equation(match: re.Match[str]) -> str:
    body = textwrap.dedent(match[2]).strip()
    if r"\\" in body or "&" in body:
        body = rf"\begin{{aligned}}{body}\end{{aligned}}"
    return f'{match[1]}<div class="equation">{mathml(body, True)}</div>\n\n'


def _table(match: re.Match[str]) -> str:
    """A simple table of two columns, the second of which may go on in the next line."""
    rows: list[list[str]] = []
    for line in textwrap.dedent(match[2]).splitlines():
        split = re.match(r"(``[^`]+``|.+?)(?:  +|(?<=``) )(.*)", line) if not line.startswith("  ") else None
        left, right = (split[1], split[2]) if split else ("", line)
        if left:
            rows.append([left.strip(), right.strip()])
        else:
            rows[-1][1] += f" {right.strip()}"
    code = [[re.sub(r"``([^`]*)``", lambda m: f"<code>{escape(m[1])}</code>", cell) for cell in row] for row in rows]
    cells = [" | ".join(row) for row in code]
    return "\n".join([f"{match[1]}|  |  |", f"{match[1]}|---|---|", *(f"{match[1]}| {row} |" for row in cells)])
