"""Layers run with poisoned memory, all of them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _unwritten_memory_is_nan(poisoned: None) -> None:
    """See ``tests/helpers/poison.py``."""
