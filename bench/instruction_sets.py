"""The instruction set of a run, which its results are named by."""

import os
from pathlib import Path

#: The instruction set that this run is held to, if any.
HELD_TO = os.environ.get("FASTROUTE_ISA", "").removeprefix("auto")


def best() -> str:
    """The instruction set that a run has, of the two whose results the docs keep apart."""
    cpuinfo = Path("/proc/cpuinfo")
    has = "avx512f" in cpuinfo.read_text() if cpuinfo.exists() else False
    return HELD_TO or ("avx512" if has else "avx2")
