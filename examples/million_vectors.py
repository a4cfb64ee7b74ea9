"""Route a million vectors that are in a file, in little memory.

Writes 1,000,000 x 1024 float32 (4 GB) to a temporary file in a folder of your choice, routes them to 100 x 1024 with
``EfficientVectorRouting(-1, ...).stream``, deletes the file, and prints how much memory that took and how its speed
compares with the *floor*: the matrix products of the algorithm alone, on matrices that stay in a cache. The floor is
timed between chunks of the same run, so that whatever else the machine does slows both down.

    python examples/million_vectors.py --folder /var/tmp
    python examples/million_vectors.py --rows 50000 --gradients
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import numpy as np
import torch
from _pages import interruptible, machine, table, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastroute import EfficientVectorRouting
from fastroute.capsules import VectorChunks

_BLOCK = 8192  #: vectors written at once


def make_file(path: Path, rows: int, width: int, advance: Callable[[int], None]) -> None:
    """Normal random numbers, block by block."""
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, rows, _BLOCK):
            block = generator.standard_normal((min(_BLOCK, rows - start), width), dtype=np.float32)
            file.write(block.data)
            advance(len(block))


def status(key: str) -> float:
    """A line of /proc/self/status in MB; NaN where there is none."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(key + ":"))) * 1024 / 1e6
    return float("nan")


def forget_peak() -> None:
    """The peak of resident memory begins anew (Linux)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Floor:
    """The matrix products that routing [rows, width] to ``outputs`` needs in two iterations, and no more."""

    rows: int
    width: int
    outputs: int
    gradients: bool
    cpu: float = 0.0
    wall: float = 0.0
    times: int = 0
    _work: list[Callable[[], object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        k, d, m = self.rows, self.width, self.outputs
        #: (outputs of a product with the vectors, outputs of one that sums over them), pass by pass
        first = (d, 0) if d <= 2 * m else (m, m)  # a Gram matrix, three of its four quarters; or both betas in one
        passes = [first, (3 * m, m)]
        if self.gradients:
            passes += [(4 * m, 3 * m), (d, 0) if d <= 2 * m else (2 * m, m)]
        x, most = torch.randn(k, d), max(max(p) for p in passes)
        weight, row = torch.randn(most, d), torch.randn(k, most)
        linear = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None

        def by_mm() -> None:
            for out, summed in passes:
                x @ weight[:out].mT
                if summed:
                    row[:, :summed].mT @ x

        def by_onednn() -> None:
            for out, summed in passes:
                linear(x, weight[:out], None, "none", [], "")
                for a, b in zip(row[:, :summed].split(1024), x.split(1024), strict=True) if summed else ():
                    linear(a.mT.contiguous(), b.mT, None, "none", [], "")

        ways = [by_mm] if linear is None else [by_mm, by_onednn]
        timed = []
        for way in ways:
            way()
            began = time.perf_counter()
            way()
            timed.append(time.perf_counter() - began)
        self._work = [ways[timed.index(min(timed))]]

    def sample(self) -> None:
        """Once; the file's reader has a thread of its own, which does not count on one thread of products."""
        clock = time.thread_time if torch.get_num_threads() == 1 else time.process_time
        wall, cpu = time.perf_counter(), clock()
        self._work[0]()
        self.cpu += clock() - cpu
        self.wall += time.perf_counter() - wall
        self.times += 1

    def of(self, rows: int) -> tuple[float, float]:
        """(CPU seconds, wall seconds) of so many vectors."""
        factor = rows / (self.times * self.rows)
        return self.cpu * factor, self.wall * factor


class Watched:
    """Chunks that move a progress bar, and between some of which the floor is timed."""

    def __init__(self, chunks: VectorChunks, advance: Callable[[int], None], floor: Floor, every: int) -> None:
        self.chunks, self.advance, self.floor, self.every = chunks, advance, floor, every

    def __iter__(self) -> Iterator[Tensor]:
        for number, chunk in enumerate(self.chunks):
            if number % self.every == 0:
                self.floor.sample()
            yield chunk
            self.advance(chunk.shape[-2])


