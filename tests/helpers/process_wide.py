"""What PyTorch keeps for the whole process, set for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def _set(value: T, get: Callable[[], T], put: Callable[[T], None]) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def threads(count: int) -> AbstractContextManager[None]:
    return _set(count, torch.get_num_threads, torch.set_num_threads)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return _set(dtype, torch.get_default_dtype, torch.set_default_dtype)


def on_threads(counts: Sequence[int], made: Callable[[], T]) -> list[T]:
    """What a function gives on so many threads each."""
    found = []
    for count in counts:
        with threads(count):
            found.append(made())
    return found
