"""Selection alone: K linear modules, of which every sample takes one; the main table trains modules 128 -> 48.

Axes: B samples, K modules, F features in, O out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import harness
from bench.harness import Product, Results, Step, Truth
from bench.routed_rivals import Layer, module_loop, rows_by_module, rows_by_sort, sorted_loop
from fastroute.networks import Selection, Trajectory
from fastroute.ops.backends import taken


class Case(NamedTuple):
    """The sizes of one call, and its pass."""

    B: int
    K: int
    F: int = 128
    O: int = 48
    training: bool = True

    def __str__(self) -> str:
        return f"B {self.B}, K {self.K}" + (f", {self.F} to {self.O}" if (self.F, self.O) != (128, 48) else "")


@dataclass(frozen=True)
class Row:
    """A case, and what is asked of it: see ``report`` for "best rival"."""

    case: Case
    threads: int = 1
    targets: dict[str, float] = field(default_factory=dict, hash=False)
    grid: bool = False

    def __str__(self) -> str:
        B, K, F, O, training = self.case
        if not self.grid:
            return f"B{B}-K{K}-{self.threads}thread"
        return f"grid-B{B}-K{K}-{F}x{O}-{'training' if training else 'forward'}-{self.threads}thread"


#: The grid: from 10 to 10^6 samples.
GRID = (
    *(Case(B, K, 32, 32) for B in (10, 64, 1024, 16_384) for K in (4, 20, 100)),
    *(Case(B, K, 256, 256) for B in (10, 64, 512, 4096) for K in (4, 20)),
    Case(131_072, 20, 32, 32), Case(1_000_000, 4, 16, 16),
)  # fmt: skip


def rows(options: harness.Options) -> list[Row]:
    """conftest makes a test of each; rows of one case stand together, so that it is built once."""
    found: list[Row] = []
    for case in (Case(B, K) for B in (64, 256, 1024, 4096) for K in (5, 20, 100)):
        asked = {"best rival": 1.0}
        if case.K >= 20 and not options.gpu:
            asked |= {"module loop": 4.0, "module loop, stacked": 4.0}
        found += [Row(case, targets=asked)] + [Row(case, threads=2)] * (not options.gpu)
    for case in () if options.gpu else GRID:
        found += [Row(case._replace(training=False), grid=True), Row(case, grid=True), Row(case, threads=2, grid=True)]
    return found


# ---------------------------------------------------------------------------------------------- the contestants


class Problem(NamedTuple):
    """K modules, what they get, and what comes back from the loss."""

    modules: list[nn.Linear]
    x: Tensor
    actions: Tensor
    dy: Tensor


@lru_cache(maxsize=1)
def problem(case: Case, device: str) -> Problem:
    torch.manual_seed(0)
    modules = [nn.Linear(case.F, case.O, device=device) for _ in range(case.K)]
    actions = torch.randint(case.K, (case.B,), device=device)
    dy = torch.randn(case.B, case.O, device=device)
    return Problem(modules, torch.randn(case.B, case.F, device=device), actions, dy)


def _stacked(modules: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    return torch.stack([m.weight for m in modules]), torch.stack([m.bias for m in modules])


def gather_bmm(modules: list[nn.Linear], x: Tensor, actions: Tensor) -> Tensor:
    """Every sample multiplies its own copy of its module's weights."""
    W, b = _stacked(modules)
    return torch.baddbmm(b[actions].unsqueeze(2), W[actions], x.unsqueeze(2)).squeeze(2)


def grouped_mm(modules: list[nn.Linear], x: Tensor, actions: Tensor) -> Tensor:
    """torch's product of groups, in x's dtype; it takes no bias here."""
    W, b = _stacked(modules)
    order = actions.argsort()
    ends = torch.bincount(actions, minlength=len(modules)).cumsum(0).to(torch.int32)
    made = F.grouped_mm(x.index_select(0, order), W.mT, offs=ends)
    return torch.empty_like(made).index_copy(0, order, made) + b[actions]


def dense(modules: list[nn.Linear], x: Tensor, actions: Tensor) -> Tensor:
    """Every module of all samples, of which each takes its own."""
    return torch.stack([m(x) for m in modules], 1)[torch.arange(len(x), device=x.device), actions]


