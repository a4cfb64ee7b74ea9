"""CUDA graphs of what tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .cases import Case, Function, evaluate

Made = TypeVar("Made")


def captured(step: Callable[[], Made]) -> tuple[torch.cuda.CUDAGraph, Made]:
    """A graph of ``step``, which may not synchronise, and what it writes to. A call before, which compiles, may."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    torch.cuda.set_sync_debug_mode("default")
    return graph, made


def check_captured(op: Function, case: Case, other: Case) -> None:
    """Forward and backward passes of ``case`` replay on the values of ``other`` to the bits of a plain call."""
    expected = evaluate(op, other)
    graph, found = captured(lambda: evaluate(op, case))
    for old, new in ((case.inputs, other.inputs), (case.cotangents, other.cotangents)):
        for name, t in old.items():
            if t is not None:
                t.copy_(new[name])  # type: ignore[arg-type]
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(t, expected[name]) for name, t in found.items())  # type: ignore[arg-type]
