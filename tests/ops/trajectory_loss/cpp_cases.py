"""``trajectory_loss`` under the sanitizers: every class, tiles of samples and what is around them, between fences."""

from __future__ import annotations

from itertools import product

import torch

import fastroute.ops.trajectory_loss.schema  # noqa: F401
from fastroute.ops.trajectory_loss import plain
from fastroute.ops.trajectory_loss import reference as reference
from fastroute.ops.trajectory_loss.contract import ALGORITHMS
from fastroute.ops.trajectory_loss.op import laid_out
from tests.helpers.layouts import Fenced, strided
from tests.helpers.opcheck import assert_same
from tests.helpers.trajectory_losses import arguments, loss_case

F64 = torch.float64
OPS = torch.ops.fastroute


def trajectory_losses() -> None:
    for B, dtype, masked, own, want in product(
        (0, 1, 255, 256, 257, 700), (torch.float32, F64, torch.bfloat16, torch.float16), *[(False, True)] * 3
    ):
        case = loss_case(ALGORITHMS, B, dtype, masked=masked, own=own)
        fences = {k: Fenced(t) for k, t in case.inputs.items() if t is not None}
        given = arguments(ALGORITHMS, {k: f.tensor for k, f in fences.items()})
        args = (given["f"], *laid_out(**given), 0.7, own, want)
        loss, slopes = OPS._trajectory_loss_native(*args)
        assert loss.isfinite().all() and slopes.isfinite().all(), "something was not written"
        grads = [*OPS._trajectory_loss_native_backward(loss, slopes), *OPS._trajectory_loss_native_backward(
            torch.ones((), dtype=loss.dtype).expand(B), slopes)]  # fmt: skip
        assert all(g.isfinite().all() for g in grads)
        if dtype == F64:
            for found, expected in zip((loss, slopes), plain.forward(*args), strict=True):
                assert_same(found, expected)
        assert all(f.intact() for f in fences.values())
        apart = arguments(ALGORITHMS, {k: strided(f.tensor) for k, f in fences.items()})
        again, _ = OPS._trajectory_loss_native(apart["f"], *laid_out(**apart), 0.7, own, want)
        assert torch.equal(again, loss)
    empty = torch.zeros(3)
    assert not OPS._trajectory_loss_native(empty, [], [], [], [], 1.0, True, True)[0].any()
