"""Ops run with poisoned memory, all of them; kernels run compiled on a GPU, or interpreted in a process of their own.

Triton reads TRITON_INTERPRET when it is imported, and other tests import it too, so nothing here sets the variable:
``tests/kernels/test_interpreted.py`` runs the interpreter's share in processes that chose so.
"""

from __future__ import annotations

import os

import pytest
import torch

_runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if _runs else ["*/test_kernels.py"]


@pytest.fixture(autouse=True, scope="module")
def _unwritten_memory_is_nan(poisoned: None) -> None:
    """See ``tests/helpers/poison.py``."""
