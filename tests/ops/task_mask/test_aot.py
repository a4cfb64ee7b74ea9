"""Every kernel of ``task_mask`` compiled for three architectures, channels first and last."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import pytest

from tests import aot

CASES = {"first-fp32": ("first", "float32"), "last-bf16": ("last", "bfloat16")}
FORMS = tuple(itertools.product((False, True), (True, False)))  #: many tasks, in training
KERNELS = {"mask_kernel", "sums_kernel", "statistics_kernel", "gradients_kernel", "normalise_kernel"}


def launches(case: tuple[str, str]) -> Iterator[Any]:
    import torch

    place, dtype = case
    x = torch.empty(64, 256, 32, 32, dtype=getattr(torch, dtype), device="meta")
    if place == "last":
        x = x.to(memory_format=torch.channels_last)
    yield from launches_of(x)


def launches_of(x: Any, forms: Collection[tuple[bool, bool]] = FORMS) -> Iterator[Any]:
    """Mask, ReLU, their gradient, in place; BatchNorm in training and not; one task and many: in these forms."""
    import torch

    from fastroute.kernels import batch_norm_mask_relu, task_mask

    def forward(t: Any, r: Any, p: Any, on: bool) -> Any:
        return batch_norm_mask_relu.forward(x, *t, *r, *p, on, 0.1, 1e-5, True)

    def backward(t: Any, r: Any, p: Any, on: bool, statistics: Any) -> Any:
        return batch_norm_mask_relu.backward(x, x, None, *t, *r, *p, *statistics, on, 1e-5, True, True)

    B, C = x.shape[:2]
    mapping, each = torch.empty(20, C, device="meta"), torch.empty(B, dtype=torch.int64, device="meta")
    channels = [torch.empty(C, device="meta") for _ in range(6)]
    for many in sorted({many for many, _ in forms}):
        task = mapping, each if many else None, 3
        yield from aot.record(lambda task=task: task_mask.gate(x, x, *task))
        yield from aot.record(lambda task=task: task_mask.gate(x, None, *task))
        yield from aot.record(lambda task=task: task_mask.rectify(x, *task))
        yield from aot.record(lambda task=task: task_mask.mask_(x, *task, False))
        for training in [training for how, training in forms if how == many and B * x[0, 0].numel() > training]:
            running, parameters, (mean, scale) = channels[:2], channels[2:4], channels[4:]
            given = {"t": task, "r": running, "p": parameters, "on": training}
            yield from aot.record(partial(forward, **given))
            yield from aot.record(partial(backward, **given, statistics=(mean, scale)))


def check(found: list[aot.Report]) -> None:
    assert {r.kernel for r in found} == KERNELS
    for r in found:
        fits(r)


def fits(r: aot.Report) -> None:
    """Shared memory is what a reduction takes. Nothing spills on sm_80 and sm_90, nor beyond the cache on sm_100."""
    assert aot.spills_stay_near(r) if r.arch == 100 else r.stack <= aot.SPARE, r
    assert r.shared <= 48 << 10, r
    if r.kernel in ("mask_kernel", "sums_kernel", "normalise_kernel"):  # sums read a shift of each channel
        assert r.loads.get("2", 0) <= (r.kernel == "sums_kernel") and "2" not in r.stores, r


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_fits(name: str) -> None:
    check(aot.reports(name, partial(launches, CASES[name])))
