"""The examples as under torchrun, in copies of one process: ``python -m tests.distributed.run_examples DIR``.

Prints a line of JSON for each run: its exit statuses, and what it printed.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import warnings
from pathlib import Path

from tests.distributed.ranks import fork
from tests.helpers.subprocesses import ROOT


def runs(folder: str) -> list[tuple[int, str, list[str]]]:
    """(processes, example, arguments): what two processes began, four go on with."""
    small = ["--vectors", "30", "--checkpoints", folder, "--every", "4"]
    return [
        (2, "capsules", [*small, "--steps", "4"]),
        (4, "capsules", [*small, "--steps", "8", "--data", "2"]),
        (2, "ten_million", ["--vectors", "100000", "--gradients"]),
        (1, "ten_million", ["--vectors", "40000"]),
    ]


def main(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples" / "distributed"))
    for number, (ranks, name, arguments) in enumerate(runs(str(folder / "run"))):
        example = importlib.import_module(name)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        out = folder / f"{number}.txt"

        def run(rank: int, ranks: int = ranks, port: int = port, out: Path = out, example: object = example,
                arguments: list[str] = arguments) -> None:  # fmt: skip
            warnings.simplefilter("ignore")
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost",
                              MASTER_PORT=str(port))  # fmt: skip
            if rank == 0:
                sys.stdout = out.open("w")
            assert example.main(arguments) == 0  # type: ignore[attr-defined]

        statuses = fork(ranks, run, 120)
        print(json.dumps([statuses, out.read_text() if out.exists() else ""]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
