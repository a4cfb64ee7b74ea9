"""How the suites measure. A suite says what its rows are and how to build each rival; everything else is here.

A *row* is one case in one pass on so many threads, and one pytest-benchmark test. In it, the subject (fastroute as a
user gets it) and its rivals are timed in turn, round after round, in one process: what disturbs a shared machine
disturbs all of them. pytest-benchmark's own statistics are the subject's, its rivals run as the ``setup`` of each of
its rounds, and their figures go into the row's ``extra_info``. A ratio is the median over rounds of (rival / subject),
both of the same round.

* The time is *process CPU time* on one thread (all threads together on two), which does not count waiting for a core;
  wall time stands beside it. On a GPU it is the time between two CUDA events, with the L2 cache flushed before.
* Before anything is timed, every contestant's outputs and gradients are compared with the reference in float64
  (``Truth``), within the error budget of the tests (docs/numerics.md). What of fastroute is beyond that is wrong and
  has no time: its row keeps the rivals' and its test fails. A rival from outside keeps its time, marked with how many
  times the budget it is off by: to leave out the strongest rival for its last digits would flatter us.
* The *floor* is the matrix products of the algorithm alone, no reading of parameters and no row mathematics, by each
  library that torch carries (torch.mm; oneDNN on tiles of rows). The share of the floor is that of the better one.
* Memory is the growth of a fresh process's peak resident size beyond the module, its input and their gradients
  (``child.py``); on a GPU, the allocator's peak.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bench.instruction_sets import HELD_TO, cpuinfo
from fastroute import use_backend
from tests.helpers.budget import LOOKS, NORMS, SPREAD, Yardstick, pieces, size

Results = dict[str, Tensor]
#: ``time.monotonic()`` when the run began, of which a suite's process is one part.
BEGAN = "FASTROUTE_BENCH_BEGAN"
_BEGAN = float(os.environ.get(BEGAN, time.monotonic()))


class Options(NamedTuple):
    """What was asked for on the command line."""

    gpu: bool
    quick: bool
    seconds: float | None = None  # of a row's rounds, at most
    uncompiled: bool = False  # without the rivals that torch.compile makes
    whole: bool = False  # with all of them, however long that takes

    @property
    def device(self) -> str:
        if not self.gpu:
            return "cpu"
        if torch.cuda.is_available():
            return "cuda"
        if self.quick:
            return "cpu"  # a dry run of the GPU's rows
        raise RuntimeError("--gpu: torch sees no CUDA device (--gpu --quick makes a dry run on the CPU)")

    def is_late(self) -> bool:
        """On a GPU, compiling the last rivals is not worth being cut off: the whole run has to end in 8 minutes."""
        return self.gpu and time.monotonic() - _BEGAN > 330


@contextmanager
def threads(count: int, options: Options | None = None) -> Iterator[None]:
    """A row's threads, on a CPU."""
    before = torch.get_num_threads()
    if options is None or not options.gpu:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


#: Of torch.compile, for passes of milliseconds: what is compiled for one thread is not compiled again for two.
ANY_THREADS: dict[str, Any] = {"cpp.dynamic_threads": True}


def on(backend: str) -> AbstractContextManager[None]:
    """A backend for a call; nothing at all for "auto", as a user has it: entering a context takes microseconds."""
    return nullcontext() if backend == "auto" else use_backend(backend)


# ---------------------------------------------------------------------------------------------- the machine


def _cpu() -> str:
    facts: dict[str, str] = {}
    for line in cpuinfo().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    if not facts:
        return platform.processor() or platform.machine()
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


@cache
def machine() -> dict[str, Any]:
    """Hardware and versions; nothing that names the computer."""
    facts: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        pass
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


# ---------------------------------------------------------------------------------------------- clocks


class Sample(NamedTuple):
    """One pass: the primary figure (CPU time, or the GPU's time) and wall time, in seconds."""

    time: float
    wall: float


def cpu_sample(run: Callable[[], Any]) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    kept = run()
    sample = Sample(time.process_time() - cpu, time.perf_counter() - wall)
    del kept
    return sample


