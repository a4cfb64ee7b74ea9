"""What the examples of this folder share: the process group, its mesh, and a progress bar on rank 0."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def start(seconds: float = 300) -> torch.device:
    """Join the group that torchrun made: NCCL and a GPU for each rank where there are GPUs, else gloo and the CPU.

    Keys in torchrun's store get the number of restarts in front. The store outlives a restart, and gloo would connect
    to the addresses of processes that have ended (torch 2.13).
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=seconds)
    if "MASTER_ADDR" in os.environ:
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        leads = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store: dist.Store = dist.PrefixStore(f"life-{life}", dist.TCPStore(address, port, ranks, leads, limit))
    else:  # not under torchrun: alone
        store = dist.HashStore()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)
    return device


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar, which only rank 0 shows."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=dist.get_rank() != 0) as bar:
        yield bar


def leaving(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """``main``, which leaves the group when it has ended and its model is gone.

    A DistributedDataParallel that is the last to hold its group may wait for ever: freed, it waits for gloo's thread,
    which waits for Python's lock (torch 2.13).
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        status = main(argv)
        gc.collect()
        dist.destroy_process_group()
        return status

    return run


def say(text: str) -> None:
    """On rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)
