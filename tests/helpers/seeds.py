"""Every random draw of the tests, moved by ``FASTROUTE_TEST_SEED``: 0, the default, leaves seeds as they are written.

Not moved: what compares with an upstream's numbers, which belong to a seed.
"""

from __future__ import annotations

import os
import random
import zlib

import numpy as np
import torch

_STRIDE = 1_000_003  #: more than any two seeds of one test differ by


def _from_environment() -> int:
    value = os.environ.get("FASTROUTE_TEST_SEED") or "0"
    if not value.isdecimal():
        raise ValueError(f"FASTROUTE_TEST_SEED: expected an integer of at least 0, got {value!r}")
    return int(value)


BASE = _from_environment()


def moved(seed: int) -> int:
    return seed + _STRIDE * BASE


def generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(moved(seed))


#: Without a device, ``torch.manual_seed`` keeps the stack of every call, three times, for one that may be found later.
_seed_torch = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed


def fixed_seed(seed: int) -> None:
    """PyTorch's, the same under every ``FASTROUTE_TEST_SEED``."""
    _seed_torch(seed)


def manual_seed(seed: int) -> None:
    fixed_seed(moved(seed))


def seed_all(name: str) -> None:
    """PyTorch's, NumPy's and Python's own generators: a test draws the same alone and after any other."""
    seed = zlib.crc32(f"{BASE} {name}".encode())
    fixed_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
