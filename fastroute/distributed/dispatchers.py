"""How samples get to the ranks of their modules, and the results back.

Axes: W ranks of a group, B samples of one of them, k modules that each takes, N = B k entries, K modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.dispatch.contract import Plan
from .exchange import begin, copied, end, placed, spread, summed, swap

#: A dtype's number in a message.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Place:
    """Where modules are: rank r of a group has those from ``bounds[r]`` up to ``bounds[r + 1]``.

    ``group`` is the name of a process group, as ``torch.ops._c10d_functional`` takes it. ``trains`` says whether
    parameters of this rank's modules may require a gradient.
    """

    group: str
    rank: int
    ranks: int
    bounds: tuple[int, ...]
    trains: bool = True
    layer: str = "ExpertParallel"

    @property
    def own(self) -> range:
        """The modules of this rank."""
        return range(self.bounds[self.rank], self.bounds[self.rank + 1])

    @property
    def modules(self) -> int:
        """K."""
        return self.bounds[-1]


@runtime_checkable
class Dispatcher(Protocol):
    """Moves rows of samples between the ranks of a group. To write one, define these four methods and ``samples``.

    The layer calls them in this order, once each in a forward pass, on all ranks; between the first two, and between
    the last two, it computes what it has to do besides. What passes from one to the next is in the value that ``send``
    returned, whatever that is. All have to be differentiable; autograd then makes the way back. A rank without a row
    still has to take part in the backward pass's collectives: see ``fastroute.distributed.exchange``, whose functions
    take care of that.

    Attributes:
        samples: "own": the ranks have different samples; "all": they all have the same.
    """

    samples: Literal["own", "all"]

    def send(self, x: Tensor, plan: Plan, place: Place) -> Any:
        """Begin to send samples x [B, ...] to the ranks of the modules that the plan's entries name."""

    def receive(self, sent: Any) -> tuple[Tensor, Tensor]:
        """(rows [M, ...] that came to this rank, the module of each [M] int64, counted from this rank's first)."""

    def send_back(self, y: Tensor, sent: Any) -> None:
        """Begin to return what the modules made of the rows, [M, ...] in their order."""

    def receive_back(self, sent: Any) -> Tensor:
        """[n, ...]: of every entry that the plan keeps, in the plan's order (``plan.order[:n]``)."""


class Counts(NamedTuple):
    """What the ranks tell each other before rows are exchanged."""

    sent: list[int]  #: [W]: rows that go to each rank
    got: list[int]  #: [W]: rows that come from it
    of_modules: Tensor  #: [W, own modules] int64: those by module
    facts: list[list[int]] | None  #: by rank; None under torch.compile


class _Exchange:
    """One forward pass of :class:`AllToAll`."""

    def __init__(self, plan: Plan, place: Place, counts: Counts) -> None:
        self.plan, self.place, self.counts = plan, place, counts
        self.moving: Any = None
        self.tie = torch.empty(0, device="cpu")  # until there is one


class AllToAll:
    """Every rank has samples of its own; each goes to the rank of its module and comes back: two all-to-alls.

    With n entries of R bytes (of the input's rows), S bytes (of the output's) and a share q of them at other ranks, a
    rank sends n q R bytes forward and as many backward, and its modules' ranks send n q S bytes back, twice as well;
    plus 8 (K + 4 W) bytes for the counts. On a GPU the counts are read once per forward pass, which waits for the
    device.
    """

    samples: Literal["own", "all"] = "own"

    def send(self, x: Tensor, plan: Plan, place: Place) -> _Exchange:
        """See ``Dispatcher``."""
        exchange = _Exchange(plan, place, _exchanged_counts(x, plan, place))
        counts = exchange.counts
        entries = plan.order.narrow(0, 0, sum(counts.sent))
        trains_x, trains = x.requires_grad, place.trains
        if counts.facts is not None:
            _check_facts(counts.facts, place)
            trains_x, trains = (any(fact[i] for fact in counts.facts) for i in (2, 3))
        rows = spread(x, entries, plan.per_sample)
        tie = x.new_zeros((), requires_grad=trains_x)
        exchange.moving = begin(rows, tie, counts.got, counts.sent, place.group)
        exchange.tie = x.new_zeros((), requires_grad=trains_x or trains)
        return exchange

    def receive(self, sent: _Exchange) -> tuple[Tensor, Tensor]:
        """See ``Dispatcher``."""
        counts, place = sent.counts, sent.place
        rows, tie = end(sent.moving, counts.got, counts.sent, place.group)
        if tie.requires_grad:
            sent.tie = tie
        each = counts.of_modules.flatten()
        ids = torch.arange(len(place.own), device=rows.device).repeat(place.ranks)
        return rows, ids.repeat_interleave(each, output_size=rows.shape[0])

    def send_back(self, y: Tensor, sent: _Exchange) -> None:
        """See ``Dispatcher``."""
        counts = sent.counts
        sent.moving = begin(y, sent.tie, counts.sent, counts.got, sent.place.group)

    def receive_back(self, sent: _Exchange) -> Tensor:
        """See ``Dispatcher``."""
        counts = sent.counts
        return end(sent.moving, counts.sent, counts.got, sent.place.group)[0]