def least(
    steps: Sequence[Callable[[], object]], seconds: float = 0.0, rounds: int = 5,
    within: Callable[[int], AbstractContextManager[object]] = lambda _: nullcontext(),
) -> list[float]:  # fmt: skip
    """The least CPU seconds of each, in turn: in at least so many rounds, after one that is not timed.

    ``within`` gives what a step, by its number, is called in; entering and leaving it is not timed.
    """
    best, until, done = [math.inf] * len(steps), 0.0, -1
    while done < rounds or time.perf_counter() < until:
        for i, step in enumerate(steps):
            with within(i):
                took = cpu_sample(step).time
            best[i] = min(best[i], took) if done >= 0 else math.inf
        until = time.perf_counter() + seconds if done < 0 else until
        done += 1
    return best


@cache
def _flush() -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # several times any L2 cache


def gpu_sample(run: Callable[[], Any]) -> Sample:
    """Between two events; the flush ahead of the first keeps the GPU busy while the CPU starts the pass."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    _flush().zero_()
    wall = time.perf_counter()
    start.record()
    kept = run()
    stop.record()
    stop.synchronize()
    sample = Sample(start.elapsed_time(stop) / 1e3, time.perf_counter() - wall)
    del kept
    return sample


def sampler(device: str) -> Callable[[Callable[[], Any]], Sample]:
    return gpu_sample if device == "cuda" else cpu_sample


# ---------------------------------------------------------------------------------------------- contestants


class Contestant(Protocol):
    name: str

    def results(self) -> Results:
        """What one pass computes, for the gate; also the warm-up."""

    def sample(self) -> Sample:
        """Time one pass."""

    def close(self) -> None:
        """Called when the row is done."""


@dataclass
class Here:
    """A contestant in this process."""

    name: str
    run: Callable[[], Results]
    device: str = "cpu"
    reset: Callable[[], None] = lambda: None  # lets go of what a pass leaves behind (.grad)
    every: int = 1  # timed in one round of so many

    def results(self) -> Results:
        return self.run()

    def sample(self) -> Sample:
        return sampler(self.device)(self.run)

    def close(self) -> None:
        pass


@dataclass
class Step:
    """A contestant whose timed pass is not the one that is checked (it draws at random, the other is told what to do).

    Neither what comes before a pass nor the garbage collector is in its time.
    """

    name: str
    check: Callable[[], Results]
    run: Callable[[], Any]
    before: Callable[[], Any] = lambda: None  # lets go of what the last pass left behind (.grad)
    device: str = "cpu"
    every: int = 1  # timed in one round of so many

    def results(self) -> Results:
        return self.check()

    def sample(self) -> Sample:
        self.before()
        was_on = gc.isenabled()
        gc.disable()
        try:
            return sampler(self.device)(self.run)
        finally:
            if was_on:
                gc.enable()

    def close(self) -> None:
        pass


def capture(call: Callable[[], Any], before: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of one pass, and the tensors in which each replay leaves its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels are compiled and workspaces made
            before()
            call()
    torch.cuda.current_stream().wait_stream(side)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    before()  # gradients live in the graph's memory
    return graph, kept


def replayed(one: Step | Here) -> Step:
    """The same pass as a CUDA graph, which is what a training loop would replay; on a CPU, the pass itself."""
    step = one if isinstance(one, Step) else Step(one.name, one.run, one.run, one.reset, one.device)
    name = f"{step.name}, graph"
    if step.device != "cuda":
        return replace(step, name=name)
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def replay(what: str) -> Any:
        graph, kept = graphs[what]
        graph.replay()
        return kept

    def check() -> Results:
        graphs.update(check=capture(step.check, step.before), run=capture(step.run, step.before))
        found: Results = replay("check")
        return found

    return Step(name, check, lambda: replay("run"), device=step.device, every=step.every)


#: Questions about a tensor's place in the graph, which seen.events() leaves out too.
_NO_OPERATORS = ("aten::is_leaf", "aten::output_nr", "aten::_version")


def operators(one: Step) -> dict[str, int]:
    """How many operators of PyTorch and of fastroute one warm pass calls: in all, and those not called by another."""
    one.sample()
    one.before()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        one.run()
    # events() makes a tree of them first, which takes half a minute where there are 100,000
    found = [
        (event.start_thread_id(), event.start_ns(), -event.end_ns())
        for event in seen.profiler.kineto_results.events()
        if event.name().startswith(("aten::", "fastroute::")) and event.name() not in _NO_OPERATORS
    ]
    direct, thread, until = 0, -1, 0
    for whose, start, minus_end in sorted(found):  # one that calls others begins before them
        if whose != thread or start >= until:
            direct, thread, until = direct + 1, whose, -minus_end
    return {"all": len(found), "direct": direct}


# ---------------------------------------------------------------------------------------------- the gate


#: Draws of the budget: four, and for ours where it is beyond that all of the tests'. A rival beyond it keeps its time.
_RIVALS_LOOKS = (*LOOKS[:2], (4, SPREAD))
_LOOKS = (*_RIVALS_LOOKS, LOOKS[-1])


class Truth:
    """The exact results and the error budget of the tests: ``tests.helpers.budget.Yardstick``, ``run`` in float64."""

    def __init__(self, run: Callable[[], Results], dtype: torch.dtype, **how: Any) -> None:
        with threads(2):
            self._yardstick = Yardstick(run, dtype, **how)
        self.exact: Results = self._yardstick.exact  # type: ignore[assignment]

    def excess(self, found: Results, rival: bool = False) -> tuple[str, float]:
        """(which result misses the exact one by most, how many times what it may); a rival's, by fewer draws."""
        by, looks = {}, _RIVALS_LOOKS if rival else _LOOKS
        with threads(2):
            self._yardstick.expects(found)
            for name, value in found.items():
                fits = value.shape == self.exact[name].shape
                by[name] = max(e.times for e in self._yardstick.excess(name, value, looks)) if fits else float("inf")
        name = max(by, key=by.__getitem__)
        return name, by[name]

    def relative(self, found: Results, look: tuple[int, float]) -> float:
        """What a result's error may be by norm, as a share of the result's: the largest of all results."""
        shares = []
        with threads(2):
            for name, t in found.items():
                by_norm = next(e for e in self._yardstick.excess(name, t, [look]) if e.norm == NORMS[1][0])
                shares.append(by_norm.allowed / by_norm.scale)
        return max(shares)


