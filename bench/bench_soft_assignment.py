"""The tail of a routing: softmax over outputs, weights, sum over inputs; forward, and forward and backward.

Axes: B samples, n inputs, m outputs, h width of a vote. Votes are a sample's own, the same for all samples ("memory"),
or the same for all outputs, as a weighted mean ("slots").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import harness
from bench.harness import Results, Step, Truth
from fastroute import functional
from fastroute.ops.backends import taken

EPS = 1e-8


class Case(NamedTuple):
    """Votes of a kind, and sizes."""

    votes: str  #: "own", "memory" or "slots"
    B: int
    n: int
    m: int
    h: int
    training: bool

    def __str__(self) -> str:
        return f"{self.votes}, B={self.B}, n={self.n}, m={self.m}, h={self.h}"


@dataclass(frozen=True)
class Row:
    """A case, and what is asked of it: see ``report`` for "best rival"."""

    case: Case
    threads: int = 1
    targets: dict[str, float] = field(default_factory=dict, hash=False)
    grid: bool = False

    def __str__(self) -> str:
        votes, *sizes, training = self.case
        what = "training" if training else "forward"
        return f"{'grid-' * self.grid}{votes}-{'x'.join(map(str, sizes))}-{what}-{self.threads}thread"


SIZES = (
    ("own", 4, 100, 10, 256), ("own", 4, 1000, 10, 64), ("own", 1, 4096, 32, 64), ("memory", 8, 1000, 10, 64),
    ("slots", 16, 1024, 7, 64), ("slots", 4, 4096, 16, 64),
)  # fmt: skip

#: Inputs of all samples beyond which max-autotune, which tries every kernel on them, takes minutes.
TUNED = 2000
#: The grid: from 10 to 10^6 inputs.
GRID = (
    ("own", 4, 10, 4, 16), ("own", 4, 50, 10, 64), ("own", 32, 64, 16, 32), ("own", 8, 196, 10, 64),
    ("own", 2, 1000, 32, 32), ("own", 1, 10_000, 10, 32), ("own", 1, 100_000, 8, 16),
    ("memory", 4, 10, 4, 16), ("memory", 16, 100, 10, 64), ("memory", 32, 64, 16, 32), ("memory", 4, 1000, 32, 64),
    ("memory", 2, 10_000, 10, 64), ("memory", 2, 100_000, 8, 16),
    ("slots", 4, 10, 4, 16), ("slots", 64, 16, 4, 32), ("slots", 16, 196, 8, 64), ("slots", 8, 1024, 7, 64),
    ("slots", 2, 4096, 16, 64), ("slots", 1, 10_000, 10, 64), ("slots", 1, 100_000, 16, 64),
    ("slots", 1, 1_000_000, 8, 16),
)  # fmt: skip


def rows(options: harness.Options) -> list[Row]:
    """conftest makes a test of each; rows of one case stand together, so that it is built once."""
    found = [Row(Case(*size, training)) for size in SIZES for training in (False, True)]
    if options.gpu:
        return found
    found += [Row(row.case, threads=2) for row in found]
    for size in GRID:
        forward, training = Case(*size, False), Case(*size, True)
        found += [Row(forward, grid=True), Row(training, grid=True), Row(training, threads=2, grid=True)]
    return found


# ---------------------------------------------------------------------------------------------- the contestants


class Problem(NamedTuple):
    """Own and memory: all of them; slots: scores and votes."""

    scores: Tensor
    votes: Tensor
    gate: Tensor | None
    use: Tensor | None
    ign: Tensor | None
    dy: Tensor


@lru_cache(maxsize=1)
def problem(case: Case, device: str) -> Problem:
    torch.manual_seed(0)
    kind, B, n, m, h, _ = case

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    votes = normal(1 if kind == "memory" else B, n, 1 if kind == "slots" else m, h)
    weights = (None,) * 3 if kind == "slots" else (normal(B, n).sigmoid(), normal(n, m), normal(n, m))
    return Problem(normal(B, n, m), votes, *weights, normal(B, m, h))


def plain(scores: Tensor, votes: Tensor, gate: Tensor | None, use: Tensor | None, ign: Tensor | None) -> Tensor:
    """The upstreams' operators in their order."""
    R = scores.softmax(-1)
    if gate is None:
        attn = R + EPS
        attn = attn / attn.sum(1, keepdim=True)
        return attn.mT @ votes[:, :, 0]
    f = gate[..., None]
    D_use = f * R
    D_ign = f - D_use
    phi = use * D_use - ign * D_ign
    return torch.einsum("bij,bijh->bjh", phi, votes.expand(len(scores), -1, -1, -1))