class Local:
    """Every rank has all samples and computes those of its own modules; the results are summed over ranks.

    For layers beside tensor-parallel neighbours, whose activations are the same on all ranks. Nothing is exchanged
    forward; an all-reduce of the N entries' outputs makes the results, one of [B, ...] the input's gradient. With one
    rank it is a layer without any exchange. On a GPU the plan's offsets are read, which waits for the device. Results
    have a gradient also where all modules are frozen, since no rank knows of the others'.
    """

    samples: Literal["own", "all"] = "all"

    def send(self, x: Tensor, plan: Plan, place: Place) -> dict[str, Any]:
        """See ``Dispatcher``."""
        bounds = dispatch.bounds_of(plan)
        first, last = (bounds[place.bounds[place.rank + i]] for i in (0, 1))
        x, tie = copied(x, place.group)
        if not tie.requires_grad:
            tie = x.new_zeros((), requires_grad=place.trains)
        rows = spread(x, plan.order.narrow(0, first, last - first), plan.per_sample)
        return {"rows": rows, "tie": tie, "span": (first, last, bounds[-1]), "plan": plan, "place": place}

    def receive(self, sent: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """See ``Dispatcher``."""
        (first, last, _), own = sent["span"], sent["place"].own
        offsets = sent["plan"].offsets[own.start : own.stop + 1] - first
        return sent["rows"], dispatch.module_of_row(offsets, last - first)

    def send_back(self, y: Tensor, sent: dict[str, Any]) -> None:
        """See ``Dispatcher``."""
        first, last, count = sent["span"]
        where = torch.arange(first, last, device=y.device)
        sent["made"] = summed(placed(y, where, count), sent["tie"], sent["place"].group)

    def receive_back(self, sent: dict[str, Any]) -> Tensor:
        """See ``Dispatcher``."""
        return sent["made"]


def _exchanged_counts(x: Tensor, plan: Plan, place: Place) -> Counts:
    """Every rank's counts of rows for this rank's modules, and four facts: a row's size, dtype, who has gradients."""
    W, device = place.ranks, plan.offsets.device
    compiling = torch.compiler.is_compiling()
    mine = [] if compiling else _facts(x, place)
    facts = torch.tensor(mine, device=device, dtype=torch.int64)
    counts = plan.offsets.diff()
    to = [place.bounds[r + 1] - place.bounds[r] for r in range(W)]
    message = torch.cat([part for own in counts.split(to) for part in (facts, own)])
    size, extra = len(place.own), len(mine)
    got = swap(message, [extra + size] * W, [extra + n for n in to], place.group).view(W, extra + size)
    of_modules = got[:, extra:]
    bounds = torch.tensor(place.bounds, device=device)
    sent = plan.offsets.index_select(0, bounds).diff()
    numbers = torch.cat([sent, of_modules.sum(1), got[:, :extra].reshape(-1)]).tolist()
    if compiling:
        for number in numbers:
            torch._check(number >= 0)
    told = [numbers[2 * W + extra * r :][:extra] for r in range(W)]
    return Counts(numbers[:W], numbers[W : 2 * W], of_modules, None if compiling else told)


def _facts(x: Tensor, place: Place) -> list[int]:
    dtype = _DTYPES.index(x.dtype) if x.dtype in _DTYPES else len(_DTYPES)
    trains = torch.is_grad_enabled()
    return [x.shape[1:].numel(), dtype, int(trains and x.requires_grad), int(trains and place.trains)]


def _check_facts(facts: Sequence[Sequence[int]], place: Place) -> None:
    """The same error on all ranks, since each knows all facts."""
    if all(fact[:2] == facts[0][:2] for fact in facts):
        return

    def shown(fact: Sequence[int]) -> str:
        dtype = str(_DTYPES[fact[1]]) if fact[1] < len(_DTYPES) else "another dtype"
        return f"{fact[0]} numbers of {dtype}"

    by: dict[str, list[int]] = {}
    for rank, fact in enumerate(facts):
        by.setdefault(shown(fact), []).append(rank)
    told = "; ".join(f"{what} on {', '.join(map(str, ranks))}" for what, ranks in by.items())
    raise ValueError(f"{place.layer}: batch: expected samples of one size and dtype on all ranks, got by rank: {told}")


def lost(sent: Tensor, done: Tensor, place: Place) -> str | None:
    """What a dispatcher lost, in words, of rows counted by module [K] where they came from and where they went."""
    gone = [(k, a, b) for k, (a, b) in enumerate(zip(sent.tolist(), done.tolist(), strict=True)) if a != b]
    if not gone:
        return None
    ranks = {k: r for r, (a, b) in enumerate(pairwise(place.bounds)) for k in range(a, b)}
    return ", ".join(f"module {k} on rank {ranks[k]} got {b} of {a}" for k, a, b in gone[:8])
