"""Dispatch by action in plain PyTorch: which entries go to which module.

Axes: B samples, k modules that each takes, N = B k entries (entry n is of sample n // k), K modules.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Entries sorted by module, in their own order within one; those that match no module come last."""

    order: Tensor  #: [N] int64, the sorted entries
    offsets: Tensor  #: [K + 1] int64, module k has order[offsets[k]:offsets[k + 1]]
    beyond: Tensor  #: [1] int64, how many actions were K or more: those are dropped like negative ones
    bounds: list[int] | None = None  #: the offsets as numbers, where reading them costs nothing
    samples: Tensor | None = None  #: [N] int64, the sample of each sorted entry; None where that is ``order``
    per_sample: int = 1  #: k


def plan(actions: Tensor, modules: int) -> Plan:
    """actions [N] int64 -> their plan."""
    key = torch.where((actions >= 0) & (actions < modules), actions, modules)
    N = key.shape[0]
    unique = torch.compiler.is_exporting()  # ONNX knows no stable sort
    order = (key * N + torch.arange(N, device=key.device)).argsort() if unique else key.argsort(stable=True)
    bounds = torch.arange(modules + 1, device=actions.device)
    offsets = (key[:, None] < bounds).sum(0) if _compares(key) else torch.searchsorted(key[order], bounds)
    return Plan(order, offsets, (actions >= modules).sum().reshape(1))


def is_wrapped(t: Tensor) -> bool:
    """Whether it stands for many under torch.vmap."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(t)  # type: ignore[no-any-return]


def _compares(t: Tensor) -> bool:
    """Whether to count by comparisons, as vmap and ONNX know no search."""
    return torch.compiler.is_exporting() or is_wrapped(t)


def is_many(t: Tensor) -> bool:
    """Whether torch.vmap has made many of it, whose numbers nobody may read."""
    if not is_wrapped(t):
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def has_numbers(t: Tensor) -> bool:
    """Whether there are any to be looked at: not under torch.compile, in a fake tensor, in one of many of a vmap, on
    the meta device."""
    return type(t) is Tensor and not torch.compiler.is_compiling() and not is_wrapped(t) and not t.is_meta


def on_host(offsets: Tensor) -> list[int] | None:
    """The numbers, where reading them waits for nothing; else None."""
    if offsets.device.type != "cpu" or not has_numbers(offsets):
        return None
    return offsets.tolist()  # type: ignore[no-any-return]


def read(offsets: Tensor) -> list[int]:
    """The numbers, waiting for the device if need be."""
    return offsets.tolist()  # type: ignore[no-any-return]


def bounds_of(plan: Plan) -> list[int]:
    """The offsets as numbers; on the meta device, which has none, those of entries that are spread evenly."""
    if plan.bounds is not None:
        return plan.bounds
    if plan.offsets.is_meta:
        K = plan.offsets.shape[0] - 1
        return [plan.order.shape[0] * k // K for k in range(K + 1)]
    return read(plan.offsets)


def module_of_row(offsets: Tensor, rows: int) -> Tensor:
    """[N] int64: the module of every sorted row, K for dropped ones."""
    row = torch.arange(rows, device=offsets.device)
    if _compares(offsets):
        return (row[:, None] >= offsets[1:]).sum(1)
    return torch.searchsorted(offsets[1:], row, right=True)
