"""What the examples share: options, Ctrl-C, a markdown table, the machine it was measured on, its place in a page."""

from __future__ import annotations

import argparse
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


def arguments(argv: Sequence[str] | None, about: str, epochs: int, part: str) -> argparse.Namespace:
    """Of an example that learns digits, for a part of a page and a picture; sets the threads."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="an epoch of few images, to see that it runs")
    parser.add_argument("--out", type=Path, help=f"a markdown file to write, or whose part '{part}' to rewrite")
    parser.add_argument("--picture", type=Path, help="a file for the picture")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.threads < 1:
        parser.error("--epochs, --threads: expected at least 1")
    args.epochs = 1 if args.quick else args.epochs
    torch.set_num_threads(args.threads)
    return args


def write(path: Path | None, name: str, text: str) -> None:
    """Into the file: between ``<!-- begin name -->`` and ``<!-- end name -->`` if it has them, else all of it.

    On the screen where there is none.
    """
    if path is None:
        print(text)
        return
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
