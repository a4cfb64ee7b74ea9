"""Four processes on gloo that run this folder's cases: ``python -m tests.distributed.ranks FILE [PART OF A NAME...]``.

A case is a function of a ``World`` marked with ``@case``. All ranks run all of them in one order, so starting the
processes is paid for once. Each rank prints what went wrong as JSON, [rank, {case: error}].
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.helpers.subprocesses import ran

RANKS = 4
MARK = "errors: "  #: a line of output that begins with it has them
MODULES = tuple(f"tests.distributed.{path.stem}" for path in sorted(Path(__file__).parent.glob("cases_*.py")))
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


@contextmanager
def folder(world: World) -> Iterator[Path]:
    """One that all ranks have; the parent's directory tells them which."""
    path = Path(tempfile.gettempdir()) / f"fastroute-checkpoints-{os.getppid()}"
    dist.barrier()
    yield path
    dist.barrier()
    if world.rank == 0:
        shutil.rmtree(path, ignore_errors=True)


def names() -> list[str]:
    """Of all cases."""
    for module in MODULES:
        importlib.import_module(module)
    return list(CASES)


def main(rank: int, file: str, *wanted: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
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
        if rank == 0:
            print(f"{name} {time.perf_counter() - began:.2f} s", file=sys.stderr, flush=True)
        if name in found:
            print(f"rank {rank}: {found[name]}", file=sys.stderr, flush=True)
    os.write(1, f"{MARK}{json.dumps([rank, found])}\n".encode())  # in one piece: the ranks share it
    dist.barrier()
    dist.destroy_process_group()


def fork(ranks: int, run: Callable[[int], None], seconds: float = 600) -> list[int]:
    """Exit statuses of so many copies of this process, which has imported everything and computed nothing.

    Those that have not ended after so many seconds say where they are, and are killed.
    """
    left, statuses = dict[int, int](), [0] * ranks
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(max(1.0, seconds - 2), exit=False)
            try:
                run(rank)
            except BaseException:
                print(f"rank {rank} of {ranks}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        left[child] = rank
    end = time.monotonic() + seconds
    while left:
        late = time.monotonic() > end
        for child, rank in list(left.items()):
            if late:
                print(f"rank {rank} of {ranks}: not done after {seconds} s, killed", file=sys.stderr, flush=True)
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if ended:
                statuses[left.pop(child)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return statuses


@contextmanager
def agent_store() -> Iterator[int]:
    """The port of a store in a process of its own, as torchrun's agent has one.

    The store takes a free port itself. One that is looked for first, and let go, can be another program's by the time
    that the first rank wants it: the ranks then end, or wait for a stranger's answer.
    """
    read, write = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        try:
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            os.write(write, str(store.port).encode())
            while os.getppid() == parent:
                time.sleep(0.2)
        finally:
            os._exit(0)
    os.close(write)
    try:
        yield int(os.read(read, 16))
    finally:
        os.close(read)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def started(module: str, *arguments: str) -> str:
    """What ``python -m module`` printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MKL_NUM_THREADS": "1"}
    done = ran([sys.executable, "-m", module, *arguments], 700, env)
    status = done.returncode
    assert status == 0, f"{module}: exit status {status}\n{done.stdout[-3000:]}\n{done.stderr[-8000:]}"
    return done.stdout


@cache
def failed() -> dict[str, dict[int, str]]:
    """{case: {rank: error}} of one run of all cases."""
    found: dict[str, dict[int, str]] = {}
    with tempfile.TemporaryDirectory(prefix="fastroute-ranks-") as folder:
        printed = started("tests.distributed.ranks", str(Path(folder) / "store"))
    lines = [line.removeprefix(MARK) for line in printed.splitlines() if line.startswith(MARK)]
    assert len(lines) == RANKS
    for line in lines:
        rank, errors = json.loads(line)
        for name, error in errors.items():
            found.setdefault(name, {})[rank] = error
    return found


if __name__ == "__main__":
    from tests.distributed import ranks  # the module that cases register with, not the one that runs

    ranks.names()
    sys.exit(any(ranks.fork(RANKS, lambda rank: ranks.main(rank, *sys.argv[1:]))))