def apart(t: Tensor, exact: Tensor) -> float:
    """The Frobenius norm of t - exact; not finite where t is not."""
    return math.hypot(*(float(torch.linalg.vector_norm(a.double() - b)) for a, b in pieces(t, exact)))


class ByNorm:
    """The gate of many rows: relative errors by norm, within the largest that a result of fewer rows may have, times
    the square root of how many times more rows there are.

    Roundings are judged on the fewer rows, result by result. This finds what only many rows bring out: a row that is
    dropped or counted twice moves a result by more than 1e-3 of its norm. One bound is for all results, since how far
    one that nearly cancels may be off changes with the number of rows: a bias's gradient of 10^5 rows has 14 times the
    budget of 20,000. The root is how the relative error of a sum in one run grows with its length. Where many rows
    nearly cancel and the fewer do not, it grows by more: as much as rounded inputs move the exact result further.

    Args:
        known: of the fewer rows.
        found: our results of these.
        exact: of all rows.
        times: how many times more rows there are.
        moves: of each result, the relative distance that rounded inputs move it: all rows', and the fewer rows'.
            Called where the root is not enough.
    """

    def __init__(
        self,
        known: Truth,
        found: Results,
        exact: Results,
        times: float,
        moves: Callable[[], tuple[Mapping[str, float], Mapping[str, float]]] = lambda: ({}, {}),
    ) -> None:
        self._few, self.exact = known.excess(found), exact
        self._largest = cache(lambda look: known.relative(found, look))
        self._root, self._moves = math.sqrt(times), cache(moves)
        self._sizes = {name: size(t, 2) for name, t in exact.items()}

    def _grown(self, name: str) -> float:
        """How many times further rounded inputs move a result of all rows."""
        all_rows, fewer = self._moves()
        return all_rows[name] / fewer[name] if fewer.get(name) else 0.0

    def excess(self, found: Results, rival: bool = False) -> tuple[str, float]:
        """As of :class:`Truth`; a rival is told by the same bound, and none is moved for its sake."""
        if self._few[1] > 1:
            return f"{self._few[0]} of fewer rows", self._few[1]
        by = {}
        for name, t in found.items():
            exact = self.exact[name]
            with threads(2):
                off = apart(t, exact) if t.shape == exact.shape else math.inf
            for look in LOOKS[1:5]:
                share = off / (self._root * self._largest(look) * self._sizes[name])
                by[name] = share if math.isfinite(share) else math.inf
                if share <= 1:
                    break
            if 1 < by[name] < math.inf and not (rival and self._moves.cache_info().currsize == 0):
                by[name] *= self._root / max(self._root, self._grown(name))
        name = max(by, key=by.__getitem__)
        return name, by[name]


