"""A training run whose ranks are killed, and which goes on on fewer: ``python -m tests.distributed.killed FOLDER``.

Prints JSON: what became of every run's ranks, with the survivors' errors, and how far the last one's weights are from
those of one process that nobody killed. Under torchrun it is one of its workers, and is killed once.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from fastroute.distributed import Checkpoints, RowShardedCapsules, row_sums
from tests.distributed.cases_capsules import B, N, full, layer, vectors
from tests.distributed.ranks import fork

STEPS, EVERY = 8, 2
#: (ranks, where one of them is killed, in which step); every run goes on from the last complete checkpoint.
RUNS = ((4, "forward", 3), (3, "before the optimizer", 5), (2, "saving", 6), (1, "nowhere", 0))
LIMIT = 30  #: seconds, of the process group


class Counted(nn.Module):
    """A routing that counts its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.routing = layer(N)
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.samples += x.shape[0]
        return self.routing(x).square().mean()


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, run: Callable[[], None]) -> None:
    """Run something first in every call of a function."""
    function = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        run()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def train(folder: Path, where: str, when: int, victim: bool) -> dict[str, Tensor]:
    """All steps that are left; the weights in the end."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = Counted()
    if dist.is_initialized():
        parallelize_module(model, init_device_mesh("cpu", (ranks,)), {"routing": RowShardedCapsules()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpoints = Checkpoints(folder, {"model": model}, optimizer)
    done = checkpoints.load() or 0
    calls = 0
    for step in range(done + 1, STEPS + 1):
        x = vectors(seed=100 + step)
        part = x.chunk(ranks, 1)[rank] if rank < len(x.chunk(ranks, 1)) else x[:, :0]
        if victim and step == when and where == "forward":

            def second() -> None:
                nonlocal calls
                calls += 1
                if calls == 2:
                    end()

            before(row_sums, "all_reduce", second)
        if victim and step == when and where == "saving":
            before(FileSystemWriter, "write_data", end)
        optimizer.zero_grad()
        model(part).backward()
        if victim and step == when and where == "before the optimizer":
            end()
        optimizer.step()
        if step % EVERY == 0:
            checkpoints.save(step, asynchronous=where == "saving")
    checkpoints.wait()
    return {k: full(t).detach() for k, t in model.state_dict().items()}


def difference(found: dict[str, Tensor], folder: Path) -> float:
    """To one process that nobody killed; infinite if samples were lost or counted twice."""
    expected = train(folder, "nowhere", 0, False)
    if int(found["samples"]) != STEPS * B or int(expected["samples"]) != STEPS * B:
        return float("inf")
    return max(float((found[k] - t).abs().max()) for k, t in expected.items())


def begin(init: str, ranks: int, rank: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, world_size=ranks, rank=rank, timeout=timedelta(seconds=LIMIT))


def main(folder: Path) -> None:
    report = []
    for number, (ranks, where, when) in enumerate(RUNS):
        errors = folder / f"errors-{number}"
        errors.mkdir()

        def run(rank: int, number: int = number, ranks: int = ranks, where: str = where, when: int = when,
                errors: Path = errors) -> None:  # fmt: skip
            begin(f"file://{folder}/store-{number}", ranks, rank)
            try:
                found = train(folder / "run", where, when, victim=rank == ranks - 1)
            except Exception as error:
                (errors / str(rank)).write_text(f"{type(error).__name__}: {error}")
                os._exit(3)
            if rank == 0:
                torch.save(found, folder / "found.pt")

        statuses = fork(ranks, run, 3 * LIMIT)
        steps = Checkpoints(folder / "run", nn.Identity()).steps()
        said = [path.read_text() for path in sorted(errors.iterdir())]
        report.append({"where": where, "statuses": statuses, "complete": steps, "errors": said})
    found = torch.load(folder / "found.pt", weights_only=True)
    print(json.dumps({"runs": report, "difference": difference(found, folder / "alone")}))


def worker(folder: Path) -> None:
    """Of torchrun: the last rank is killed in its first life."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    importlib.import_module("_ranks").start(LIMIT)  # of examples/distributed
    last = dist.get_rank() == dist.get_world_size() - 1
    found = train(folder / "run", "before the optimizer", 5, victim=first and last)
    dist.destroy_process_group()
    if last:
        (folder / "report").write_text(json.dumps({"first": first, "difference": difference(found, folder / "alone")}))


if __name__ == "__main__":
    (worker if "TORCHELASTIC_RESTART_COUNT" in os.environ else main)(Path(sys.argv[1]))
