"""A layer of experts at the size of a language model: each token takes k of K linear modules.

Axes: T tokens, k modules a token, K modules, F features in, O out. On a GPU only: a CPU's share of it is the suite
``bench_dispatch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.harness import Options, Product, Results, Step, Truth
from fastroute.functional import grouped_linear
from fastroute.ops import dispatch
from fastroute.ops.backends import taken


class Case(NamedTuple):
    """The sizes of one call."""

    T: int
    k: int
    K: int
    F: int
    O: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.T} tokens, {self.k} of {self.K} experts {self.F} to {self.O}, {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def smaller(self) -> Case:
        return Case(64, 2, 8, 32, 16, self.dtype)


@dataclass(frozen=True)
class Row:
    """A case, a pass, and what is asked of it."""

    case: Case
    what: str
    targets: dict[str, float] = field(default_factory=dict, hash=False)
    threads: int = 1

    def __str__(self) -> str:
        c = self.case
        return f"T{c.T}-k{c.k}-K{c.K}-{c.F}x{c.O}-{c.dtype}-{self.what}-{self.threads}thread"


_LARGE = Case(32_768, 8, 128, 2048, 768)


def rows(options: Options) -> list[Row]:
    """conftest makes a test of each."""
    if not options.gpu:
        return []
    return [Row(_LARGE, "forward", {"max_ms": 2.75}), Row(_LARGE, "training", {"max_ms": 9.9})]


class Problem(NamedTuple):
    """Experts in one tensor [K, O, F], what they get, and dy [T k, O]."""

    x: Tensor
    W: Tensor
    actions: Tensor
    dy: Tensor


@lru_cache(maxsize=1)
def problem(case: Case, device: str) -> Problem:
    torch.manual_seed(0)
    factory: dict[str, Any] = {"device": device, "dtype": case.torch_dtype}
    x, W = torch.randn(case.T, case.F, **factory), torch.randn(case.K, case.O, case.F, **factory) * case.F**-0.5
    actions = torch.rand(case.T, case.K, device=device).topk(case.k).indices
    return Problem(x, W, actions, torch.randn(case.T * case.k, case.O, **factory))


# ---------------------------------------------------------------------------------------------- the contestants


def ours(x: Tensor, W: Tensor, actions: Tensor) -> Tensor:
    return grouped_linear(x, dispatch.plan(actions, len(W)), W)


def grouped_mm(x: Tensor, W: Tensor, actions: Tensor) -> Tensor:
    """torch's product of groups between a gather and a scatter."""
    flat = actions.flatten()
    order = flat.argsort()
    ends = torch.bincount(flat, minlength=len(W)).cumsum(0).to(torch.int32)
    made = F.grouped_mm(x.index_select(0, order // actions.shape[1]), W.mT, offs=ends)
    return torch.empty_like(made).index_copy(0, order, made)


def expert_loop(x: Tensor, W: Tensor, actions: Tensor) -> Tensor:
    """As transformers runs experts by default: one after the other, on the rows that chose it."""
    flat, k = actions.flatten(), actions.shape[1]
    y = x.new_zeros(len(flat), W.shape[1])
    for expert in flat.unique().tolist():
        rows = (flat == expert).nonzero()[:, 0]
        y = y.index_copy(0, rows, x[rows // k] @ W[expert].mT)
    return y


def contestant(p: Problem, name: str, fn: Callable[[Tensor, Tensor, Tensor], Tensor], what: str, device: str) -> Step:
    leaves = {"dx": p.x, "dW": p.W}

    def drop() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def run() -> Results:
        if what == "forward":
            with torch.no_grad():
                return {"y": fn(p.x, p.W, p.actions)}
        for leaf in leaves.values():
            leaf.requires_grad_()
        y = fn(p.x, p.W, p.actions)
        y.backward(p.dy)
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}

    def check() -> Results:
        drop()
        return run()

    return Step(name, check, run, drop, device)


def _exact(p: Problem) -> Results:
    other = Problem(p.x.detach().double(), p.W.detach().double(), p.actions, p.dy.double())
    return contestant(other, "", expert_loop, "training", p.x.device.type).check()


@lru_cache(maxsize=1)
def truth(case: Case, device: str) -> Truth:
    p = problem(case, device)
    return Truth(lambda: _exact(p), case.torch_dtype)


# ---------------------------------------------------------------------------------------------- the rows


def products(case: Case, what: str) -> list[Product]:
    """As if all entries had one module."""
    entries = case.T * case.k
    forward = [Product("nt", entries, case.F, case.O)]
    backward = [Product("nn", entries, case.O, case.F), Product("tn", case.O, entries, case.F)]
    return forward + (backward if what == "training" else [])


def moved(case: Case, what: str) -> int:
    """Bytes: a row of x for each entry, y and the parameters; backward the same again and the gradients."""
    entries, parameters = case.T * case.k, case.K * case.F * case.O
    numbers = entries * (case.F + case.O) + parameters
    if what == "training":
        numbers += entries * (2 * case.O + 2 * case.F) + 2 * parameters + case.T * case.F
    return numbers * case.torch_dtype.itemsize


@pytest.fixture
def settings(row: Row, options: Options) -> Iterator[Case]:
    """The row's threads, and its sizes in these options."""
    with harness.threads(row.threads, options):
        yield row.case.smaller() if options.quick else row.case


def test_experts(benchmark: Any, row: Row, options: Options, settings: Case) -> None:
    case, device = settings, options.device
    harness.make_room(device, 0)
    p, checked, made = problem(case, device), truth(case, device), products(settings, row.what)
    subject = contestant(p, "fastroute", ours, row.what, device)
    rivals = [contestant(p, "expert loop", expert_loop, row.what, device)]
    if hasattr(F, "grouped_mm"):
        rivals.append(contestant(p, "grouped_mm", grouped_mm, row.what, device))
    if device == "cuda":
        rivals.append(harness.replayed(subject))
    info: dict[str, Any] = {"case": str(case), "pass": row.what, "threads": row.threads, "targets": row.targets}
    info |= {"GFLOP": harness.flops(made) / 1e9, "GB": moved(case, row.what) / 1e9}
    info["backend"] = taken("grouped_linear", torch.device(device).type, case.torch_dtype)
    benchmark.extra_info.update(info)
    floors = harness.floors(made, case.torch_dtype, device)
    harness.race(benchmark, subject, rivals, floors, checked, options=options, seconds=3, most=50)
    harness.add_roofline(benchmark.extra_info, device, case.torch_dtype, False, options.quick)
    harness.fail_if_wrong(benchmark, str(row))
