"""Work in several threads at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any


def in_threads(work: Callable[[int], Any], threads: int = 4) -> list[Any]:
    """What ``work`` gives in each thread, at a switch interval that shows races; the first error is raised."""
    found: list[Any] = [None] * threads
    before, start = sys.getswitchinterval(), threading.Barrier(threads)

    def run(k: int) -> None:
        start.wait()
        try:
            found[k] = work(k)
        except Exception as error:
            found[k] = error

    sys.setswitchinterval(1e-5)
    try:
        every = [threading.Thread(target=run, args=(k,)) for k in range(threads)]
        for thread in every:
            thread.start()
        for thread in every:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    for made in found:
        if isinstance(made, Exception):
            raise made
    return found
