"""``batch_norm_mask_relu``: batch norm, the mask of a task, ReLU, as one op and its gradient.

Strezoski, van Noord, Worring (2019), "Many Task Learning With Task Routing". Axes: B samples, C channels (axis 1), T
tasks.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from ..arguments import explained
from ..autograd import asked_again, constant, own, through, transformed
from ..backends import offer, triton_refuses
from ..checks import at_least_zero, flags, floating, shape, share, shown, together
from ..masked import only
from ..task_mask.op import prepared
from ..task_mask.reference import live
from . import plain, reference
from . import schema as schema  # defines the compiled ops
from . import triton as triton  # implements some of them

OP = "batch_norm_mask_relu"

offer(OP, "schema", triton=triton_refuses)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int, running_mean: Tensor | None,
        running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float,
        eps: float, relu: bool, backend: str, functional: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        running: tuple[Tensor | None, ...] = running_mean, running_var
        if functional:
            running = tuple(None if t is None else t.clone() for t in running)
        op: Any = plain.batch_norm if backend == "reference" else getattr(torch.ops.fastroute, f"_{OP}_{backend}")
        y, mean, scale = op(x, mapping, tasks, task, *running, weight, bias, training, momentum, eps, relu)
        y = own(y)
        # the compiled backends find out again, from x, where y is positive
        kept = y if relu and backend == "reference" else None
        statistics = (None, None) if training else running
        ctx.save_for_backward(x, kept, mapping, tasks, *statistics, weight, bias, mean, scale)
        ctx.options = task, training, eps, relu, backend
        ctx.set_materialize_grads(False)
        if not functional:
            return (y,)
        made = tuple(t for t in running if t is not None)
        ctx.mark_non_differentiable(*made)
        return (y, *made)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 14
        task, training, eps, relu, backend = ctx.options
        x, y, mapping, tasks, *statistics = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if asked_again(grad):
            running, of_whom = statistics[:2], task if tasks is None else tasks

            def definition(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
                args = x, mapping, of_whom, *running, weight, bias, training, 0.0, eps, relu
                return [reference.batch_norm_mask_relu(*args)]

            inputs = x, *statistics[2:4]
            dx, dw, db = through(definition, inputs, (needs[0], needs[6], needs[7]), [grad])
            return (dx, *[None] * 5, dw, db, *[None] * 6)
        wants = [needs[0], needs[6], needs[7]]
        op: Any = plain.batch_norm_backward
        if backend != "reference":
            op = getattr(torch.ops.fastroute, f"_{OP}_{backend}_backward")
        made = op(grad, x, y, mapping, tasks, task, *statistics, training, eps, relu, needs[0])
        dx, dw, db = (g if want else None for g, want in zip(made, wants, strict=True))
        if needs[6] or needs[7]:  # a channel that no sample keeps may have a deviation of NaN
            ever = live(mapping, tasks, task).any(0)
            dw, db = (None if g is None else only(g, ever) for g in (dw, db))
        return (dx, *[None] * 5, dw, db, *[None] * 6)


def _dense(x: Tensor) -> Tensor:
    """x, if it is contiguous or has its channels last; else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


@explained
def batch_norm_mask_relu(
    x: Tensor,
    mapping: Tensor,
    task: int | Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    relu: bool = True,
) -> Tensor:
    """``torch.nn.functional.batch_norm``, then ``task_mask``, then max(., 0): y = max(norm(x)_c, 0) in live channels.

    Every channel is counted, dead ones too: in training, statistics are those of the whole batch and the running ones
    are updated as by ``batch_norm``, whatever the tasks. The gradient of what is masked is exactly 0, and a channel
    that no sample keeps gives none to weight and bias, whatever it holds.

    Args:
        x: [B, C, ...], at least two axes, floating.
        mapping, task: as in :func:`task_mask`.
        running_mean, running_var: [C], written in training; None: not kept (training only). They have no gradient.
        weight, bias: [C], or None.
        training: normalise with the batch's statistics, not the running ones.
        momentum: share of the batch's statistics in the new running ones, from 0 to 1.
        eps: added to the variance, 0 or more.
        relu: rectify, too.

    Returns:
        y in x's shape and dtype; in its layout, if that is contiguous or channels last. A second derivative goes
        through plain PyTorch.

    Raises:
        IndexError, ValueError, TypeError: as :func:`task_mask`; a batch of one value per channel in training.

    Examples:
        >>> x, mapping = torch.randn(2, 4, 5, 5), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]])
        >>> mean, var, gain, bias = torch.zeros(4), torch.ones(4), torch.ones(4), torch.zeros(4)
        >>> y = fastroute.functional.batch_norm_mask_relu(x, mapping, 1, mean, var, gain, bias, True, 0.1, 1e-5)
        >>> (y.amax((0, 2, 3)) > 0).tolist()
        [False, True, True, False]
    """
    mapping, tasks, number, backend = prepared(OP, x, mapping, task)
    flags(training=training, relu=relu)
    if not 0 <= momentum <= 1:
        share("momentum", momentum)
    if not 0 <= eps < inf:
        at_least_zero("eps", eps)
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    together(("x", x), given)
    for name, t in given.items():
        if t is not None:
            shape(name, t, (x.shape[1],), "C")
            floating(name, t)
    for one, other in (("running_mean", "running_var"), ("running_var", "running_mean")):
        if given[one] is None and (given[other] is not None or not training):
            raise ValueError(
                f"{one}: expected a tensor [C] {'with ' + other if training else 'in evaluation'}, got None"
            )
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"x: expected more than 1 value per channel when training, got {shown(x)}")
    running_mean, running_var = constant(running_mean), constant(running_var)
    if x.numel() == 0:  # nothing to mask; torch knows what an empty batch leaves alone
        return torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if backend != "reference":
        x = _dense(x)
    if transformed():
        args = running_mean, running_var, weight, bias, training, momentum, eps, relu
        return reference.batch_norm_mask_relu(x, mapping, number if tasks is None else tasks, *args)
    functional = training and running_mean is not None and torch.compiler.is_compiling()
    y, *running = _BatchNorm.apply(
        x, mapping, tasks, number, running_mean, running_var, weight, bias, training, momentum, eps, relu, backend,
        functional,
    )  # fmt: skip
    for old, new in zip((running_mean, running_var), running, strict=False):
        old.copy_(new)  # type: ignore[union-attr]
    return y
