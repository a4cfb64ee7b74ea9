"""What fastroute does, on real data, in a minute: one demo per file, each with ``run(Options) -> exit status``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import data as _data

DEMOS = {"capsules": "learn handwritten digits with a capsule router, time it, draw what it looked at"}


@dataclass(frozen=True)
class Options:
    """What every demo is told."""

    data: Path | None = None  #: a folder of MNIST's IDX files instead of scikit-learn's digits
    out: Path = Path("fastroute-demo.png")
    epochs: int | None = None  #: None: enough
    seed: int = 0
    device: str = "cpu"
    threads: int = 1


class CannotRun(Exception):
    """What a demo needs is not there; the message says what."""


def digits(options: Options) -> _data.Digits:
    """The handwritten digits that the options name."""
    try:
        return _data.digits() if options.data is None else _data.mnist(options.data)
    except (ImportError, OSError, ValueError) as error:
        raise CannotRun(str(error)) from error
