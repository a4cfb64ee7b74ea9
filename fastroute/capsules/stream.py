"""``EfficientVectorRouting.stream``: routing of vectors that come in chunks and are never in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..importing import not_compiled
from ..ops import checks
from ..ops.backends import is_strict, requested
from ..ops.efficient_routing.contract import Parameters, check_sizes
from ..ops.efficient_routing.op import input_scale
from ..ops.efficient_routing.passes import prepared
from ..ops.efficient_routing.streamed import Streamed, route
from ..ops.precision import autocast_precision
from .chunks import VectorChunks, as_tensor

__all__ = ["Chunks", "stream"]

Chunks = Tensor | np.ndarray[Any, Any] | Iterable[Any] | Callable[[], Iterator[Any]]

_LEAST_BYTES = {"cpu": 2 << 20}  #: smaller chunks are put together; elsewhere:
_LEAST_BYTES_ELSEWHERE = 64 << 20

_EVERY_PASS = "a tensor, an array, a list, or a function that returns a new iterator each time"


class Ranks(NamedTuple):
    """How the sums of several processes are put together, where each streams vectors of its own."""

    #: Of this rank's (n, leading sizes, dtype): how many vectors there are in all, before its own, and its own.
    place: Callable[[int, tuple[int, ...], torch.dtype], tuple[int, int, int]]
    total: Callable[..., tuple[Tensor, ...]]  # the sums of tensors over all ranks


@not_compiled
def stream(
    w: Parameters,
    chunks: Chunks,
    *,
    n_inp: int,
    n_iters: int,
    normalize: bool,
    n: int | None,
    rows: int | None,
    mask: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    buffer: bool,
    ranks: Ranks | None = None,
) -> Tensor:
    """See ``EfficientVectorRouting.stream``. With ``ranks``, n_inp, n, mask and the parameters are of this rank."""
    m, h, device = w.W_F1.shape[0], w.W_F2.shape[1], w.W_A.device
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in w)
    n = None if n is None else checks.at_least_one("n", n)
    if n_inp != -1:
        if n is not None and n != n_inp:
            raise ValueError(f"n: expected {n_inp} like n_inp, got {n}")
        n = n_inp
    source = _Source(w, chunks, rows, graph, "n" if n_inp == -1 else "n_inp")
    source.settle(n, n_iters * (2 if graph else 1), buffer)
    if ranks is None:
        check_sizes(w, source.n, w.W_F1.shape[1])
    batch = source.look()
    in_all, before, own = (source.n, 0, source.n) if ranks is None else ranks.place(source.n, batch, source.dtype)

    precision = autocast_precision(device.type)
    source.dtype, w = prepared(source.dtype, w, precision)
    out = torch.promote_types(source.dtype, w.W_F2.dtype)

    if mask is not None:
        checks.tensor("mask", mask, "a bool tensor")
        mask = checks.as_mask(mask.to(device), batch, source.n, m)
    if lengths is not None:
        lengths = torch.as_tensor(lengths, device=device)
        lengths = checks.as_lengths(lengths, batch, in_all, device)
    samples = source.samples
    if samples == 0:
        return w.W_F2.new_empty((*batch, m, h), dtype=out)
    scale = input_scale(torch.empty((samples, in_all, 0), dtype=source.dtype, device=device), lengths)
    if own < source.n:
        lengths = torch.full((samples,), own, dtype=torch.int64, device=device)
    elif ranks is not None and lengths is not None:
        lengths = (lengths - before).clamp(0, own)
    total = None if ranks is None else ranks.total
    call = Streamed(source.__iter__, scale, mask, lengths, n_iters, normalize, requested(), precision, total)
    return route(call, w).to(out).reshape(*batch, m, h)


class _Source:
    """The chunks as the op takes them, [B, k, d], checked to be the same on every pass."""

    n: int  #: vectors in all
    dtype: torch.dtype  #: of the chunks; set, they are cast to it

    def __init__(self, w: Parameters, chunks: Chunks, rows: int | None, graph: bool, named: str) -> None:
        self._width, self._device, self._graph, self._named = w.W_F1.shape[1], w.W_A.device, graph, named
        self._batch: tuple[int, ...] | None = None
        self._came: torch.dtype | None = None
        self._begun: Iterator[Tensor] | None = None
        self._pass = 0
        self._sizes: list[int] = []
        self._marks: list[Tensor] = []
        self._count: int | None = None
        if isinstance(chunks, (Tensor, np.ndarray)):
            chunks = VectorChunks(chunks, rows)
        elif rows is not None:
            raise ValueError("rows: expected None with chunks that are cut already; rows cuts a tensor or an array")
        self._once = False
        if isinstance(chunks, VectorChunks):
            self._count = chunks.n
        if isinstance(chunks, Iterator):
            self._once = True
            self._open: Callable[[], Iterator[Any]] = chunks.__iter__
        elif isinstance(chunks, Iterable):
            self._open = chunks.__iter__
        elif callable(chunks):
            self._open = self._called(chunks)
        else:
            raise TypeError(f"chunks: expected {_EVERY_PASS}, got {type(chunks).__name__}")
        self._listed = isinstance(chunks, (list, tuple))

    @staticmethod
    def _called(function: Callable[[], Any]) -> Callable[[], Iterator[Any]]:
        def begin() -> Iterator[Any]:
            made = function()
            if not isinstance(made, Iterable) or isinstance(made, Tensor):
                raise TypeError(
                    f"chunks: expected the function to return an iterator of chunks, got {type(made).__name__}"
                )
            return iter(made)

        return begin

    def settle(self, n: int | None, passes: int, buffer: bool) -> None:
        """Find the total number of vectors, which the scale of the first pass needs."""
        passes += n is None and self._count is None
        if self._once and buffer:
            kept = [chunk.clone() for chunk in self._checked()]
            self._open, self._listed = kept.__iter__, True
        elif self._once and passes > 1:
            raise ValueError(
                f"chunks: expected {_EVERY_PASS}, since they are gone through {passes} times"
                f"{'' if n is not None else ' (once to count them: give n)'}, got an iterator, which is empty after "
                "the first; buffer=True keeps all its chunks in memory"
            )
        if self._count is None and (n is None or self._listed):
            self._count = sum(chunk.shape[-2] for chunk in self._checked())
        if n is not None and self._count is not None and n != self._count:
            raise ValueError(f"{self._named}: expected {n} input vectors, got {self._count} in all chunks")
        found = n if n is not None else self._count
        if not found:
            raise ValueError("chunks: expected at least 1 input vector, got none")
        self.n = found

    def look(self) -> tuple[int, ...]:
        """Begin the first pass: the chunks' leading sizes."""
        passed = iter(self)
        first = next(passed)
        self._begun = chain([first], passed)
        assert self._batch is not None and self._came is not None
        self.dtype = self._came
        return self._batch

    @property
    def samples(self) -> int:
        return 0 if self._batch is None else int(np.prod(self._batch, dtype=np.int64))

    def __iter__(self) -> Iterator[Tensor]:
        if self._begun is not None:
            begun, self._begun = self._begun, None
            for x in begun:
                yield self._ready(x)
            return
        self._pass += 1
        total, number = 0, -1
        for number, x in enumerate(self._merged()):
            total += x.shape[-2]
            if total > self.n:
                raise ValueError(
                    f"{self._named}: expected {self.n} input vectors in all, got {total} or more in pass {self._pass}"
                )
            self._same(number, x)
            yield x if self._pass == 1 else self._ready(x)
        if total < self.n:
            one_shot = " (expected: " + _EVERY_PASS + ")" if total == 0 and self._pass > 1 else ""
            raise ValueError(
                f"{self._named}: expected {self.n} input vectors in all, got {total} in pass {self._pass}{one_shot}"
            )

    def _ready(self, x: Tensor) -> Tensor:
        """[B, k, d], on the parameters' device, in the dtype that is computed with."""
        x = x.reshape(self.samples, *x.shape[-2:]).to(self._device, self.dtype)
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

    def _merged(self) -> Iterator[Tensor]:
        """No empty chunks, and small ones put together: a kernel has a cost per call."""
        held: list[Tensor] = []
        size = 0
        least = _LEAST_BYTES.get(self._device.type, _LEAST_BYTES_ELSEWHERE)
        for chunk in self._checked():
            if chunk.shape[-2] == 0:
                continue
            if not held and chunk.nbytes >= least:
                yield chunk
                continue
            held.append(chunk.clone())  # its memory may be used again for the next one
            size += chunk.nbytes
            if size >= least:
                yield torch.cat(held, -2)
                held, size = [], 0
        if held:
            yield torch.cat(held, -2)

    def _checked(self) -> Iterator[Tensor]:
        for number, chunk in enumerate(self._open()):
            name = f"chunks[{number}]"
            if isinstance(chunk, np.ndarray):
                chunk = as_tensor(chunk)
            checks.tensor(name, chunk, "a tensor or an array [..., k, d_inp]")
            if chunk.dim() < 2:
                raise ValueError(f"{name}: expected [..., k, d_inp], at least 2 dimensions, got {checks.shown(chunk)}")
            checks.floating(name, chunk)
            *batch, _, d = chunk.shape
            if d != self._width:
                raise ValueError(
                    f"{name}: expected input vectors of width {self._width}, got {d} (it is {checks.shown(chunk)})"
                )
            if self._batch is None:
                self._batch, self._came = tuple(batch), chunk.dtype
            if tuple(batch) != self._batch:
                raise ValueError(
                    f"{name}: expected leading dimensions {list(self._batch)} like the first chunk, got "
                    f"{checks.shown(chunk)}"
                )
            if chunk.dtype != self._came:
                raise TypeError(f"{name}: expected {self._came} like the first chunk, got {chunk.dtype}")
            if chunk.requires_grad and self._graph:
                raise ValueError(
                    f"{name}: expected vectors that need no gradient, since stream returns none to them: .detach() it"
                )
            yield chunk.detach()

    def _same(self, number: int, x: Tensor) -> None:
        """Sizes, and the bits of each chunk's first and last vector, are those of the first pass."""
        mark = _mark(x)
        if self._pass == 1:
            self._sizes.append(x.shape[-2])
            self._marks.append(mark)
            return
        if number >= len(self._sizes) or x.shape[-2] != self._sizes[number]:
            before = self._sizes[number] if number < len(self._sizes) else "none"
            raise ValueError(
                f"chunks: expected the same vectors in every pass, got {x.shape[-2]} in chunk {number} of pass "
                f"{self._pass}, where pass 1 had {before}"
            )
        if (x.device.type == "cpu" or is_strict()) and not torch.equal(mark, self._marks[number]):
            raise ValueError(
                f"chunks: expected the same vectors in every pass, got others in chunk {number} of pass {self._pass} "
                "than in pass 1 (is the order drawn at random?)"
            )


def _mark(x: Tensor) -> Tensor:
    """A number that tells apart chunks whose first or last vectors differ, whatever their values are."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    ends = torch.stack([x[..., 0, :], x[..., -1, :]]).contiguous().view(bits).flatten().to(torch.int64)
    return (ends * torch.arange(1, 2 * ends.numel() + 1, 2, device=x.device)).sum()
