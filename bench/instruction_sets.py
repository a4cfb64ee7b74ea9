"""The processor of a run: what its results are named by, one page of the docs for each."""

import os
from pathlib import Path

#: The instruction set that this run is held to, if any.
HELD_TO = os.environ.get("FASTROUTE_ISA", "").removeprefix("auto")


def cpuinfo() -> str:
    """What Linux says of the processors; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def kind() -> str:
    """``cpu`` with AVX-512, ``cpu-intel`` with Intel's (whose libraries are others), ``cpu-avx2`` without."""
    facts = cpuinfo()
    if (HELD_TO or ("avx512" if "avx512f" in facts else "avx2")) != "avx512":
        return "cpu-avx2"
    return "cpu-intel" if "GenuineIntel" in facts else "cpu"
