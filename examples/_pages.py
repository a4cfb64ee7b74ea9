"""What the examples share: Ctrl-C, a markdown table, the machine it was measured on, and its place in a page."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastroute.ops import backends


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """The processor, versions, the ops' backend and the date, in a sentence."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    case = backends.Case("dispatch", "cpu", torch.float32, (("B", 64), ("K", 5)))
    backend = backends.decide(case, backends.requested()).backend
    return (
        f"{name}, cpu capability {torch.backends.cpu.get_cpu_capability()}, python {platform.python_version()}, "
        f"torch {torch.__version__}, fastroute's `{backend}` backend, {torch.get_num_threads()} thread(s). "
        f"{datetime.date.today()}."
    )


def write(path: Path, name: str, text: str) -> None:
    """Into the file: between ``<!-- begin name -->`` and ``<!-- end name -->`` if it has them, else all of it."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    page = path.read_text() if path.exists() else ""
    if begin in page and end in page:
        text = f"{page[: page.index(begin)]}{begin}\n{text}\n{page[page.index(end) :]}"
    path.write_text(text)


def interruptible(main: Callable[[], int]) -> int:
    """``main()``; where Ctrl-C ends it, one line, and the checkpoint that a demo's training leaves."""
    try:
        return main()
    except KeyboardInterrupt as stop:
        print(stop.save(Path("interrupted.pt")) if hasattr(stop, "save") else "interrupted", file=sys.stderr)
        return 130
