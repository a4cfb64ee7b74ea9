"""Results as lines of JSON, each on the disk before the next is computed. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: The file that the processes of a run append to.
FILE = "GPU_FIRST_RECORDS"
#: ``time.monotonic()`` when the run began: the clock is the machine's, so all processes share it.
BEGAN = "FASTROUTE_BENCH_BEGAN"
NAME = "records.jsonl"
LONGEST_TEXT = 4000

Record = dict[str, Any]


def elapsed() -> float:
    """Seconds since the run began."""
    return time.monotonic() - float(os.environ.get(BEGAN, time.monotonic()))


def write(kind: str, **values: Any) -> None:
    """Append a record; a process that was not started by a run has no file and writes nothing."""
    path = os.environ.get(FILE)
    if path is None:
        return
    short = {k: v[-LONGEST_TEXT:] if isinstance(v, str) else v for k, v in values.items()}
    line = json.dumps({"kind": kind, "at": round(elapsed(), 2), **short}, default=str) + "\n"
    target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(target, line.encode())  # one call, so lines of several processes do not mix
        if kind != "start":
            os.fsync(target)
    finally:
        os.close(target)


def read(path: Path) -> Iterator[Record]:
    """The records of a file. A line that a crash cut short is left out."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            yield record
