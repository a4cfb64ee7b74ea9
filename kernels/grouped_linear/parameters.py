"""Modules' parameters as kernels find them: one tensor with a row per module, or a table of their addresses.

A table holds addresses and nothing else, so it is kept by its contents: whoever lives at the same addresses may use it,
and no parameter is kept alive or goes stale by it. A CUDA graph reads the table at every replay, so one that was handed
out during a capture is never given back. One that is made while ``torch.compile(mode="reduce-overhead")`` warms up must
not come from the graph's memory pool, which may hold nothing that outlives the call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

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
    streams: set[int]  # that the allocator knows to read it


_Key = tuple[torch.device, tuple[int, ...]]
_tables: OrderedDict[_Key, _Table] = OrderedDict()
_in_graphs: dict[_Key, _Table] = {}


def forget() -> None:
    """Drop every table that no graph may read."""
    _tables.clear()


@cache
def _copier(device: torch.device) -> torch.cuda.Stream:
    """A stream of its own for copying tables: the host waits for the copy, and for nothing that was queued before."""
    return torch.cuda.Stream(device)


def in_a_thread_of_its_own(make: Callable[[], _T]) -> _T:
    """What ``make`` returns. A graph's memory pool takes what its thread allocates, on any stream, and nothing else."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _copied(device: torch.device, addresses: tuple[int, ...]) -> Tensor:
    host = torch.tensor(addresses, dtype=torch.int64, pin_memory=True)
    with torch.cuda.stream(_copier(device)):
        table = host.to(device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    copied.synchronize()  # some microseconds, once: after that any stream may read it
    return table


def _made(device: torch.device, addresses: tuple[int, ...]) -> _Table:
    if device.type != "cuda":
        return _Table(torch.tensor(addresses, dtype=torch.int64, device=device), set())
    return _Table(in_a_thread_of_its_own(lambda: _copied(device, addresses)), set())


def _read_by_current_stream(table: _Table) -> None:
    """Its memory is not given to others while this stream may still read it."""
    stream = torch.cuda.current_stream(table.addresses.device)
    if stream.cuda_stream not in table.streams:
        table.addresses.record_stream(stream)
        table.streams.add(stream.cuda_stream)


def _table(device: torch.device, addresses: tuple[int, ...]) -> Tensor | None:
    """The table, or None where making one would write it into a graph that others do not run."""
    key = device, addresses
    if found := _in_graphs.get(key):
        return found.addresses
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = _tables.get(key)
    if capturing:
        if found is not None:
            _in_graphs[key] = _tables.pop(key)
        return None if found is None else found.addresses
    if found is None:
        found = _tables[key] = _made(device, addresses)
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    if device.type == "cuda":
        _read_by_current_stream(found)
    return found.addresses


def gathered(tensors: Sequence[Tensor], modules: int, shape: tuple[int, ...], stacked: bool) -> Parameters:
    """All modules' parameters of ``shape``, each its own tensor, or ``stacked`` in one.

    Separate ones are read where they are, if their strides agree; otherwise a copy of them all is made.

    Raises:
        ValueError: they are not so many, not of that shape, or not all on one device in one dtype.
    """
    first = tensors[0]
    if stacked:
        if first.shape != (modules, *shape):
            raise ValueError(f"parameters: expected {[modules, *shape]}, got {list(first.shape)}")
        return Parameters(first, first.stride(), False, False)
    if len(tensors) != modules:
        raise ValueError(f"parameters: expected those of {modules} modules, got {len(tensors)}")
    strides, agree, aligned = first.stride(), True, True
    addresses = []
    for t in tensors:
        if t.shape != shape:
            raise ValueError(f"parameters: expected {list(shape)} of every module, got {list(t.shape)}")
        agree = agree and t.stride() == strides
        address = t.data_ptr() if t.device.type != "meta" else 0
        aligned = aligned and address % 16 == 0
        addresses.append(address)
    if any(t.device != first.device or t.dtype != first.dtype for t in tensors):
        raise ValueError(f"parameters: expected every module's on {first.device} in {first.dtype}")
    table = _table(first.device, tuple(addresses)) if agree and modules > 1 else None
    if table is not None:
        return Parameters(table, (0, *strides), True, aligned)
    copy = torch.stack(tuple(tensors)) if modules > 1 else first[None]
    return Parameters(copy, copy.stride(), False, False)
