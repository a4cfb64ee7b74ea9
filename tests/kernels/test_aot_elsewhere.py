"""Kernels compiled ahead of time for the other architectures than sm_90, each in its largest tile."""

from __future__ import annotations

from functools import partial

import pytest

from tests import aot


@pytest.mark.long
@pytest.mark.parametrize("arch", aot.OTHERS)
@pytest.mark.parametrize("op", aot.files())
def test_fits(op: str, arch: int) -> None:
    module = aot.file_of(op)
    cases = {name: partial(module.launches, case) for name, case in module.CASES.items()}
    found = aot.reports_of_largest(cases, arch)
    assert {r.kernel for r in found} == module.KERNELS
    for r in found:
        module.fits(r)