def moe_loop(modules: list[nn.Linear], x: Tensor, actions: Tensor) -> Tensor:
    """As transformers runs experts by default: a one-hot mask says who was chosen, each adds its rows to the sum."""
    chosen = F.one_hot(actions, len(modules)).T
    y = x.new_zeros(len(x), modules[0].out_features)
    for k in (chosen.sum(1) > 0).nonzero()[:, 0].tolist():
        rows = chosen[k].nonzero()[:, 0]
        y.index_add_(0, rows, modules[k](x[rows]))
    return y


def _loop(modules: list[nn.Linear], x: Tensor, actions: Tensor) -> Tensor:
    return module_loop(Layer(modules, modules, False, ()), x, rows_by_module(actions, len(modules)))


def _sorted(modules: list[nn.Linear], x: Tensor, actions: Tensor) -> Tensor:
    return sorted_loop(Layer(modules, modules, False, ()), x, rows_by_sort(actions, len(modules)))


def _leaves(p: Problem) -> list[Tensor]:
    return [p.x, *(parameter for m in p.modules for parameter in m.parameters())]


def _drop(p: Problem) -> None:
    for leaf in _leaves(p):
        leaf.grad = None


def contestant(
    p: Problem, name: str, fn: Callable[[Tensor], Tensor], device: str, every: int = 1, training: bool = True
) -> Step:
    p.x.requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return fn(p.x)

    if not training:
        return Step(name, lambda: {"y": forward()}, forward, device=device, every=every)

    def run() -> Tensor:
        y = fn(p.x)
        y.backward(p.dy)
        return y.detach()

    def check() -> Results:
        _drop(p)
        return {"y": run(), **_gradients(p)}

    return Step(name, check, run, lambda: _drop(p), device, every)


def _gradients(p: Problem) -> Results:
    def stacked(parameters: list[nn.Parameter]) -> Tensor:
        return torch.stack([torch.zeros_like(t) if t.grad is None else t.grad for t in parameters])

    assert p.x.grad is not None
    return {"dx": p.x.grad, "dW": stacked([m.weight for m in p.modules]), "db": stacked([m.bias for m in p.modules])}


def fastroute_step(p: Problem, name: str, backend: str, device: str, training: bool = True) -> Step:
    selection, meta = Selection(*p.modules), Trajectory(len(p.x))

    def fn(x: Tensor) -> Tensor:
        with harness.on(backend):
            y: Tensor = selection(x, meta, p.actions)[0]
        return y

    return contestant(p, name, fn, device, training=training)


def stacked_step(p: Problem, device: str) -> Step:
    """The modules' parameters in one tensor each."""
    selection, meta = Selection(*p.modules, stacked=True), Trajectory(len(p.x))
    W, b = selection.parameters()

    def run() -> Tensor:
        y: Tensor = selection(p.x, meta, p.actions)[0]
        y.backward(p.dy)
        return y.detach()

    def drop() -> None:
        for leaf in (p.x, W, b):
            leaf.grad = None

    def check() -> Results:
        drop()
        y = run()
        assert p.x.grad is not None and W.grad is not None and b.grad is not None
        return {"y": y, "dx": p.x.grad, "dW": W.grad, "db": b.grad}

    p.x.requires_grad_()
    return Step("fastroute, stacked", check, run, drop, device)


def rivals_of(p: Problem, device: str, gpu: bool) -> list[Step]:
    found = [stacked_step(p, device)]
    found += [] if gpu else [fastroute_step(p, "fastroute, reference", "reference", device)]
    found += [harness.replayed(one) for one in (fastroute_step(p, "fastroute", "auto", device), *found)] if gpu else []
    ways: list[tuple[str, Callable[..., Tensor], int]] = [
        ("module loop", _loop, 1),
        ("MoE loop", moe_loop, 1),
        ("sort + addmm", _sorted, 1),
        ("gather + bmm", gather_bmm, 10),
    ]
    if hasattr(F, "grouped_mm"):
        ways.append(("grouped_mm", grouped_mm, 1))
    for name, fn, every in ways:
        found.append(contestant(p, name, lambda x, fn=fn: fn(p.modules, x, p.actions), device, every))
    return found


#: Multiply-adds of all modules for all samples beyond which that is no rival; and the most that torch.compile is given.
#: Chosen, not measured: they bound how long the grid takes.
_DENSE, MOST_K, MOST_B = 2e9, 20, 1024


