"""``dispatch``: samples sorted by the module that each one's action names, and linear modules over the sorted rows.

Axes: B samples, N rows (B, or B times the rows of one sample), K modules, F features in, O features out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import dispatch as reference
from ..reference.dispatch import Plan as Plan
from ..reference.dispatch import module_of_row as module_of_row
from ..reference.dispatch import on_host as on_host
from ..reference.dispatch import read as read
from . import _native_dispatch as _native_dispatch  # defines the native ops
from ._backends import Case, is_strict, native_refuses, note, offer, taken
from ._checks import shown, tensor


def _refuses(case: Case) -> str | None:
    return None if case.dtype == torch.int64 else native_refuses(case)  # a plan is made of integers


offer("dispatch", "native", "fastroute.ops._native_dispatch", _refuses)
offer("dispatch", "reference", "fastroute.reference.dispatch", lambda case: None)


def _is_native(t: Tensor, **sizes: int) -> bool:
    note("dispatch", t, **sizes)
    return bool(taken("dispatch", t.device.type, t.dtype) == "native")


def as_actions(actions: Tensor, rows: int, device: torch.device, name: str = "actions") -> Tensor:
    """[B] int64 on the device from what users give as one index per sample ([B] or [B, 1], any integer dtype)."""
    tensor(name, actions, "an integer tensor [B]")
    if actions.dtype.is_floating_point or actions.dtype.is_complex or actions.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor [B], got {actions.dtype}")
    if actions.dim() == 2 and actions.shape[1] == 1:
        actions = actions[:, 0]
    if actions.dim() != 1 or actions.shape[0] != rows:
        raise ValueError(f"{name}: expected one per sample, shape [{rows}] or [{rows}, 1], got {shown(actions)}")
    as_they_are = actions.dtype == torch.int64 and actions.device == device
    return actions if as_they_are else actions.to(device, torch.int64)


def plan(actions: Tensor, modules: int, name: str = "actions") -> Plan:
    """Sort samples by the module that each one's action names.

    Args:
        actions: [B] int64. Negative ones match no module: their samples are dropped.
        modules: K. On a CPU an action of K or more raises IndexError; on a GPU it is dropped, and counted and raised
            under ``fastroute.strict``.
        name: what the caller calls ``actions``, for that error.

    Returns:
        ``Plan(order [B], offsets [K + 1], beyond [1], bounds)``, int64: module k has the samples
        order[offsets[k]:offsets[k + 1]], in rising order; dropped ones come last. ``bounds`` are the offsets as a list
        of ints on a CPU, else None.
    """
    if _is_native(actions, B=actions.shape[0], K=modules):
        made = Plan(*torch.ops.fastroute._dispatch_plan_native(actions, modules))
    else:
        made = reference.plan(actions, modules)
    bounds = on_host(made.offsets)
    _check_beyond(made, bounds, modules, name)
    return made._replace(bounds=bounds)


def _check_beyond(made: Plan, bounds: list[int] | None, modules: int, name: str) -> None:
    """IndexError for actions out of range, where looking costs nothing or ``strict`` asks for it."""
    if bounds is None and (torch.compiler.is_compiling() or type(made.beyond) is not Tensor or not is_strict()):
        return
    if bounds is not None and bounds[-1] == made.order.shape[0]:
        return  # nothing was dropped
    if count := int(made.beyond):
        raise IndexError(f"{name}: expected indices below {modules}, got {count} of {made.order.shape[0]} out of range")


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, without its search for torch.func's leftovers where torch.func is not at work.

    It looks at every argument in Python, and here they are a parameter of every module.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor | None, order: Tensor, offsets: Tensor, takes: bool, puts: bool, K: int, has_weights: bool,
        native: bool, bounds: list[int] | None, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        weights = parameters[:K] if has_weights else ()
        biases = parameters[K if has_weights else 0 :]
        ctx.options = takes, puts, K, native, bounds, len(biases) > 0
        ctx.save_for_backward(x, order, offsets, *weights)
        take, put = order if takes else None, order if puts else None
        x = order if x is None else x  # tables are only told the rows
        if native:
            return torch.ops.fastroute._grouped_linear_native(x, take, put, offsets, weights, biases)  # type: ignore[no-any-return]
        return reference.forward(x, take, put, offsets, weights, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        takes, puts, K, native, bounds, has_biases = ctx.options
        x, order, offsets, *weights = ctx.saved_tensors
        x = order if x is None else x
        take, put = order if takes else None, order if puts else None
        needs = ctx.needs_input_grad
        first_bias = 9 + len(weights)
        wants = needs[0] and bool(weights), any(needs[9:first_bias]), has_biases and any(needs[first_bias:])
        if native:
            made = torch.ops.fastroute._grouped_linear_native_backward(
                grad.contiguous(), x, take, put, offsets, weights, K, *wants, bounds is None
            )
        else:
            made = reference.backward(grad, x, take, put, offsets, weights, K, wants)
        dx, dw, db = made
        nothing: list[Any] = [None] * K
        per_module = [dw if wants[1] else nothing] * bool(weights) + [db if wants[2] else nothing] * has_biases
        if bounds is not None and any(a == b for a, b in pairwise(bounds)):
            per_module = [
                [None if bounds[k] == bounds[k + 1] else g for k, g in enumerate(grads)] for grads in per_module
            ]
        return (dx if wants[0] else None, *[None] * 8, *(g for grads in per_module for g in grads))


def _rows(x: Tensor, plan: Plan, weights: Sequence[Tensor], any_number: bool) -> Tensor:
    """x, if it is what the modules take, with dense rows."""
    if x.dim() != 2 or x.shape[1] != weights[0].shape[-1]:
        raise ValueError(f"x: expected [N, {weights[0].shape[-1]}], as the modules take, got {shown(x)}")
    if not any_number and x.shape[0] != plan.order.shape[0]:
        raise ValueError(f"x: expected the plan's {plan.order.shape[0]} rows, got {shown(x)}")
    return x.contiguous() if x.shape[1] > 1 and x.stride(1) != 1 else x


def grouped_linear(
    x: Tensor | None,
    plan: Plan,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    is_sorted: bool = False,
    keep_sorted: bool = False,
    keep_empty: bool = False,
) -> Tensor:
    """One linear module per row: y_b = W_k x_b + b_k, where k is the module of row b in the plan.

    Rows that the plan drops are zero, and so is their gradient. With no ``weights``, y_b = b_k: a row of a table.

    Args:
        x: [N, F] float32, float64, bfloat16 (or, on the reference backend, any floating dtype), any row stride. Not
            looked at without weights, and may be None then.
        plan: of the N rows, from :func:`plan`.
        weights: K tensors [O, F] in x's dtype, or none; each stays a parameter of its own.
        biases: K tensors [O], or none; without weights K tensors [1, O].
        is_sorted: x is already in the plan's order.
        keep_sorted: leave y in the plan's order.
        keep_empty: give modules without a row zeros as gradients, not None. (On a GPU and under torch.compile, where
            counts are not read, they always get zeros.)

    Returns:
        y [N, O], contiguous. Sums are accumulated in float32 for bfloat16. There is no second derivative.

    Raises:
        ValueError, TypeError: x is not of the plan's rows, or not of the modules' width or dtype.
    """
    parameters = (*weights, *biases)
    if not weights:
        x = None
    elif x is None:
        raise ValueError("x: expected a tensor [N, F] to multiply, got None")
    else:
        x = _rows(x, plan, weights, any_number=is_sorted and keep_sorted)
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            x, parameters = x.to(dtype), tuple(p.to(dtype) for p in parameters)
    dtype = parameters[0].dtype if x is None else x.dtype
    for p in parameters:
        if p.dtype != dtype:
            raise TypeError(f"x: expected the modules' dtype {p.dtype}, got {dtype}")
    K, (N, F) = len(weights or biases), (plan.order.shape[0], 0) if x is None else x.shape
    native = _is_native(parameters[0], N=N, K=K, F=F, O=parameters[0].shape[0 if weights else -1])
    made: Tensor = _apply(
        _GroupedLinear,
        x,
        plan.order,
        plan.offsets,
        not is_sorted,
        not keep_sorted,
        K,
        len(weights) > 0,
        native,
        None if keep_empty else plan.bounds,
        *parameters,
    )
    return made
