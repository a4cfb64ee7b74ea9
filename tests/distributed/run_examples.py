"""The examples as under torchrun, in copies of one process: ``python -m tests.distributed.run_examples WHICH DIR``.

Prints a line of JSON for each run: its exit statuses, and what rank 0 printed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from tests.distributed.ranks import agent_store, fork
from tests.helpers.subprocesses import ROOT


def runs(which: str, folder: Path) -> list[tuple[int, str, list[str]]]:
    """(processes, example, arguments)."""
    if which == "experts":
        small = ["--steps", "3", "--batch", "64"]
        return [
            (2, "experts", [*small, "--checkpoint", str(folder / "experts.pt")]),
            (2, "routing_network", small),
        ]
    small = ["--vectors", "30", "--checkpoints", str(folder / "run"), "--every", "4"]
    return [  # what two processes began, four go on with
        (2, "capsules", [*small, "--steps", "4"]),
        (4, "capsules", [*small, "--steps", "8", "--data", "2"]),
        (2, "ten_million", ["--vectors", "100000", "--gradients"]),
        (1, "ten_million", ["--vectors", "40000"]),
    ]


def main(which: str, folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples" / "distributed"))
    for number, (ranks, name, arguments) in enumerate(runs(which, folder)):
        example, out = importlib.import_module(name), folder / f"{number}.txt"

        def run(rank: int, ranks: int = ranks, out: Path = out, example: Any = example,
                arguments: list[str] = arguments) -> None:  # fmt: skip
            warnings.simplefilter("ignore")
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            if rank == 0:
                sys.stdout = out.open("w")
            assert example.main(arguments) == 0

        with agent_store() as port:
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
            statuses = fork(ranks, run, 200)
        print(json.dumps([statuses, out.read_text() if out.exists() else ""]), flush=True)
        if any(statuses):
            sys.exit(f"{name} on {ranks} processes ended with {statuses}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
