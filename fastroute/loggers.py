"""Where a monitor's numbers go: a file of lines that survives a crash, or TensorBoard.

Other loggers take a dict: ``wandb.log(monitor.numbers(), step=step)``.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from errno import ENOTDIR
from math import isfinite
from pathlib import Path
from typing import Any

from .ops.arguments import checked
from .ops.checks import given, numbers_by_name

#: The file in a run's folder that ``fastroute report`` reads.
FILE = "routing.jsonl"


class RunLog:
    """Writes ``RUN_DIR/routing.jsonl``: a line of JSON per call, each in one piece.

    A line is ``{"step": 10, "time": 1700000000.0, "numbers": {"gate/entropy": 1.9, ...}}``. It is appended by one write
    to the operating system, so that a program that is killed loses no line before it; a line that another program left
    unfinished stays apart from what follows. Numbers that are not finite are strings: "nan", "inf", "-inf".

    Args:
        folder: made if it is not there. A log in it is continued.

    Example::

        >>> import tempfile, fastroute
        >>> from fastroute.loggers import RunLog
        >>> log = RunLog(tempfile.mkdtemp())
        >>> log.write({"loss": 0.5}, step=1)
        >>> log.path.name
        'routing.jsonl'

    Raises:
        NotADirectoryError, PermissionError: the folder cannot be made or written. TypeError: naming the argument.
    """

    @checked
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(ENOTDIR, "folder: expected a folder, found a file", str(folder)) from None
        self.path = self.folder / FILE
        self._lock = threading.Lock()
        self._append(b"")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    @checked
    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Append a line.

        Raises:
            TypeError: naming the argument; nothing is then written.
        """
        made = {
            name: value if isfinite(value) else str(value)
            for name, value in numbers_by_name("numbers", numbers).items()
        }
        line = json.dumps({"step": step, "time": round(time.time(), 3), "numbers": made}, allow_nan=False)
        self._append(line.encode() + b"\n")

    def _append(self, line: bytes) -> None:
        with self._lock:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                end = os.fstat(file).st_size
                if end:
                    os.lseek(file, end - 1, os.SEEK_SET)
                    line = line if os.read(file, 1) == b"\n" else b"\n" + line
                while line:  # a disk that is nearly full takes a part, and says so at the next
                    line = line[os.write(file, line) :]
            finally:
                os.close(file)


class TensorBoard:
    """Writes numbers as scalars of a ``torch.utils.tensorboard.SummaryWriter``.

    Args:
        writer: a SummaryWriter, or what has its ``add_scalar``.
        prefix: before the numbers' names.

    Raises:
        TypeError: ``writer`` has no ``add_scalar``.
    """

    @checked
    def __init__(self, writer: Any, prefix: str = "routing/") -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer: expected a SummaryWriter, got {given(writer)}")
        self.writer, self.prefix = writer, prefix

    @checked
    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Add a scalar for every number.

        Raises:
            TypeError: naming the argument; nothing is then written.
        """
        for name, value in numbers_by_name("numbers", numbers).items():
            self.writer.add_scalar(self.prefix + name, value, step)
