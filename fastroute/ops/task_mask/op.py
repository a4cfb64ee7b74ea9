"""``task_mask``: a fixed binary mask of channels for every task, alone or fused with what surrounds it.

Strezoski, van Noord, Worring (2019), "Many Task Learning With Task Routing". Axes: B samples, C channels (axis 1), T
tasks.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..arguments import explained
from ..autograd import apply, asked_again, own, transformed
from ..backends import Case, is_strict, native_refuses, note, offer, taken, triton_refuses
from ..checks import flags, floating, integer, shown, tensor, together
from ..host import has_numbers, is_traced
from . import plain
from . import reference as reference
from . import schema as schema  # defines the compiled ops
from . import triton as triton  # implements some of them

_Task = TypeVar("_Task")
OP = "task_mask"


def _native_refuses(case: Case) -> str | None:
    if case.device == "cpu":
        return native_refuses(case)
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
    return None if case.dtype in dtypes else f"the CUDA C++ kernels take no {str(case.dtype).removeprefix('torch.')}"


offer(OP, "schema", native=_native_refuses, triton=triton_refuses)


def _run(backend: str, name: str, *args: Any) -> Any:
    """``plain.name``, or the registered op that does the same."""
    if backend == "reference":
        return getattr(plain, name)(*args)
    return getattr(torch.ops.fastroute, f"_task_mask_{name}_{backend}")(*args)


class _Gate(torch.autograd.Function):
    """Linear in x, and its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int, backend: str) -> Tensor:
        ctx.save_for_backward(mapping, tasks)
        ctx.options = task, backend
        return own(_run(backend, "gate", x, None, mapping, tasks, task))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _gate(grad, None, *ctx.saved_tensors, *ctx.options), None, None, None, None


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int, backend: str) -> Tensor:
        y = own(_run(backend, "rectify", x, mapping, tasks, task))
        ctx.save_for_backward(y, mapping, tasks)
        ctx.options = task, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _gate(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mapping: Tensor, tasks: Tensor | None, task: int, relu: bool, backend: str
    ) -> Tensor:
        _run(backend, "mask_", x, mapping, tasks, task, relu)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x if relu else None, mapping, tasks)
        ctx.options = task, backend
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _gate(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


def _gate(g: Tensor, y: Tensor | None, mapping: Tensor, tasks: Tensor | None, task: int, backend: str) -> Tensor:
    """The gradient of a mask, which is a mask again."""
    if asked_again(g):
        alive = reference.over(reference.live(mapping, tasks, task), g)
        return torch.where(alive if y is None else alive & (y > 0), g, 0)
    return own(_run(backend, "gate", g, y, mapping, tasks, task))


# ------------------------------------------------------------------------------------------------------ the public face


def _check_range(count: int, total: int, T: int, detail: str = "") -> None:
    if count:
        raise IndexError(f"task: expected tasks from 0 to {T - 1}, got {count} of {total} out of range{detail}")


def of_all(task: _Task) -> _Task:
    """A tensor of one task without its axis, as it is the task of all samples; anything else as it is."""
    if isinstance(task, Tensor) and task.dim() == 1 and task.shape[0] == 1:
        return task.reshape(())  # type: ignore[return-value]
    return task


def _as_task(task: int | Tensor, x: Tensor, T: int) -> tuple[Tensor | None, int]:
    """(tasks, task) as the reference takes them, in range where looking waits for nothing."""
    if not isinstance(task, Tensor):
        task = task if type(task) is int or isinstance(task, torch.SymInt) else integer("task", task)
        if task < 0 or task >= T:
            raise IndexError(f"task: expected a task from 0 to {T - 1}, got {task}")
        if torch.compiler.is_compiling():  # a number would be compiled in, a graph for every task
            return torch.full((), task, dtype=torch.int64, device=x.device), 0
        return None, task
    if task.dtype.is_floating_point or task.dtype.is_complex or task.dtype == torch.bool:
        raise TypeError(f"task: expected an int or an integer tensor, got {task.dtype}")
    if task.device != x.device:
        raise ValueError(f"task: expected a tensor on {x.device} like x, got one on {task.device}")
    task = of_all(task)
    if task.dim() > 1 or (task.dim() == 1 and task.shape[0] != x.shape[0]):
        raise ValueError(f"task: expected a scalar or one task per sample, shape [{x.shape[0]}], got {shown(task)}")
    if task.dtype != torch.int64:
        task = task.to(torch.int64)
    if isinstance(x, FakeTensor) or not has_numbers(task):
        return task, 0
    on_cpu = task.device.type == "cpu"
    if on_cpu and task.dim() == 0:
        return _as_task(int(task), x, T)
    if task.numel() and (on_cpu or is_strict()):
        least, most = torch.aminmax(task)
        if int(least) < 0 or int(most) >= T:
            count = int(((task < 0) | (task >= T)).sum())
            _check_range(count, task.numel(), T, f", the smallest {int(least)}, the largest {int(most)}")
    return task, 0


def prepared(op: str, x: Tensor, mapping: Tensor, task: int | Tensor) -> tuple[Tensor, Tensor | None, int, str]:
    """(mapping, tasks, task, backend), all checked."""
    tensor("x", x, "a floating-point tensor [B, C, ...]")
    floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected [B, C, ...], got {shown(x)}")
    tensor("mapping", mapping, "a tensor [T, C]")
    if mapping.dtype.is_complex:
        raise TypeError(f"mapping: expected a real tensor of 0 and 1, got {mapping.dtype}")
    C = x.shape[1]
    if mapping.dim() != 2 or mapping.shape[0] < 1 or mapping.shape[1] != C:
        raise ValueError(f"mapping: expected [T, {C}], the channels of x {shown(x)}, got {shown(mapping)}")
    together(("x", x), {"mapping": mapping})
    tasks, number = _as_task(task, x, mapping.shape[0])
    note(op, x, B=x.shape[0], C=C, T=mapping.shape[0])
    backend = taken(op, x.device.type, x.dtype)
    mapping = mapping.detach()
    if backend != "reference":
        mapping = mapping.to(torch.float32).contiguous()
    return mapping, tasks, number, backend


def _refuse_to_overwrite(x: Tensor) -> None:
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise ValueError("x: expected what can be overwritten for inplace=True, got a leaf that requires grad")
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"x: expected memory of its own for every element for inplace=True, got an expanded {shown(x)}"
        )


