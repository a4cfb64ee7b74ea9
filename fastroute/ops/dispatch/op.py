"""``dispatch``: samples sorted by the modules that their actions name; ``grouped_linear`` is what to do with that.

Axes: B samples, k modules that each takes, N = B k entries (entry n is of sample n // k), K modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import explained
from ..autograd import transformed
from ..backends import Case, decide, is_strict, note, offer, requested, taken
from ..checks import as_tensor, moved, shown, tensor
from ..host import has_numbers as has_numbers
from ..host import is_many as is_many
from ..host import is_wrapped as is_wrapped
from ..host import on_host as on_host
from ..host import read as read
from . import reference as reference
from . import schema as schema  # defines the compiled ops
from . import triton as triton  # implements one of them
from .contract import Plan as Plan
from .reference import bounds_of as bounds_of
from .reference import module_of_row as module_of_row

#: Entries that the CUDA C++ plan takes: one block of threads makes it (csrc/cuda/dispatch.cu).
NATIVE_ENTRIES = 16384
#: Modules whose counts fit that block's shared memory.
NATIVE_MODULES = 6142


def _native_refuses(case: Case) -> str | None:
    sizes = dict(case.sizes)
    if case.device == "cuda" and (sizes.get("N", 0) > NATIVE_ENTRIES or sizes.get("K", 0) > NATIVE_MODULES):
        return f"the CUDA C++ plan takes up to {NATIVE_ENTRIES} entries and {NATIVE_MODULES} modules"
    return None


offer("dispatch", "schema", plain="reference", native=_native_refuses, devices=("cpu", "cuda"))


def as_actions(actions: Any, rows: int, device: torch.device, name: str = "actions") -> Tensor:
    """[B] int64 on the device from what users give as one index per sample: a tensor, or what can be made one ([B] or
    [B, 1], any integer dtype)."""
    actions = as_tensor(name, actions, device)
    _integers(actions, name, "[B]")
    if actions.dim() == 2 and actions.shape[1] == 1:
        actions = actions[:, 0]
    if actions.dim() != 1 or actions.shape[0] != rows:
        raise ValueError(f"{name}: expected one per sample, shape [{rows}] or [{rows}, 1], got {shown(actions)}")
    return _indices(name, actions, device)


def as_entries(actions: Any, rows: int, device: torch.device, name: str = "actions") -> Tensor:
    """[B, k] int64 on the device from what users give as k indices per sample."""
    actions = as_tensor(name, actions, device)
    _integers(actions, name, "[B, k]")
    if actions.dim() != 2 or actions.shape[0] != rows or actions.shape[1] < 1:
        raise ValueError(f"{name}: expected k per sample, shape [{rows}, k], k at least 1, got {shown(actions)}")
    return _indices(name, actions, device)


def _integers(actions: Tensor, name: str, shape: str) -> None:
    if actions.dtype.is_floating_point or actions.dtype.is_complex or actions.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor {shape}, got {actions.dtype}")


def _indices(name: str, actions: Tensor, device: torch.device) -> Tensor:
    as_they_are = actions.dtype == torch.int64 and actions.device == device
    return actions if as_they_are else moved(name, actions, device, torch.int64)


@explained
def plan(actions: Tensor, modules: int, name: str = "actions") -> Plan:
    """Sort samples by the modules that their actions name.

    Args:
        actions: [B] or [B, k] int64. Negative ones match no module: those entries are dropped.
        modules: K. On a CPU an action of K or more raises IndexError; on a GPU it is dropped, and counted and raised
            under ``fastroute.strict``.
        name: what the caller calls ``actions``, for that error.

    Returns:
        ``Plan(order [N], offsets [K + 1], beyond [1], bounds, samples [N] or None, per_sample)``, int64: module k has
        the entries order[offsets[k]:offsets[k + 1]], in rising order, which are of samples order // k; dropped ones
        come last. ``bounds`` are the offsets as a list of ints on a CPU, else None.

    Examples:
        >>> plan = fastroute.ops.dispatch.plan(torch.tensor([2, 0, -1, 2]), modules=3)
        >>> plan.order.tolist(), plan.offsets.tolist()
        ([1, 0, 3, 2], [0, 1, 1, 3])
    """
    tensor(name, actions, "an integer tensor [B] or [B, k]")
    if actions.dtype != torch.int64:
        _integers(actions, name, "[B] or [B, k]")
        actions = actions.to(torch.int64)
    if actions.dim() not in (1, 2):
        raise ValueError(f"{name}: expected [B] or [B, k], got {shown(actions)}")
    per_sample = 1 if actions.dim() == 1 else actions.shape[1]
    flat = actions if actions.dim() == 1 else actions.reshape(-1)
    note("dispatch", flat, N=flat.shape[0], K=modules)
    backend = "reference" if transformed() else taken("dispatch", flat.device.type, flat.dtype)
    if backend == "native" and flat.is_cuda:  # which depends on sizes
        sizes = (("N", flat.shape[0]), ("K", modules))
        backend = decide(Case("dispatch", "cuda", flat.dtype, sizes), requested()).backend
    if backend == "reference":
        order, offsets, beyond = reference.plan(flat, modules)[:3]
    else:
        order, offsets, beyond = getattr(torch.ops.fastroute, f"_dispatch_plan_{backend}")(flat, modules)
    return finished(order, offsets, beyond, modules, name, per_sample)


def finished(
    order: Tensor, offsets: Tensor, beyond: Tensor, modules: int, name: str = "actions", per_sample: int = 1,
    bounds: list[int] | None = None,
) -> Plan:  # fmt: skip
    """The plan of what a backend made; its errors are those of :func:`plan`. ``bounds``: the offsets, if known."""
    bounds = on_host(offsets) if bounds is None else bounds
    _check_beyond(order, beyond, bounds, modules, name)
    return Plan(order, offsets, beyond, bounds, None if per_sample == 1 else order // per_sample, per_sample)


def check_all_named(plan: Plan, indices: Tensor, name: str) -> None:
    """IndexError for negative ones of a plan's indices, where looking costs nothing or ``strict`` asks for it.

    A negative action names no module; a task or an agent that is negative is a mistake.
    """
    if plan.bounds is not None:
        negative = indices.shape[0] - plan.bounds[-1]
    else:
        negative = int((indices < 0).sum()) if is_strict() and has_numbers(indices) else 0
    if negative:
        raise IndexError(f"{name}: expected indices of 0 or more, got {negative} that are negative")


def _check_beyond(order: Tensor, beyond: Tensor, bounds: list[int] | None, modules: int, name: str) -> None:
    """IndexError for actions out of range, where looking costs nothing or ``strict`` asks for it."""
    if bounds is None and not (is_strict() and has_numbers(beyond)):
        return
    if bounds is not None and bounds[-1] == order.shape[0]:
        return  # nothing was dropped
    if count := int(beyond):
        raise IndexError(f"{name}: expected indices below {modules}, got {count} of {order.shape[0]} out of range")
