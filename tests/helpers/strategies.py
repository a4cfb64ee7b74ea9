"""What hypothesis draws for routing: sizes across tile and register boundaries, masks, lengths, layouts, dtypes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .layouts import LAYOUTS
from .routing_cases import Size
from .seeds import generator

#: Batch, rows, outputs and widths: small ones all, and around the widths of vector registers and of tiles.
batches = st.integers(1, 4)
rows = st.one_of(st.integers(1, 20), st.sampled_from([31, 64, 65, 255, 257, 600]))
outputs = st.one_of(st.integers(2, 10), st.sampled_from([15, 16, 17, 33]))
widths = st.one_of(st.integers(1, 10), st.sampled_from([16, 31, 32, 33]))
layouts = st.sampled_from(sorted(LAYOUTS))
seeds = st.integers(0, 2**16)


@st.composite
def sizes(draw: st.DrawFn) -> Size:
    return Size(draw(batches), draw(rows), draw(outputs), draw(widths), draw(widths))


def dtypes(*offered: torch.dtype) -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from(offered)


@st.composite
def masks(draw: st.DrawFn, b: int, n: int, m: int) -> Tensor | None:
    """None, or bool of a shape that broadcasts to [b, n, m], from all open to all closed."""
    kind = draw(st.sampled_from(["none", "nm", "bnm", "row", "column", "causal"]))
    if kind == "none":
        return None
    if kind == "causal":
        return torch.ones(n, m, dtype=torch.bool).triu(1)
    shape = {"nm": (n, m), "bnm": (b, n, m), "row": (b, n, 1), "column": (1, 1, m)}[kind]
    closed = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    return torch.rand(shape, generator=generator(draw(seeds))) < closed


@st.composite
def lengths(draw: st.DrawFn, b: int, n: int) -> list[int] | None:
    """None, or a length per sample, none and all included."""
    return draw(st.none() | st.lists(st.integers(0, n), min_size=b, max_size=b))


@st.composite
def kinds(draw: st.DrawFn) -> dict[str, Any]:
    """Which of its forms an iteration has."""
    linear = draw(st.booleans())
    return {
        "first": draw(st.booleans()),
        "linear": linear,
        "ign": draw(st.booleans()),
        "shared_scores": draw(st.sampled_from([False, True, "weight", "bias"])),
    }
