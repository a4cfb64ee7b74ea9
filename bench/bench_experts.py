"""Layers of experts: each token takes k of K linear modules (on a GPU, at the size of a language model), or of K gated
feed-forward experts, whose outputs are summed by weight (on a CPU).

Axes: T tokens, k modules a token, K modules, F features in, O out, H hidden ones of a feed-forward expert.
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
from fastroute.functional import expert_ffn, grouped_linear
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
    H: int = 0  #: 0: linear experts

    def __str__(self) -> str:
        hidden = f"{self.H} to " if self.H else ""
        return f"{self.T} tokens, {self.k} of {self.K} experts {self.F} to {hidden}{self.O}, {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def smaller(self) -> Case:
        return Case(64, 2, 8, 32, 16, self.dtype, self.H and 24)


@dataclass(frozen=True)
class Row:
    """A case, a pass, and what is asked of it."""

    case: Case
    what: str
    targets: dict[str, float] = field(default_factory=dict, hash=False)
    threads: int = 1

    def __str__(self) -> str:
        c = self.case
        hidden = f"x{c.H}" if c.H else ""
        return f"T{c.T}-k{c.k}-K{c.K}-{c.F}{hidden}x{c.O}-{c.dtype}-{self.what}-{self.threads}thread"


_LARGE = Case(32_768, 8, 128, 2048, 768)
_FFN = [
    Case(T, k, K, F, F, dtype, H)
    for T, k, K, F, H in ((32, 2, 8, 64, 128), (512, 4, 16, 128, 256), (512, 2, 8, 512, 1024))
    for dtype in ("float32", "bfloat16")
]


def rows(options: Options) -> list[Row]:
    """conftest makes a test of each."""
    if not options.gpu:
        return [Row(case, what) for case in _FFN for what in ("forward", "training")]
    return [Row(_LARGE, "forward", {"max_ms": 2.75}), Row(_LARGE, "training", {"max_ms": 9.9})]


class Problem(NamedTuple):
    """Experts in one tensor [K, O, F], or two, [K, 2 H, F] and [K, O, H], what they get, and dy [T k, O] or [T, O]."""

    x: Tensor
    W: Tensor
    actions: Tensor
    dy: Tensor
    W_out: Tensor | None = None
    weights: Tensor | None = None  #: [T, k]


@lru_cache(maxsize=1)
def problem(case: Case, device: str) -> Problem:
    torch.manual_seed(0)
    factory: dict[str, Any] = {"device": device, "dtype": case.torch_dtype}
    rows = 2 * case.H if case.H else case.O
    x, W = torch.randn(case.T, case.F, **factory), torch.randn(case.K, rows, case.F, **factory) * case.F**-0.5
    actions = torch.rand(case.T, case.K, device=device).topk(case.k).indices
    if not case.H:
        return Problem(x, W, actions, torch.randn(case.T * case.k, case.O, **factory))
    W_out = torch.randn(case.K, case.O, case.H, **factory) * case.H**-0.5
    weights = torch.randn(case.T, case.k, **factory).softmax(1)
    return Problem(x, W, actions, torch.randn(case.T, case.O, **factory), W_out, weights)


# ---------------------------------------------------------------------------------------------- the contestants


def ours(p: Problem) -> Tensor:
    plan = dispatch.plan(p.actions, len(p.W))
    if p.W_out is None:
        return grouped_linear(p.x, plan, p.W)
    return expert_ffn(p.x, plan, p.weights, p.W, p.W_out)


def _gated(u: Tensor) -> Tensor:
    g, v = u.chunk(2, -1)
    return F.silu(g) * v


def grouped_mm(p: Problem) -> Tensor:
    """torch's product of groups between a gather and a scatter."""
    flat, k = p.actions.flatten(), p.actions.shape[1]
    order = flat.argsort()
    ends = torch.bincount(flat, minlength=len(p.W)).cumsum(0).to(torch.int32)
    made = F.grouped_mm(p.x.index_select(0, order // k), p.W.mT, offs=ends)
    if p.W_out is None:
        return torch.empty_like(made).index_copy(0, order, made)
    made = F.grouped_mm(_gated(made), p.W_out.mT, offs=ends) * p.weights.flatten()[order, None]  # type: ignore[union-attr]
    return torch.empty_like(made).index_copy(0, order, made).view(*p.actions.shape, -1).sum(1)


def expert_loop(p: Problem) -> Tensor:
    """As transformers runs experts by default: one after the other, on the rows that chose it."""
    flat, k = p.actions.flatten(), p.actions.shape[1]
    y = p.x.new_zeros(p.dy.shape)
    for expert in flat.unique().tolist():
        rows = (flat == expert).nonzero()[:, 0]
        made = p.x[rows // k] @ p.W[expert].mT
        if p.W_out is None:
            y = y.index_copy(0, rows, made)
        else:
            made = _gated(made) @ p.W_out[expert].mT * p.weights.flatten()[rows, None]  # type: ignore[union-attr]
            y = y.index_add(0, rows // k, made)
    return y


def contestant(p: Problem, name: str, fn: Callable[[Problem], Tensor], what: str, device: str) -> Step:
    given = {"dx": p.x, "dW": p.W, "dW_out": p.W_out, "dweights": p.weights}
    leaves = {name: t for name, t in given.items() if t is not None}

    def drop() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def run() -> Results:
        if what == "forward":
            with torch.no_grad():
                return {"y": fn(p)}
        for leaf in leaves.values():
            leaf.requires_grad_()
        y = fn(p)
        y.backward(p.dy)
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}

    def check() -> Results:
        drop()
        return run()

    return Step(name, check, run, drop, device)


def _exact(p: Problem) -> Results:
    other = Problem(*(None if t is None else t.detach().double() if t.is_floating_point() else t for t in p))  # type: ignore[arg-type]
    return contestant(other, "", expert_loop, "training", p.x.device.type).check()


@lru_cache(maxsize=1)
def truth(case: Case, device: str) -> Truth:
    p = problem(case, device)
    half = case.torch_dtype if case.H and case.torch_dtype.itemsize == 2 else None
    return Truth(lambda: _exact(p), case.torch_dtype, stored=half)


# ---------------------------------------------------------------------------------------------- the rows


def products(case: Case, what: str) -> list[Product]:
    """As if all entries had one module."""
    entries, forward, backward = case.T * case.k, [], []
    for given, made in ((case.F, 2 * case.H), (case.H, case.O)) if case.H else ((case.F, case.O),):
        forward += [Product("nt", entries, given, made)]
        backward += [Product("nn", entries, made, given), Product("tn", made, entries, given)]
    return forward + (backward if what == "training" else [])


def moved(case: Case, what: str) -> int:
    """Bytes: a row of x for each entry, y and the parameters; backward the same again and the gradients."""
    entries, parameters = case.T * case.k, case.K * (case.F * case.O if not case.H else case.H * (2 * case.F + case.O))
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
    floors = harness.floors(made, case.torch_dtype, device) if options.gpu or case.dtype == "float32" else []
    harness.race(benchmark, subject, rivals, floors, checked, options=options, seconds=3, most=50)
    if options.gpu:
        harness.add_roofline(benchmark.extra_info, device, case.torch_dtype, False, options.quick)
    harness.fail_if_wrong(benchmark, str(row))
