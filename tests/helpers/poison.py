"""Memory that nobody has written holds NaN, or the largest integer.

PyTorch itself does the filling, beneath every way to ask for memory: ``torch.empty``, ``Tensor.new_empty``,
``empty_like``, ``empty_strided``, and those of the C++ extension and of Triton's launchers, on every device.
``tests/test_helpers.py`` shows it. What C++ allocates for itself (``new[]``) is filled by the sanitizer's allocator
in ``tests/cpp``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]
