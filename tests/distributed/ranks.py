"""Four processes on gloo that run all cases of this folder: ``python -m tests.distributed.ranks RANK FILE MODULE...``.

A case is a function of a ``World`` marked with ``@case``. All ranks run all of them in one order, so starting the
processes is paid for once. Each rank prints what went wrong as JSON, {case: error}, and how long every case took.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.helpers.subprocesses import ROOT

RANKS = 4
MODULES = tuple(
    f"tests.distributed.{path.stem}" for path in sorted(Path(__file__).parent.glob("cases_*.py"))
)
CASES: dict[str, Callable[[World], None]] = {}


class World(NamedTuple):
    """This process among the four, and meshes ("data", "rows") of them by the second dimension's size."""

    rank: int
    meshes: dict[int, DeviceMesh]

    def rows(self, size: int) -> DeviceMesh:
        """A mesh of one dimension: every rank is in one of this size."""
        return self.meshes[size]["rows"]


def case(function: Callable[[World], None]) -> Callable[[World], None]:
    CASES[f"{function.__module__.rpartition('.')[2]}.{function.__name__}"] = function
    return function


def names() -> list[str]:
    """Of all cases."""
    for module in MODULES:
        importlib.import_module(module)
    return list(CASES)


def main(rank: int, file: str, *wanted: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    meshes = {
        size: init_device_mesh("cpu", (RANKS // size, size), mesh_dim_names=("data", "rows")) for size in (1, 2, 4)
    }
    found: dict[str, str] = {}
    for name in names():
        if wanted and not any(part in name for part in wanted):
            continue
        torch.manual_seed(0)
        began = time.perf_counter()
        try:
            CASES[name](World(rank, meshes))
        except Exception:
            found[name] = traceback.format_exc()[-3000:]
        print(f"{name} {time.perf_counter() - began:.2f} s", file=sys.stderr)
        if name in found:
            print(found[name], file=sys.stderr, flush=True)
    print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


@cache
def failed() -> dict[str, dict[int, str]]:
    """{case: {rank: error}} of one run of all cases."""
    file = Path(tempfile.mkdtemp(prefix="fastroute-ranks-")) / "store"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.ranks", str(rank), str(file)],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    found: dict[str, dict[int, str]] = {}
    try:
        for rank, process in enumerate(started):
            out, err = process.communicate(timeout=400)
            assert process.returncode == 0, err[-4000:]
            for name, error in json.loads(out.splitlines()[-1]).items():
                found.setdefault(name, {})[rank] = error
    finally:
        for process in started:
            process.kill()
        file.unlink(missing_ok=True)
        file.parent.rmdir()
    return found


if __name__ == "__main__":
    from tests.distributed import ranks  # the module that cases register with, not the one that runs

    ranks.main(int(sys.argv[1]), *sys.argv[2:])
