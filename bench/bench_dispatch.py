"""Selection alone, forward and backward: K linear modules 128 -> 48, of which every sample takes one.

Axes: B samples, K modules, F = 128 features in, O = 48 out.
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

import fastroute
from bench import harness
from bench.harness import Product, Results, Step, Truth
from bench.routed_rivals import Layer, module_loop, rows_by_module, rows_by_sort, sorted_loop
from fastroute.networks import Selection, Trajectory
from fastroute.ops.backends import taken

INPUTS, OUTPUTS = 128, 48


class Case(NamedTuple):
    """The sizes of one call."""

    B: int
    K: int

    def __str__(self) -> str:
        return f"B {self.B}, K {self.K}"


@dataclass(frozen=True)
class Row:
    """A case, and what is asked of it: see ``report`` for "best rival"."""

    case: Case
    threads: int = 1
    targets: dict[str, float] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"B{self.case.B}-K{self.case.K}-{self.threads}thread"


def rows(options: harness.Options) -> list[Row]:
    """conftest makes a test of each; rows of one case stand together, so that it is built once."""
    found: list[Row] = []
    for case in (Case(B, K) for B in (64, 256, 1024, 4096) for K in (5, 20, 100)):
        asked = {"best rival": 1.0}
        if case.K >= 20 and not options.gpu:
            asked |= {"module loop": 4.0, "module loop, stacked": 4.0}
        found += [Row(case, targets=asked)] + [Row(case, threads=2)] * (not options.gpu)
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
    modules = [nn.Linear(INPUTS, OUTPUTS, device=device) for _ in range(case.K)]
    actions = torch.randint(case.K, (case.B,), device=device)
    dy = torch.randn(case.B, OUTPUTS, device=device)
    return Problem(modules, torch.randn(case.B, INPUTS, device=device), actions, dy)


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


def moe_loop(modules: list[nn.Linear], x: Tensor, actions: Tensor) -> Tensor:
    """As transformers runs experts by default: a one-hot mask says who was chosen, each adds its rows to the sum."""
    chosen = F.one_hot(actions, len(modules)).T
    y = x.new_zeros(len(x), OUTPUTS)
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


def contestant(p: Problem, name: str, fn: Callable[[Tensor], Tensor], device: str, every: int = 1) -> Step:
    p.x.requires_grad_()

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


def fastroute_step(p: Problem, name: str, backend: str, device: str) -> Step:
    selection, meta = Selection(*p.modules), Trajectory(len(p.x))

    def fn(x: Tensor) -> Tensor:
        with fastroute.use_backend(backend):
            y: Tensor = selection(x, meta, p.actions)[0]
        return y

    return contestant(p, name, fn, device)


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


# ---------------------------------------------------------------------------------------------- the truth


def _exact(p: Problem) -> Results:
    modules = [copy.deepcopy(module).double() for module in p.modules]
    x = p.x.detach().double().requires_grad_()
    other = Problem(modules, x, p.actions, p.dy.double())
    y = _loop(modules, x, other.actions)
    y.backward(other.dy)
    return {"y": y.detach(), **_gradients(other)}


@lru_cache(maxsize=1)
def truth(case: Case, device: str) -> Truth:
    p = problem(case, device)
    return Truth(lambda: _exact(p), torch.float32)


# ---------------------------------------------------------------------------------------------- the rows


def products(case: Case) -> list[Product]:
    """As many rows, as if all had one module."""
    return [
        Product("nt", case.B, INPUTS, OUTPUTS),
        Product("nn", case.B, OUTPUTS, INPUTS),
        Product("tn", OUTPUTS, case.B, INPUTS),
    ]


def moved(case: Case) -> int:
    """Bytes of x, y and their gradients, and twice the weights and biases."""
    return 4 * (2 * case.B * (INPUTS + OUTPUTS) + 2 * case.K * OUTPUTS * (INPUTS + 1))


@pytest.fixture
def settings(row: Row, options: harness.Options) -> Iterator[Case]:
    """The row's threads, and its sizes in these options."""
    with harness.threads(row.threads, options):
        yield row.case._replace(B=min(row.case.B, 32)) if options.quick else row.case


def test_dispatch(benchmark: Any, row: Row, options: harness.Options, settings: Case) -> None:
    case, device = settings, options.device
    p, checked = problem(case, device), truth(case, device)
    subject = fastroute_step(p, "fastroute", "auto", device)
    rivals, made = rivals_of(p, device, options.gpu), products(case)
    info: dict[str, Any] = {"case": str(case), "pass": "training", "threads": row.threads, "targets": row.targets}
    info |= {"GFLOP": harness.flops(made) / 1e9, "GB": moved(case) / 1e9}
    info["backend"] = taken("dispatch", torch.device(device).type, torch.float32)
    benchmark.extra_info.update(info)
    harness.race(
        benchmark,
        subject,
        rivals,
        harness.floors(made, torch.float32, device),
        checked,
        options=options,
        seconds=2.5,
        most=300,
    )
    if options.gpu:
        harness.add_roofline(benchmark.extra_info, device, torch.float32, False, options.quick)
    harness.fail_if_wrong(benchmark, str(row))
