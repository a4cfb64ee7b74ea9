"""The backends that can run CPU tensors in this process, by name.

Triton's interpreter has a process of its own (``tests/kernels``).
"""

from __future__ import annotations

import pytest

from fastroute.ops.backends import BACKENDS, missing

HERE = tuple(name for name in reversed(BACKENDS) if name != "triton" and missing(name, "cpu") is None)

#: With Triton, where this process interprets it; its kernels take no float64.
FLOAT32 = HERE + (("triton",) if missing("triton", "cpu") is None else ())

each_float32_backend = pytest.mark.parametrize("backend", FLOAT32)
each_backend = pytest.mark.parametrize("backend", HERE)
needs_native = pytest.mark.skipif("native" not in HERE, reason="the C++ extension is not built")
