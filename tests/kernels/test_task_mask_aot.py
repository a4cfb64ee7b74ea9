"""Every kernel of ``task_mask`` compiled for three architectures, channels first and last."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests import aot

CASES = ("first-fp32", "last-bf16")
KERNELS = {"mask_kernel", "sums_kernel", "statistics_kernel", "gradients_kernel", "normalise_kernel"}


def launches(case: str) -> Iterator[Any]:
    """Mask, ReLU, their gradient, in place; BatchNorm in training and not; one task and many."""
    import torch

    from fastroute.kernels import task_mask

    place, name = case.split("-")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    x = torch.empty(64, 256, 32, 32, dtype=dtype, device="meta")
    if place == "last":
        x = x.to(memory_format=torch.channels_last)
    mapping, each = torch.empty(20, 256, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
    channels = [torch.empty(256, device="meta") for _ in range(6)]
    for tasks in (None, each):
        task = mapping, tasks, 3
        yield from aot.record(lambda task=task: task_mask.gate(x, x, *task))
        yield from aot.record(lambda task=task: task_mask.gate(x, None, *task))
        yield from aot.record(lambda task=task: task_mask.rectify(x, *task))
        yield from aot.record(lambda task=task: task_mask.mask_(x, *task, False))
        for training in (True, False):
            running, parameters, (mean, scale) = channels[:2], channels[2:4], channels[4:]
            yield from aot.record(
                lambda t=task, on=training: task_mask.batch_norm(x, *t, *running, *parameters, on, 0.1, 1e-5, True)  # noqa: B023
            )
            yield from aot.record(
                lambda t=task, on=training: task_mask.batch_norm_backward(
                    x, x, None, *t, *running, *parameters, mean, scale, on, 1e-5, True, True  # noqa: B023
                )
            )  # fmt: skip


@functools.cache
def reports(case: str) -> list[aot.Report]:
    return aot.report_of(__file__, case)


@pytest.mark.parametrize("case", CASES)
def test_fits(case: str) -> None:
    """Shared memory is what a reduction takes. Older Tritons spill a little on sm_90, all on sm_100."""
    found = reports(case)
    assert {r.arch for r in found} == set(aot.SHARED_LIMIT) and {r.kernel for r in found} == KERNELS
    for r in found:
        assert r.stack <= {80: 0, 90: aot.SPARE, 100: 8}[r.arch], r
        assert r.shared <= 48 << 10, r


if __name__ == "__main__":
    archs = [int(a) for a in sys.argv[2:]] or list(aot.SHARED_LIMIT)
    aot.print_reports([(sys.argv[1], list(launches(sys.argv[1])))], archs)