def ours(backend: str) -> Callable[..., Tensor]:
    def call(scores: Tensor, votes: Tensor, gate: Tensor | None, use: Tensor | None, ign: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"mean": True, "eps": EPS} if gate is None else {}
        with harness.on(backend):
            return functional.soft_assignment(scores, votes, gate, use, ign, **options)

    return call


def contestant(case: Case, p: Problem, name: str, fn: Callable[..., Tensor], device: str) -> Step:
    given = [None if t is None else t.clone().requires_grad_(case.training) for t in p[:-1]]
    leaves = [t for t in given if t is not None]

    def run() -> Tensor:
        if not case.training:
            with torch.no_grad():
                return fn(*given)
        y = fn(*given)
        y.backward(p.dy.to(y.dtype))
        return y.detach()

    def drop() -> None:
        for leaf in leaves:
            leaf.grad = None

    def check() -> Results:
        drop()
        return {"y": run()} | {f"d{k}": t.grad for k, t in enumerate(leaves) if t.grad is not None}

    return Step(name, check, run, drop, device)


#: Of cases with more inputs, fewer are compared number by number.
MANY, FEWER = 2_000, 500


def _exact(case: Case, device: str) -> Step:
    p = problem.__wrapped__(case, device)
    return contestant(case, Problem(*(None if t is None else t.double() for t in p)), "", plain, device)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def truth(case: Case, device: str) -> harness.Gate:
    if case.n <= MANY:
        return Truth(_exact(case, device).results, torch.float32)
    few = case._replace(n=FEWER)
    found = contestant(few, problem.__wrapped__(few, device), "", ours("auto"), device).results()
    known, exact = Truth(_exact(few, device).results, torch.float32), _exact(case, device).results()
    return harness.ByNorm(known, found, exact, case.n / few.n)


# ---------------------------------------------------------------------------------------------- the rows


def moved(p: Problem, training: bool) -> float:
    """Bytes: everything read once, or twice and its gradient written in training."""
    inputs = sum(t.numel() for t in p[:-1] if t is not None)
    return 4.0 * (p.dy.numel() + inputs * (3 if training else 1))


@pytest.fixture
def settings(row: Row, options: harness.Options) -> Iterator[Case]:
    """The row's threads, and its sizes in these options."""
    with harness.threads(row.threads, options):
        yield row.case._replace(n=64) if options.quick else row.case


def test_soft_assignment(benchmark: Any, row: Row, options: harness.Options, settings: Case) -> None:
    case, device = settings, options.device
    p, checked = problem(case, device), truth(case, device)
    subject = contestant(case, p, "fastroute", ours("auto"), device)
    rivals = [contestant(case, p, "eager", plain, device)]
    if not row.grid or row.threads == 1:
        rivals.append(contestant(case, p, "torch.compile", torch.compile(plain, dynamic=False), device))
    if row.grid and row.threads == 1 and case.training and case.B * case.n <= TUNED:
        tuned = torch.compile(plain, dynamic=False, mode="max-autotune-no-cudagraphs")
        rivals.append(contestant(case, p, "torch.compile, max-autotune", tuned, device))
    if not options.gpu and not row.grid:
        rivals.append(contestant(case, p, "fastroute, reference", ours("reference"), device))
    what = "training" if case.training else "forward"
    info: dict[str, Any] = {"case": str(case), "pass": what, "threads": row.threads, "targets": row.targets}
    work = 2 * case.B * case.n * case.m * case.h * (3 if case.training else 1)
    info |= {"GFLOP": work / 1e9, "GB": moved(p, case.training) / 1e9}
    info["backend"] = taken("soft_assignment", torch.device(device).type, torch.float32)
    benchmark.extra_info.update(info | ({"grid": True} if row.grid else {}))
    how = {"seconds": 1.0, "most": 40} if row.grid else {"seconds": 2, "most": 60}
    harness.race(benchmark, subject, rivals, [], checked, options=options, **how)
    if options.gpu:
        harness.add_roofline(benchmark.extra_info, device, torch.float32, False, options.quick)
    harness.fail_if_wrong(benchmark, str(row))
