"""Python in a process of its own: for what is read once per process, or may end it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(
    code: str, environment: Mapping[str, str | None] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` from the repository's root with changed environment variables (None removes one)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, value in (environment or {}).items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


def check_python(code: str, environment: Mapping[str, str | None] | None = None, timeout: float = 300) -> str:
    """What ``code`` printed; it must end well."""
    ran = run_python(code, environment, timeout)
    assert ran.returncode == 0, f"exit status {ran.returncode}\n{ran.stdout[-4000:]}\n{ran.stderr[-8000:]}"
    return ran.stdout
