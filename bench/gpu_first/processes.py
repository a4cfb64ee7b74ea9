"""A stage is a process group of its own with a time limit. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

#: The output of all stages together. More than this is dropped, so that the file stays within what may be copied.
LOG = "log.txt"
LOG_BYTES = 12 << 20


def kill(process: subprocess.Popen[bytes]) -> None:
    """The whole group: workers and tools that the stage started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(command: Sequence[str], seconds: float, out: Path, env: Mapping[str, str], cwd: Path) -> str:
    """Run a command for at most so many seconds; how it ended: "ok", "exit 3", "signal 11", "time" or "output"."""
    log = out / LOG
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        began_at = file.tell()
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=cwd, start_new_session=True)
        end, why = time.monotonic() + seconds, ""
        while process.poll() is None and not why:
            time.sleep(0.05)
            why = "time" if time.monotonic() > end else "output" if log.stat().st_size > LOG_BYTES else ""
        code = process.poll()
        kill(process)
        if log.stat().st_size > LOG_BYTES:
            file.truncate(began_at)
    if code is None:
        return why
    return "ok" if code == 0 else f"signal {-code}" if code < 0 else f"exit {code}"
