"""Where ops are tested: memory is poisoned; kernels run compiled on a GPU, or interpreted in a process of their own.

Triton reads TRITON_INTERPRET when it is imported, and other tests import it too, so nothing here sets the variable:
``tests/kernels/test_interpreted.py`` runs the interpreter's share in processes that chose so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.helpers.poison import poisoned_memory

_runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if _runs else ["*/test_kernels.py"]
#: On a GPU poison asks cuBLAS for settings of its own, and fills the largest tensors; the others compute nothing here.
_CLEAN = ("test_gpu", "test_aot", "test_plan", "test_cpp")


@pytest.fixture(autouse=True, scope="module")
def _unwritten_memory_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """See ``tests/helpers/poison.py``."""
    if request.path.stem in _CLEAN:
        yield
        return
    with poisoned_memory():
        yield