@explained
def task_mask(x: Tensor, mapping: Tensor, task: int | Tensor, *, relu: bool = False, inplace: bool = False) -> Tensor:
    """Keep the channels of each sample's task: y = x where mapping[task, c] is not 0, and exactly 0 elsewhere.

    What is in a dead channel is not looked at: NaN and infinity there become 0. The gradient is the true one, 0 in dead
    channels; it can be differentiated again.

    Args:
        x: [B, C, ...], at least two axes, any floating dtype and any strides.
        mapping: [T, C] of 0 and 1, the channels of each task. It has no gradient.
        task: the task, an int or an integer tensor, 0-d or [1]; or one for each sample, an integer tensor [B].
        relu: y = max(x, 0) in live channels instead.
        inplace: write into x, which is returned, so that autograd knows. Without ``relu`` live channels keep what they
            hold. torch.compile, a trace and vmap make a new tensor and copy it.

    Returns:
        y in x's shape, dtype and layout. A task tensor is not compiled in: one graph serves all tasks.

    Raises:
        IndexError: a task is not from 0 to T - 1. On a GPU (and under torch.compile or vmap), where only the device
            knows, such samples are zero; ``fastroute.strict`` counts them and raises.
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> mapping = torch.tensor([[1, 1, 0], [0, 1, 1]])
        >>> x = torch.ones(2, 3)
        >>> fastroute.functional.task_mask(x, mapping, torch.tensor([0, 1]))
        tensor([[1., 1., 0.],
                [0., 1., 1.]])
    """
    mapping, tasks, number, backend = prepared(OP, x, mapping, task)
    flags(relu=relu, inplace=inplace)
    if inplace:
        _refuse_to_overwrite(x)
    if transformed():
        y = reference.task_mask(x, mapping, number if tasks is None else tasks, relu)
        return x.copy_(y) if inplace else y
    learns = x.requires_grad and torch.is_grad_enabled()
    of_a_graph = torch.compiler.is_compiling() or (learns and is_traced())  # which knows no function in place
    if inplace and not of_a_graph and not x.is_neg():  # its memory holds other numbers
        if learns:
            return _InPlace.apply(x, mapping, tasks, number, relu, backend)
        _run(backend, "mask_", x, mapping, tasks, number, relu)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)
        return x
    if relu:
        y = apply(_Rectify, x, mapping, tasks, number, backend)
    else:
        y = apply(_Gate, x, mapping, tasks, number, backend)
    return x.copy_(y) if inplace else y
