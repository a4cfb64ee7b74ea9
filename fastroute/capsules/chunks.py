"""``VectorChunks``: vectors in memory or in a file, a few thousand at a time, as often as asked."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.arguments import Count, checked

_BYTES = 16 << 20  #: of a chunk: large enough for the kernels, and two of them are little beside a process


class VectorChunks:
    """Vectors [..., n, d] cut along their second to last axis, to be iterated over again and again.

    A chunk of a tensor or an array is a view. Those of a ``numpy.memmap`` are *read* by a thread of their own, one
    ahead of the one in use, into two buffers that take turns: its pages never become resident, and reading overlaps
    with computing. **Such a chunk is only good until the next one is asked for.** (A memmap opened with mode "c", whose
    changes are not in its file, or one that is not contiguous is copied chunk by chunk instead.)

    Args:
        vectors: tensor, array or memmap [..., n, d] of a floating-point dtype.
        rows: of a chunk; None: as many as make 16 MB.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> chunks = fastroute.capsules.VectorChunks(torch.randn(1, 1000, 8), rows=300)
        >>> [chunk.shape[-2] for chunk in chunks]
        [300, 300, 300, 100]
        >>> route = fastroute.EfficientVectorRouting(-1, 3, 8, 8)
        >>> route.stream(chunks).shape
        torch.Size([1, 3, 8])
    """

    @checked
    def __init__(self, vectors: Tensor | np.ndarray[Any, Any], rows: Count | None = None) -> None:
        if vectors.ndim < 2:
            raise ValueError(f"vectors: expected [..., n, d], at least 2 dimensions, got {list(vectors.shape)}")
        self.vectors = vectors
        *batch, n, d = vectors.shape
        self.n: int = n
        row_bytes = max(1, d * vectors.itemsize)
        for size in batch:
            row_bytes *= max(1, size)
        self.rows = max(1, _BYTES // row_bytes) if rows is None else rows

    def __len__(self) -> int:
        return -(-self.n // self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        offset = _file_offset(self.vectors) if isinstance(self.vectors, np.memmap) else None
        if offset is not None:
            yield from self._read(offset)
            return
        for start in range(0, self.n, self.rows):
            chunk = self.vectors[..., start : start + self.rows, :]
            yield chunk if isinstance(chunk, Tensor) else as_tensor(chunk)

    def _read(self, offset: int) -> Iterator[Tensor]:
        """The chunks of a memmap, read from its file from ``offset`` on."""
        source: Any = self.vectors
        *batch, n, d = source.shape
        count = int(np.prod(batch, dtype=np.int64))
        free: SimpleQueue[np.ndarray[Any, Any] | None] = SimpleQueue()
        ready: SimpleQueue[tuple[np.ndarray[Any, Any], int] | BaseException | None] = SimpleQueue()
        stop = threading.Event()
        for _ in range(2):
            free.put(np.empty(count * min(self.rows, n) * d, dtype=source.dtype))

        def work() -> None:
            try:
                with open(source.filename, "rb", buffering=0) as file:
                    for start in range(0, n, self.rows):
                        buffer = free.get()
                        if buffer is None or stop.is_set():
                            return
                        rows = min(self.rows, n - start)
                        into = memoryview(buffer.data).cast("B")
                        size = rows * d * source.itemsize
                        for b in range(count):
                            file.seek(offset + (b * n + start) * d * source.itemsize)
                            _fill(file, into[b * size : (b + 1) * size], source.filename)
                        ready.put((buffer, rows))
                ready.put(None)
            except BaseException as error:
                ready.put(error)

        thread = threading.Thread(target=work, name="fastroute-read-ahead", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                buffer, rows = item
                yield torch.from_numpy(buffer[: count * rows * d].reshape(*batch, rows, d))
                free.put(buffer)
        finally:
            stop.set()
            free.put(None)
            thread.join()


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """The array's memory, or a copy of what torch cannot share (read-only arrays, negative strides)."""
    shared = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if shared else array.copy())


def _file_offset(source: np.memmap[Any, Any]) -> int | None:
    """Where in its file a memmap, or a part of one, begins; None if it is not all there in one piece and in order."""
    root: Any = source
    while isinstance(root, np.ndarray) and not isinstance(root.base, mmap.mmap):
        root = root.base
    in_file = isinstance(root, np.memmap) and root.mode in ("r", "r+", "w+")
    if (
        not in_file
        or source.filename is None
        or not source.flags.c_contiguous
        or not source.dtype.isnative
        or source.size == 0
    ):
        return None
    if not Path(os.fspath(source.filename)).is_file():  # deleted, though still mapped
        return None
    start: int = source.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return int(root.offset) + start


def _fill(file: Any, into: memoryview, name: Any) -> None:
    while len(into):
        read = file.readinto(into)
        if not read:
            raise ValueError(f"vectors: expected {len(into)} bytes more in {name}, which has become shorter")
        into = into[read:]
