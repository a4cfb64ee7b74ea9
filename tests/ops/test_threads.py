"""The number of threads changes no bit of any op's results, whatever the sizes (docs/numerics.md)."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastroute import use_backend
from fastroute.ops.efficient_routing.native import WIDEST_LINEAR
from tests.helpers.backends import needs_native
from tests.helpers.cases import evaluate
from tests.helpers.process_wide import on_threads
from tests.helpers.routing_cases import Size

from .calls import CALLS

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
_WIDTHS = st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 127])
_SIZES = st.builds(
    Size, st.integers(1, 3), st.sampled_from([1, 7, 9, 17, 33, 65, 129, 257, 513]), _WIDTHS.filter(lambda m: m > 1),
    _WIDTHS, _WIDTHS,
)  # fmt: skip
#: Ops that are PyTorch's own with a gradient.
_ARE_NATIVE = [name for name, call in CALLS.items() if call.op != "combine"]


@needs_native
@pytest.mark.parametrize("name", _ARE_NATIVE)
@hypothesis.settings(max_examples=12)  # of each of 44 calls
@hypothesis.given(size=_SIZES, dtype=st.sampled_from([F32, F64, BF16]))
@hypothesis.example(Size(1, 7, 7, 17), F32)
@hypothesis.example(Size(1, 9, 65, 65), F32)
@hypothesis.example(Size(1, 257, 16, 33), F32)
@hypothesis.example(Size(2, 257, 100, 17), F64)
@hypothesis.example(Size(1, 7, 127, 127, 127), F64)  # rows of an odd width, divided among threads
@hypothesis.example(Size(1, 400, 255, 257), F32)  # a product that is divided among threads
@hypothesis.example(Size(3, 301, 65, 65, 33), F32)
def test_bits_do_not_depend_on_the_number_of_threads(name: str, size: Size, dtype: torch.dtype) -> None:
    call = CALLS[name]
    hypothesis.assume(call.op != "efficient_routing" or size.m * size.d <= WIDEST_LINEAR)  # beyond, PyTorch's products
    case = call.case(size, dtype)
    case = replace(case, wrt=tuple(k for k in case.wrt if k != "prior"))  # whose gradient is PyTorch's own
    with use_backend("native"):
        one, *others = on_threads((1, 2, 3), lambda: evaluate(call.fn, case))
    for other in others:
        differ = [k for k, t in one.items() if t is not None and not torch.equal(t.nan_to_num(), other[k].nan_to_num())]  # type: ignore[union-attr]
        assert not differ
