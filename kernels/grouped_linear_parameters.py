"""Modules' parameters as kernels find them: one tensor with a row per module, or a table of their addresses.

A table holds addresses and nothing else, so it is kept by its contents: whoever lives at the same addresses may use it,
and no parameter is kept alive or goes stale by it. A CUDA graph reads the table at every replay, so one that was handed
out during a capture is never given back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Tables that are kept, those of graphs apart; some bytes for each module.
KEPT = 256


class Parameters(NamedTuple):
    """Arguments of a kernel."""

    tensor: Tensor  #: [K, ...], or a table of K addresses
    strides: tuple[int, ...]  #: of module, then of what one module has
    pointers: bool
    aligned: bool  #: every address is a multiple of 16 bytes


class _Table(NamedTuple):
    addresses: Tensor  # [K] int64 on the device
    host: Tensor  # what was copied there, until nobody can still be copying
    ready: torch.cuda.Event | None


_Key = tuple[torch.device, tuple[int, ...]]
_tables: OrderedDict[_Key, _Table] = OrderedDict()
_in_graphs: dict[_Key, _Table] = {}


def forget() -> None:
    """Drop every table that no graph may read."""
    _tables.clear()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _made(device: torch.device, addresses: tuple[int, ...]) -> _Table:
    if device.type != "cuda":
        table = torch.tensor(addresses, dtype=torch.int64, device=device)
        return _Table(table, table, None)
    host = torch.tensor(addresses, dtype=torch.int64, pin_memory=True)
    table = host.to(device, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(device))
    return _Table(table, host, ready)


def _table(device: torch.device, addresses: tuple[int, ...]) -> Tensor | None:
    """The table, or None where making one would write it into a graph that others do not run."""
    key = device, addresses
    found = _in_graphs.get(key) or _tables.get(key)
    capturing = _capturing(device)
    if found is None:
        if capturing:
            return None
        found = _tables[key] = _made(device, addresses)
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
        return found.addresses
    if found.ready is not None:  # copied a moment ago, maybe on another stream
        if capturing:
            return None
        if found.ready.query():
            found = found._replace(ready=None)
        else:
            torch.cuda.current_stream(device).wait_event(found.ready)
    if capturing:
        _tables.pop(key, None)
        _in_graphs[key] = found
    elif key in _tables:
        _tables[key] = found
        _tables.move_to_end(key)
    return found.addresses


def gathered(tensors: Sequence[Tensor], shape: tuple[int, ...], stacked: bool) -> Parameters:
    """All modules' parameters of ``shape``, each its own tensor, or ``stacked`` in the first.

    Separate ones are read where they are, if their strides agree; otherwise a copy of them all is made.

    Raises:
        ValueError: they are not of that shape, or not all on one device in one dtype.
    """
    first = tensors[0]
    if stacked:
        return Parameters(first, first.stride(), False, False)
    strides, agree, aligned = first.stride(), True, True
    addresses = []
    for t in tensors:
        if t.shape != shape:
            raise ValueError(f"parameters: expected {list(shape)} of every module, got {list(t.shape)}")
        agree = agree and t.stride() == strides
        address = t.data_ptr() if t.device.type != "meta" else 0
        aligned = aligned and address % 16 == 0
        addresses.append(address)
    table = _table(first.device, tuple(addresses)) if agree and len(tensors) > 1 else None
    if any(t.device != first.device or t.dtype != first.dtype for t in tensors):
        raise ValueError(f"parameters: expected every module's on {first.device} in {first.dtype}")
    if table is not None:
        return Parameters(table, (0, *strides), True, aligned)
    copy = torch.stack(tuple(tensors)) if len(tensors) > 1 else first[None]
    return Parameters(copy, copy.stride(), False, False)
