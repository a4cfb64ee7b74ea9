"""``task_mask`` under the sanitizers, everything it is given between fences."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

import fastroute.ops.task_mask.schema  # noqa: F401
from fastroute.ops.batch_norm_mask_relu import plain as batch_norm_mask_relu_plain
from fastroute.ops.task_mask import plain as task_mask_plain
from fastroute.ops.task_mask import reference as reference
from tests.helpers.layouts import Fenced
from tests.helpers.opcheck import assert_same

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
OPS = torch.ops.fastroute

#: [B, C, ...]: below, at and beyond vectors and threads' worth; empty ones.
SHAPES = ((1, 1), (3, 5), (2, 17, 1), (2, 3, 7), (2, 16, 4, 4), (3, 19, 5, 3), (0, 3, 2), (2, 4, 0), (9, 33, 17, 16))
T = 4


def laid_out(layout: str, *shape: int, dtype: torch.dtype) -> tuple[Fenced, Tensor]:
    """Random numbers in a buffer with fences, and the view of it that has the shape."""
    if layout == "channels_last":
        fence = Fenced(torch.randn(shape[0], *shape[2:], shape[1]).to(dtype))
        return fence, fence.tensor.movedim(-1, 1)
    if layout == "gappy":  # neither axis dense, and spatial axes that do not join
        fence = Fenced(torch.randn(*shape[:-1], 2 * shape[-1] + 1).to(dtype))
        return fence, fence.tensor[..., 1::2]
    fence = Fenced(torch.randn(shape).to(dtype))
    return fence, fence.tensor


def task_masks() -> None:
    for shape, dtype, layout, relu in product(
        SHAPES, (F32, F64, BF16), ("contiguous", "channels_last", "gappy"), (False, True)
    ):
        B, C = shape[:2]
        mapping = Fenced((torch.rand(T, C) < 0.5).float())
        each = Fenced(torch.randint(-1, T + 1, (B,)))
        (at_x, x), (at_g, g) = (laid_out(layout, *shape, dtype=dtype) for _ in range(2))
        for tasks in (None, torch.tensor(2), each.tensor):
            task = mapping.tensor, tasks, 1
            made = OPS._task_mask_rectify_native(x, *task) if relu else OPS._task_mask_gate_native(x, None, *task)
            expected = task_mask_plain.rectify(x, *task) if relu else task_mask_plain.gate(x, None, *task)
            assert torch.equal(made, expected)
            y = made if relu else None
            assert torch.equal(OPS._task_mask_gate_native(g, y, *task), task_mask_plain.gate(g, y, *task))
            OPS._task_mask_mask__native(x, *task, relu)
            assert torch.equal(x, expected)
            x.copy_(torch.randn(shape))
        assert all(f.intact() for f in (mapping, each, at_x, at_g))


def masked_batch_norms() -> None:
    for shape, dtype, layout, relu, training in product(
        SHAPES[1:], (F32, F64, BF16), ("contiguous", "channels_last"), (False, True), (False, True)
    ):
        B, C = shape[:2]
        mapping = Fenced((torch.rand(T, C) < 0.5).float())
        each = Fenced(torch.randint(-1, T + 1, (B,)))
        (at_x, x), (at_g, g) = (laid_out(layout, *shape, dtype=dtype) for _ in range(2))
        fences = [Fenced(torch.rand(C, dtype=F64 if dtype == F64 else F32) + 0.5) for _ in range(4)]
        running, parameters = [f.tensor for f in fences[:2]], [f.tensor for f in fences[2:]]
        for tasks in (None, each.tensor):
            task = mapping.tensor, tasks, 1
            copies = [t.clone() for t in running]
            made = OPS._batch_norm_mask_relu_native(x, *task, *running, *parameters, training, 0.1, 1e-5, relu)
            given, options = (*task, *running, *parameters), (training, 1e-5, relu, True)
            grads = OPS._batch_norm_mask_relu_native_backward(g, x, None, *given, *made[1:], *options)
            if x.numel() == 0:
                continue
            expected = batch_norm_mask_relu_plain.batch_norm(x, *task, *copies, *parameters, training, 0.1, 1e-5, relu)
            y, *statistics = expected
            wanted = batch_norm_mask_relu_plain.batch_norm_backward(g, x, y, *given, *statistics, *options)
            for found, want in zip((*made, *grads, *running), (*expected, *wanted, *copies), strict=True):
                if dtype == F64:
                    assert_same(found, want, f"{shape} {layout}")
                assert found.isfinite().all()
        assert all(f.intact() for f in (mapping, each, at_x, at_g, *fences))
