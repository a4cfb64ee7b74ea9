"""The examples of experts as under torchrun: ``python -m tests.distributed.run_expert_examples DIR``.

Ranks are copies of one process. What rank 0 prints is in a file of the example's name.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

from tests.distributed.ranks import fork
from tests.helpers.subprocesses import ROOT


def main(folder: Path) -> int:
    sys.path.insert(0, str(ROOT / "examples" / "distributed"))
    failed = 0
    small = ["--steps", "3", "--batch", "64"]
    for name, arguments in (("experts", ["--checkpoint", str(folder / "experts.pt")]), ("routing_network", [])):
        example = importlib.import_module(name)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]

        def run(
            rank: int, name: str = name, example: Any = example, more: list[str] = arguments, port: int = port
        ) -> None:
            warnings.simplefilter("ignore")
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                              MASTER_PORT=str(port))  # fmt: skip
            if rank == 0:
                sys.stdout = (folder / name).open("w")
            if example.main([*small, *more]):
                raise RuntimeError(name)

        failed += any(fork(2, run, 120))
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
