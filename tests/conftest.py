"""Settings for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.helpers.interpreter import let_scalars_be_ints
from tests.helpers.poison import poisoned_memory

if os.environ.get("TRITON_INTERPRET") == "1":
    let_scalars_be_ints()

# The same examples on every machine and in every run; --hypothesis-profile=search looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, max_examples=40, deadline=None, database=None)
hypothesis.settings.register_profile("search", max_examples=500, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """Unwritten memory is NaN in every test of the module: ``pytestmark = pytest.mark.usefixtures("poisoned")``."""
    with poisoned_memory():
        yield
