"""The environment variables that the library reads; docs/environment.md says what each does."""

from __future__ import annotations

import os
from functools import cache


def backend() -> str:
    """The backend to use where ``use_backend`` names none; "" is "auto"."""
    return os.environ.get("FASTROUTE_BACKEND") or "auto"


def instruction_set() -> str:
    """The variant of the C++ kernels: "" or "auto" for the best one."""
    return os.environ.get("FASTROUTE_ISA", "")


@cache
def interpreting() -> bool:
    """Triton kernels run in its interpreter, on CPU tensors. Triton, too, looks once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def facts(*names: str) -> dict[str, str]:
    """Variables of others, as they are set."""
    return {name: os.environ.get(name, "not set") for name in names}
