"""The variants of the C++ kernels, by instruction set; ``csrc/common/isa.cpp`` chooses one, once per process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from .environment import instruction_set
from .registry import library

#: Every variant there is, on one processor or another; names as in ATEN_CPU_CAPABILITY.
ISAS = ("default", "avx2", "avx512")

library.define("_isa() -> str")
library.define("_isas() -> str[]")
library.define("_choose_isa(str asked, str[] here) -> str")


def in_use() -> str:
    """The variant that runs, of a loaded extension; ValueError if FASTROUTE_ISA names one that is not here."""
    with ThreadPoolExecutor(1) as elsewhere:  # the first to ask may be in a trace, or in a mode: a thread is in none
        return elsewhere.submit(torch.ops.fastroute._isa).result()


def describe() -> str:
    """The variant of a loaded extension that runs, and those that it could run on this processor."""
    return f"{in_use()} (available: {', '.join(torch.ops.fastroute._isas())})"


def check_name() -> None:
    """Without an extension FASTROUTE_ISA has no effect, but has to be a name all the same."""
    asked = instruction_set()
    if asked not in ("", "auto", *ISAS):
        raise ValueError(f"FASTROUTE_ISA: expected one of auto, {', '.join(ISAS)}, got {asked!r}")
