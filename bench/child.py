"""A contestant in a process of its own: for what is read once per process, and for peak resident memory.

``python -m bench.child race|memory MODULE JSON`` builds ``MODULE.contestant(**JSON)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import harness

_ANSWER = "bench.child: "


def _start(what: str, module: str, arguments: dict[str, Any], env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.child", what, module, json.dumps(arguments)]
    return subprocess.Popen(
        command,
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(_ANSWER):
            return json.loads(line.removeprefix(_ANSWER))
    raise RuntimeError(f"bench.child ended with {process.wait()}")


class Elsewhere:
    """A contestant timed in its own process, in turn with the others, in one round of two."""

    every = 2

    def __init__(self, name: str, module: str, arguments: dict[str, Any], env: dict[str, str]) -> None:
        self.name = name
        self._process = _start("race", module, arguments, env)

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return _answer(self._process)

    def results(self) -> harness.Results:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.pt"
            self._ask(f"results {path}")
            return torch.load(path, weights_only=True)

    def sample(self) -> harness.Sample:
        return harness.Sample(*self._ask("sample"))

    def close(self) -> None:
        self._process.communicate()


def resident_growth(module: str, arguments: dict[str, Any]) -> dict[str, float]:
    """{"growth": peak resident MB beyond module, input and gradients, "gradients": MB} of one pass."""
    process = _start("memory", module, arguments, {})
    found: dict[str, float] = _answer(process)
    process.communicate()
    return found


def _tell(answer: Any) -> None:
    print(_ANSWER + json.dumps(answer), flush=True)


def _race(contestant: harness.Here) -> None:
    for line in sys.stdin:
        what, _, path = line.strip().partition(" ")
        if what == "results":
            torch.save(contestant.results(), path)
            _tell("saved")
        else:
            _tell(contestant.sample())


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _settle() -> None:
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _memory(module: Any, arguments: dict[str, Any]) -> None:
    """Libraries are warmed up on a small case; a compiled rival on its own, since it compiles per shape."""
    module.contestant(**arguments, small=True).run()
    contestant = module.contestant(**arguments)
    if "compile" in arguments["rival"]:
        contestant.run()
        contestant.reset()
    _settle()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    kept = contestant.run()
    peak = _status("VmHWM")
    gradients = sum(t.nbytes for name, t in kept.items() if name != "x_out")
    _tell({"growth": (peak - before - gradients) / 1e6, "gradients": gradients / 1e6})


def main() -> None:
    what, name, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(arguments.pop("threads"))
    module = importlib.import_module(name)
    if what == "race":
        _race(module.contestant(**arguments))
    else:
        _memory(module, arguments)


if __name__ == "__main__":
    main()