def route(path: Path, args: argparse.Namespace, progress: Progress) -> dict[str, float]:
    """Stream the file once and measure."""
    vectors = np.memmap(path, np.float32, "r", shape=(args.rows, args.width))
    chunks = VectorChunks(vectors, args.chunk)
    torch.manual_seed(0)
    layer = EfficientVectorRouting(-1, args.outputs, args.width, args.width)
    passes = layer.n_iters * (2 if args.gradients else 1)
    floor = Floor(min(chunks.rows, args.rows), args.width, args.outputs, args.gradients)

    def run(source: object) -> None:
        with torch.set_grad_enabled(args.gradients):
            y = layer.stream(source, n=args.rows)
            if args.gradients:
                y.square().mean().backward()
        assert y.isfinite().all()

    small = torch.randn(min(chunks.rows, args.rows), args.width)
    with torch.set_grad_enabled(args.gradients):  # libraries are loaded and have their own memory
        warm = layer.stream(small)
        if args.gradients:
            warm.sum().backward()
    del small, warm
    bar = progress.add_task("routing", total=passes * args.rows)
    watched = Watched(chunks, lambda rows: progress.advance(bar, rows), floor, max(1, len(chunks) // 32))
    forget_peak()
    before = status("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    run(watched)
    wall, cpu = time.perf_counter() - wall - floor.wall, time.process_time() - cpu - floor.cpu
    floor_cpu, floor_wall = floor.of(args.rows)
    return {
        "passes": passes, "wall": wall, "cpu": cpu, "MB": status("VmHWM") - before, "floor_cpu": floor_cpu,
        "floor_wall": floor_wall,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the file goes for a while"
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=100)
    parser.add_argument("--chunk", type=int, help="vectors at a time; by default 16 MB of them")
    parser.add_argument("--gradients", action="store_true", help="and the gradients of all parameters")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a markdown file to write, or whose part 'million' to rewrite")
    args = parser.parse_args(argv)
    if min(args.rows, args.width, args.threads, args.chunk or 1) < 1 or args.outputs < 2:
        parser.error("--rows, --width, --chunk, --threads: expected at least 1, --outputs: at least 2")
    size = 4 * args.rows * args.width
    if not args.folder.is_dir():
        parser.error(f"--folder: expected a folder, found none at {args.folder}")
    if (free := shutil.disk_usage(args.folder).free) < 1.1 * size:
        parser.error(f"--folder: expected {1.1 * size / 1e9:.1f} GB free in {args.folder}, found {free / 1e9:.1f}")
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        tempfile.TemporaryDirectory(prefix="million-vectors-", dir=args.folder) as folder,
        Progress(*columns, console=console) as progress,
    ):
        path = Path(folder) / "vectors.bin"
        bar = progress.add_task(f"writing {size / 1e9:.2f} GB", total=args.rows)
        make_file(path, args.rows, args.width, lambda rows: progress.advance(bar, rows))
        found = route(path, args, progress)
    cells = [
        f"{args.rows:,} x {args.width} to {args.outputs} x {args.width}", "yes" if args.gradients else "no",
        f"{found['passes']:.0f}", f"{found['MB']:.0f}", f"{found['cpu']:.1f}", f"{found['wall']:.1f}",
        f"{args.rows / found['wall']:,.0f}", f"{100 * found['floor_cpu'] / found['cpu']:.0f} %",
        f"{100 * found['floor_wall'] / found['wall']:.0f} %",
    ]  # fmt: skip
    head = ["vectors", "gradients", "passes", "resident growth, MB", "CPU s", "wall s", "vectors/s"]
    text = table([*head, "share of the floor, CPU", "wall"], [cells])
    text += f"\n\n{size / 1e9:.2f} GB of vectors, {machine()}"
    write(args.out, "million", text)
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