def grid_rivals(case: Case, p: Problem, device: str, threads: int) -> list[Step]:
    ways: list[tuple[str, Callable[..., Tensor]]] = [("module loop", _loop), ("sort + addmm", _sorted)]
    if hasattr(F, "grouped_mm"):
        ways.append(("grouped_mm", grouped_mm))
    if case.B * case.K * case.F * case.O <= _DENSE:
        ways.append(("dense", dense))
        if threads == 1 and case.K <= MOST_K and case.B <= MOST_B:
            ways.append(("dense, torch.compile", torch.compile(dense, dynamic=False)))
            if case.training and case.K == 4:
                tuned = torch.compile(dense, dynamic=False, mode="max-autotune-no-cudagraphs")
                ways.append(("dense, torch.compile, max-autotune", tuned))

    def step(name: str, fn: Callable[..., Tensor]) -> Step:
        return contestant(p, name, lambda x: fn(p.modules, x, p.actions), device, training=case.training)

    return [step(*way) for way in ways]


# ---------------------------------------------------------------------------------------------- the truth


def _exact(p: Problem) -> Results:
    modules = [copy.deepcopy(module).double() for module in p.modules]
    x = p.x.detach().double().requires_grad_()
    other = Problem(modules, x, p.actions, p.dy.double())
    y = _loop(modules, x, other.actions)
    y.backward(other.dy)
    return {"y": y.detach(), **_gradients(other)}


#: Of cases with more samples, or more multiply-adds, fewer samples are compared number by number.
MANY, MUCH, FEWER = 2_000, 100_000_000, 500


@lru_cache(maxsize=1)
def truth(case: Case, device: str) -> harness.Gate:
    p = problem(case, device)
    if case.B <= FEWER or (case.B <= MANY and case.B * case.F * case.O <= MUCH):
        return Truth(lambda: _exact(p), torch.float32)
    few = problem.__wrapped__(case._replace(B=FEWER), device)
    found = fastroute_step(few, "", "auto", device).results()
    return harness.ByNorm(Truth(lambda: _exact(few), torch.float32), found, _exact(p), case.B / FEWER)


# ---------------------------------------------------------------------------------------------- the rows


def products(case: Case) -> list[Product]:
    """As many rows, as if all had one module."""
    return [
        Product("nt", case.B, case.F, case.O),
        Product("nn", case.B, case.O, case.F),
        Product("tn", case.O, case.B, case.F),
    ][: 3 if case.training else 1]


def moved(case: Case) -> int:
    """Bytes of x, y and their gradients, and twice the weights and biases."""
    return 4 * (1 + case.training) * (case.B * (case.F + case.O) + case.K * case.O * (case.F + 1))


@pytest.fixture
def settings(row: Row, options: harness.Options) -> Iterator[Case]:
    """The row's threads, and its sizes in these options."""
    with harness.threads(row.threads, options):
        yield row.case._replace(B=min(row.case.B, 32)) if options.quick else row.case


def test_dispatch(benchmark: Any, row: Row, options: harness.Options, settings: Case) -> None:
    case, device = settings, options.device
    p, checked = problem(case, device), truth(case._replace(training=True), device)
    subject = fastroute_step(p, "fastroute", "auto", device, case.training)
    rivals = grid_rivals(case, p, device, row.threads) if row.grid else rivals_of(p, device, options.gpu)
    made, what = products(case), "training" if case.training else "forward"
    info: dict[str, Any] = {"case": str(case), "pass": what, "threads": row.threads, "targets": row.targets}
    info |= {"GFLOP": harness.flops(made) / 1e9, "GB": moved(case) / 1e9}
    info["backend"] = taken("dispatch", torch.device(device).type, torch.float32)
    benchmark.extra_info.update(info | ({"grid": True} if row.grid else {}))
    floors = [] if row.grid else harness.floors(made, torch.float32, device)
    how = {"seconds": 1.0, "most": 40} if row.grid else {"seconds": 1.5, "most": 300}
    harness.race(benchmark, subject, rivals, floors, checked, options=options, **how)
    if options.gpu:
        harness.add_roofline(benchmark.extra_info, device, torch.float32, False, options.quick)
    harness.fail_if_wrong(benchmark, str(row))
