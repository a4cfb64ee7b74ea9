"""Kernels and launchers compiled here for a GPU elsewhere, in one archive that travels with the tree.

Triton's cache is a folder for each kernel. Of its files a launch needs the machine code and two of JSON; the
intermediate code stays behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu_first import plugin, predicted, waves
from bench.gpu_first.waves import ROOT
from tests.aot import move_cache

#: Git ignores it: name it among what the GPU machine is to get.
FOLDER = ROOT / ".gpu-cache"
ARCHIVE = FOLDER / "kernels.tar.xz"
KEPT = (".cubin", ".json", ".so")
LARGEST = 30 << 20


def make(arch: int, seconds: float, python: str = sys.executable) -> int:
    """Compile what rows, tables and tests launch, for at most so many seconds; 0 if the archive may travel."""
    from bench.gpu_first import recording

    FOLDER.mkdir(exist_ok=True)
    work = ROOT / "build" / "gpu-cache"
    work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    with tempfile.NamedTemporaryFile("w", suffix=".rows") as rows:
        rows.write("\n".join(predicted.ROWS))
        rows.flush()
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env |= {
            "TRITON_CACHE_DIR": str(work),
            recording.ARCH: str(arch),
            recording.END: str(end),
            "PYTHONPATH": str(ROOT),
        }
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        pytest = [python, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
        pytest += ["-p", "bench.gpu_first.plugin", "-p", "bench.gpu_first.recording"]
        timed = list(dict.fromkeys(i.split("::")[0] for i in predicted.ROWS))
        asked = ["--bench-gpu", "--bench-uncompiled", "--benchmark-only", *timed]
        tables = "from bench.gpu_first import recording; recording.compile_tables()"
        tests = ["-p", "no:benchmark", "-m", "gpu", *waves.files()]
        runs: list[tuple[list[str], dict[str, str]]] = [
            ([*pytest, *asked], {plugin.IDS: rows.name}),
            ([python, "-W", "ignore", "-c", tables], {}),
            *(([*pytest, *tests], {plugin.WAVE: wave.name}) for wave in waves.WAVES),
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # as many at a time, most valuable first; all stop at the end
            for command, more in runs:
                pool.submit(subprocess.run, command, env=env | more, cwd=ROOT, check=False)
    return pack(work)


def pack(work: Path) -> int:
    """The files that a launch needs, smallest first until the archive would be too large."""
    files = sorted((p for p in work.glob("*/*") if p.suffix in KEPT), key=lambda p: p.stat().st_size)
    with tarfile.open(ARCHIVE, "w:xz") as archive:
        for path in files:
            archive.add(path, arcname=str(path.relative_to(work)))
    size = ARCHIVE.stat().st_size
    print(f"{len(list(work.glob('*/*.cubin')))} kernels, {size / 1e6:.1f} MB: {ARCHIVE}")
    return 0 if size <= LARGEST else 1


def unpack(target: Path) -> int:
    """Make Triton's cache of the archive; how many kernels there are."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(target, filter="data")
    move_cache(target)
    return len(list(target.glob("*/*.cubin")))
