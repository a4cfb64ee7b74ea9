"""What makes an AVX-512 processor run what an AVX2 one would: torch's kernels, and oneDNN's. Ours: FASTROUTE_ISA."""

import os
from pathlib import Path

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
#: The instruction set that this run is held to, if any.
HELD_TO = os.environ.get("FASTROUTE_ISA", "").removeprefix("auto")


def best() -> str:
    """The instruction set that a run has, of the two whose results the docs keep apart."""
    cpuinfo = Path("/proc/cpuinfo")
    has = "avx512f" in cpuinfo.read_text() if cpuinfo.exists() else False
    return HELD_TO or ("avx512" if has else "avx2")