class Gate(Protocol):
    """What says whether results are right."""

    exact: Results

    def excess(self, found: Results, rival: bool = False) -> tuple[str, float]:
        """(which result misses the exact one by most, how many times what it may)."""


# ---------------------------------------------------------------------------------------------- the floor


class Product(NamedTuple):
    """``times`` products [a, b] x [b, c]. ``how`` names what lies transposed in memory: "nn", "nt" or "tn"."""

    how: str
    a: int
    b: int
    c: int
    times: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.a * self.b * self.c * self.times


def flops(products: Sequence[Product]) -> int:
    return sum(p.flops for p in products)


_TILE = 1024
FLOORED = 2  #: rounds in which the floor is timed once: nobody races it


def _onednn(p: Product, A: Tensor, B: Tensor) -> None:
    linear = torch.ops.mkldnn._linear_pointwise
    if p.how == "tn":
        for a, b in zip(A.split(_TILE), B.split(_TILE), strict=True):
            linear(a.mT, b.mT, None, "none", [], "")
    else:
        for a in A.split(_TILE):
            linear(a, B if p.how == "nt" else B.mT, None, "none", [], "")


def floors(products: Sequence[Product], dtype: torch.dtype, device: str) -> list[Here]:
    """The products alone, by each library; they have nothing to get wrong, so their results are empty."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def matrix(rows: int, cols: int, use: str) -> Tensor:
        if (rows, cols, use) not in made:
            made[rows, cols, use] = torch.randn(rows, cols, device=device).to(dtype)
        return made[rows, cols, use]

    work = []
    for p in products:
        A = matrix(*((p.b, p.a) if p.how == "tn" else (p.a, p.b)), "in")
        B = matrix(*((p.c, p.b) if p.how == "nt" else (p.b, p.c)), "in")
        work.append((p, A, B, matrix(p.a, p.c, "out")))

    def mm() -> Results:
        for p, A, B, out in work:
            for _ in range(p.times):
                torch.mm(A.mT if p.how == "tn" else A, B.mT if p.how == "nt" else B, out=out)
        return {}

    def onednn() -> Results:
        for p, A, B, _ in work:
            for _ in range(p.times):
                _onednn(p, A, B)
        return {}

    found = [Here("torch.mm", mm, device, every=FLOORED)]
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        found.append(Here("oneDNN", onednn, device, every=FLOORED))
    return found


@cache
def rates(device: str, dtype: torch.dtype, tf32: bool, quick: bool) -> tuple[float, float]:
    """(bytes/s of a copy, FLOP/s of a large square product), measured now."""
    size = 256 if quick else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty((1 << 20) if quick else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    time_of = sampler(device)

    def best(run: Callable[[], Any]) -> float:
        run()
        return statistics.median(time_of(run).time for _ in range(9))

    return 2 * source.numel() / best(lambda: target.copy_(source)), 2 * size**3 / best(lambda: a @ b)


# ---------------------------------------------------------------------------------------------- the race


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def _figures(samples: Sequence[Sample]) -> dict[str, float]:
    return {
        "ms": 1e3 * statistics.median(s.time for s in samples),
        "wall_ms": 1e3 * statistics.median(s.wall for s in samples),
        "best_wall_ms": 1e3 * min(s.wall for s in samples),
    }


#: Rows whose subject is wrong: they have no time of its own, so pytest-benchmark does not know them.
FAULTY: list[dict[str, Any]] = []


#: A rival that takes so many times as long as the subject is timed in one round of so many.
SLOW, SELDOM = 4, 3
#: The standard error at which a median over rounds is said to be known.
KNOWN = 0.02


def rounds_for(samples: Sequence[Sequence[float]]) -> int:
    """How many rounds until every median over them is known to ``KNOWN``, from a few ratios of each contestant.

    The standard error of a median of n is 1.25 s / sqrt(n), s as wide as the middle half of the logarithms says.
    """
    widest = max((b - a for a, _, b in (_quartiles([math.log(v) for v in of]) for of in samples)), default=0.0)
    return math.ceil((1.2533 * widest / 1.349 / KNOWN) ** 2)


class Turns:
    """The subject and the others, timed in turn: what disturbs a shared machine disturbs all of them.

    Args:
        subject: None if it has no time, being wrong.
        others: one with ``every`` (see :class:`Step`), and one that is slow, is only in some of the rounds.
    """

    def __init__(self, subject: Contestant | None, others: Sequence[Contestant]) -> None:
        self.subject, self.others = subject, others
        self._all = [*others, *([] if subject is None else [subject])]
        self.samples: dict[str, list[Sample]] = {one.name: [] for one in self._all}
        self._every = {one.name: getattr(one, "every", 1) for one in self._all}
        self._turn = itertools.count()

    def time_others(self) -> None:
        turn = next(self._turn)
        for one in self.others:
            if turn % self._every[one.name] == 0:
                self.samples[one.name].append(one.sample())

    def time_subject(self) -> None:
        if self.subject is not None:
            self.samples[self.subject.name].append(self.subject.sample())

    def once(self) -> None:
        self.time_others()
        self.time_subject()

    def ratios(self, name: str, figure: str = "time") -> list[float]:
        """Of each round they share: another's time by the subject's."""
        assert self.subject is not None
        mine = self.samples[self.subject.name][:: self._every[name]]
        return [getattr(a, figure) / getattr(b, figure) for a, b in zip(self.samples[name], mine, strict=False)]

    def rounds(
        self, seconds: float, least: int, most: int, rest: Callable[[int], None] | None = None, quick: bool = False
    ) -> int:
        """How many: from ``least`` to ``most``, about ``seconds`` of them, and no more than the medians need.

        ``rest`` makes those after the first four.
        """
        gc.collect()
        self.once()
        wall = {name: samples[-1].wall for name, samples in self.samples.items()}
        if self.subject is not None:
            slow = SLOW * wall[self.subject.name]
            self._every = {name: max(every, SELDOM if wall[name] > slow else 1) for name, every in self._every.items()}
        round_s = sum(wall[name] / every for name, every in self._every.items())
        most = 2 if quick else min(max(int(seconds / round_s), least), most)
        few = min(4, most - 1)
        for _ in range(few - 1):
            self.once()
        if self.subject is not None and not quick:
            known = [self.ratios(one.name) for one in self.others if self._every[one.name] == 1]
            most = min(most, max(least, few + 1, rounds_for(known)))
        if rest is not None:
            rest(most - few)
        else:
            for _ in range(most - few):
                self.once()
        return most


def race(
    benchmark: Any,
    subject: Contestant,
    rivals: Sequence[Contestant],
    floor: Sequence[Contestant],
    truth: Gate,
    *,
    options: Options,
    seconds: float = 8,
    least: int = 3,
    most: int = 50,
) -> None:
    """Gate, then time everybody in turn for about ``seconds``; the figures go to ``benchmark.extra_info``.

    There are ``least`` to ``most`` rounds, no more than the medians need (:class:`Turns`). A rival that fails is left
    out, and so are the compiled ones of a late run.
    """
    excess, left_out = {subject.name: truth.excess(subject.results())}, {}
    for one in rivals:
        if "torch.compile" in one.name and (options.uncompiled or options.is_late()):
            left_out[one.name] = "no time to compile"
            continue
        try:
            excess[one.name] = truth.excess(one.results(), rival=not one.name.startswith("fastroute"))
        except (RuntimeError, AssertionError) as error:  # out of memory, a graph that cannot be captured
            left_out[one.name] = f"{type(error).__name__}: {error}"
    rivals = [one for one in rivals if one.name in excess]
    ours = [one.name for one in (subject, *rivals) if one.name.startswith("fastroute")]
    wrong = {k for k, (_, times) in excess.items() if not times <= 1 and (k in ours or not times < float("inf"))}
    others = [one for one in (*rivals, *floor) if one.name not in wrong]
    turns = Turns(None if subject.name in wrong else subject, others)
    samples, ratios = turns.samples, turns.ratios

    def rest(rounds: int) -> None:
        benchmark.pedantic(turns.time_subject, setup=turns.time_others, rounds=rounds)

    seconds = min(seconds, options.seconds or seconds)
    count = turns.rounds(seconds, least, most, rest if turns.subject else None, options.quick)

    found: dict[str, Any] = {}
    for one in (subject, *rivals, *floor):
        name = one.name
        found[name] = _figures(samples[name]) if name in samples else {}
        if name in excess and not excess[name][1] <= 1:
            found[name]["off"], found[name]["times_the_budget"] = excess[name]
        if name in samples and subject.name in samples and name != subject.name:
            found[name]["ratio"] = _quartiles(ratios(name))
            found[name]["wall_ratio"] = _quartiles(ratios(name, "wall"))
    floor_names = [one.name for one in floor]
    shares = [found[k]["ratio"][1] for k in floor_names if "ratio" in found[k]]
    benchmark.extra_info.update(
        rounds=count,
        subject=subject.name,
        rivals={k: v for k, v in found.items() if k not in floor_names},
        floors={k: v for k, v in found.items() if k in floor_names},
        share_of_floor=min(shares, default=None),
        load=[round(v, 1) for v in os.getloadavg()],
    )
    if HELD_TO:
        benchmark.extra_info["isa"] = HELD_TO
    if left_out:
        benchmark.extra_info["left out"] = "; ".join(f"{name} ({why})" for name, why in left_out.items())


def fail_if_wrong(benchmark: Any, row: str) -> None:
    """Last in a row: one whose subject is wrong is kept, without its time, and its test fails."""
    info = benchmark.extra_info
    mine = info["rivals"][info["subject"]]
    if "ms" not in mine:
        FAULTY.append({"name": row, "stats": None, "extra_info": info})
        benchmark.skipped = True
        raise AssertionError(f"{mine['off']} is off by {mine['times_the_budget']:.2f} times its budget: no time")
    failed = [why for why in info.get("left out", "").split("; ") if why.startswith("fastroute")]
    assert not failed, failed


# ---------------------------------------------------------------------------------------------- a GPU's own


def make_room(device: str, needed: float) -> None:
    """Give back what the last row left in the allocator, and skip a row that this GPU has no memory for."""
    if device != "cuda":
        return
    import pytest

    gc.collect()
    torch.cuda.empty_cache()
    have = torch.cuda.get_device_properties(0).total_memory
    if have < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of GPU memory, this one has {have / 1e9:.0f}")


def gpu_peak(one: Here, module_and_input: Sequence[Tensor]) -> float:
    """Peak allocated GB of one pass in which nothing else is alive but the module and its input."""
    one.run()  # compiled, workspaces made
    one.reset()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = one.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    one.reset()
    return (peak + sum(t.nbytes for t in module_and_input)) / 1e9


def add_roofline(info: dict[str, Any], device: str, dtype: torch.dtype, tf32: bool, quick: bool) -> None:
    """Each contestant's share of the time that the row's bytes and FLOPs need at the rates measured in this run."""
    bandwidth, rate = rates(device, dtype, tf32, quick)
    bytes_ms, flops_ms = info["GB"] * 1e12 / bandwidth, info["GFLOP"] * 1e12 / rate
    info["roofline"] = {
        "GB/s": bandwidth / 1e9,
        "TFLOP/s": rate / 1e12,
        "ms": max(bytes_ms, flops_ms),
        "matmul_ms": flops_ms,
    }
    for figures in info["rivals"].values():
        if "ms" in figures:
            figures["share_of_roofline"] = max(bytes_ms, flops_ms) / figures["ms"]
            figures["share_of_matmul"] = flops_ms / figures["ms"]
