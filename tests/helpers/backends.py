"""The backends that can run CPU tensors in this process, by name.

Triton's interpreter has a process of its own (``tests/kernels``).
"""

from __future__ import annotations

import pytest

from fastroute.ops._backends import BACKENDS, missing

HERE = tuple(name for name in reversed(BACKENDS) if name != "triton" and missing(name, "cpu") is None)

each_backend = pytest.mark.parametrize("backend", HERE)
