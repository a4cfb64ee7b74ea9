"""Python in a process of its own: for what is read once per process, or may end it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def ran(
    command: Sequence[str], timeout: float, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command, and end all that it has started when it has not ended in so many seconds.

    Output goes to files: a pipe stays open as long as a grandchild has it, and whoever reads it waits for that.

    Raises:
        AssertionError: it did not end; with what it printed.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:

        def said(file: Any) -> str:
            file.seek(0)
            text: str = file.read().decode(errors="replace")
            return text

        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=out, stderr=err, start_new_session=True)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what a command that has ended left behind
        printed = said(out), said(err)
    assert status is not None, (
        f"{' '.join(command)[:200]}: not done after {timeout} s\n{printed[0][-4000:]}\n{printed[1][-8000:]}"
    )
    return subprocess.CompletedProcess(command, status, *printed)


def run_python(
    code: str, environment: Mapping[str, str | None] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` from the repository's root with changed environment variables (None removes one)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, value in (environment or {}).items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return ran([sys.executable, "-c", code], timeout, env)


def check_python(code: str, environment: Mapping[str, str | None] | None = None, timeout: float = 300) -> str:
    """What ``code`` printed; it must end well."""
    done = run_python(code, environment, timeout)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout
