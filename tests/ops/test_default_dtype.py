"""What PyTorch takes for numbers without a dtype changes nothing: a float times a bool tensor has that one."""

from __future__ import annotations

import pytest
import torch

from fastroute import use_backend
from tests.helpers.backends import each_backend
from tests.helpers.cases import evaluate
from tests.helpers.process_wide import default_dtype
from tests.helpers.routing_cases import Size

from .calls import CALLS

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@each_backend
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
def test_the_default_dtype_changes_no_bit(backend: str, name: str, dtype: torch.dtype) -> None:
    call = CALLS[name]
    case = call.case(Size(2, 9, 4, 5, 3), dtype)
    found = []
    for other in (F32, F64, BF16):
        with default_dtype(other), use_backend(backend):
            found.append(evaluate(call.fn, case))
    for results in found[1:]:
        for key, expected in found[0].items():
            got = results[key]
            assert (got is None) == (expected is None)
            assert got is None or expected is None or (got.dtype == expected.dtype and torch.equal(got, expected)), key
