"""Layers run with poisoned memory, all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastroute import use_backend
from tests.helpers.backends import HERE


@pytest.fixture(autouse=True, scope="module")
def _unwritten_memory_is_nan(poisoned: None) -> None:
    """See ``tests/helpers/poison.py``."""


@pytest.fixture(params=HERE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op's, in the test that asks for it, or in all of a file whose ``pytestmark`` does."""
    with use_backend(request.param):
        yield request.param
