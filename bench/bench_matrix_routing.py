"""GenerativeMatrixRouting, forward and training, against heinsen_routing's equations in plain PyTorch.

Three iterations. Axes: B batch, n input capsules, m output capsules, c rows of a capsule's matrix, d its columns before
routing, h its columns after.
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

import fastroute
from bench import harness
from bench.child import resident_growth
from bench.harness import Here, Options, Results, Truth
from fastroute.ops.matrix_routing.contract import Capsules
from fastroute.ops.matrix_routing.reference import matrix_routing as reference

MODULE = "bench.bench_matrix_routing"
ITERATIONS = 3
EPS = 1e-5


class Case(NamedTuple):
    """The sizes of one call."""

    B: int
    n: int
    m: int
    c: int
    d: int
    h: int
    any_length: bool = False  # n_inp = -1
    p_model: str = "gaussian"

    def __str__(self) -> str:
        any_length, skm = ", n_inp = -1" * self.any_length, ", skm" * (self.p_model == "skm")
        return f"batch {self.B}, {self.n} x {self.c} x {self.d} to {self.m} x {self.c} x {self.h}{any_length}{skm}"

    def smaller(self) -> Case:
        return self._replace(n=max(64, self.n // 10))


@dataclass(frozen=True)
class Row:
    """A case, a pass ("forward" under no_grad, or "training": forward and backward to inputs too), and its targets."""

    case: Case
    what: str
    targets: dict[str, float] = field(default_factory=dict, hash=False)
    compiled: bool = True
    threads: int = 1
    memory: bool = False

    def __str__(self) -> str:
        c = self.case
        sizes = f"B{c.B}-n{c.n}-m{c.m}-c{c.c}-d{c.d}-h{c.h}" + "-any" * c.any_length + "-skm" * (c.p_model == "skm")
        return f"{sizes}-{self.what}-{self.threads}thread"


_LARGE, _SMALL = Case(4, 1000, 64, 4, 4, 4), Case(16, 100, 10, 4, 4, 4)
_ANY, _SKM = Case(4, 4096, 64, 4, 4, 4, any_length=True), _LARGE._replace(p_model="skm")
_GPU_LARGE = Case(16, 4096, 64, 4, 4, 4)

# Ratios are to be "at least"; "memory" is eager's peak growth over fastroute's. Compiling takes longer than timing, so
# torch.compile is where there is a target for it, and in the small case.
_CPU = [
    Row(_LARGE, "forward", {"eager": 4.0, "torch.compile": 1.6, "memory": 10}, memory=True),
    Row(_LARGE, "training", {"eager": 3.0, "torch.compile": 2.2, "memory": 10}, memory=True),
    Row(_LARGE, "forward", compiled=False, threads=2),
    Row(_LARGE, "training", compiled=False, threads=2),
    Row(_ANY, "forward", {"eager": 8.0}, compiled=False),
    Row(_ANY, "training", {"memory": 10}, compiled=False, memory=True),
    Row(_SKM, "training", compiled=False),
    Row(_SMALL, "forward", compiled=False),
    Row(_SMALL, "training"),
]

_GPU = [
    Row(_GPU_LARGE, "forward", {"eager": 10.0, "torch.compile": 4.0}, memory=True),
    Row(_GPU_LARGE, "training", memory=True),
    *(Row(row.case, row.what) for row in _CPU if row.threads == 1),
]


def rows(options: Options) -> list[Row]:
    """conftest makes a test of each; rows of one case stand together, so that it is built once."""
    return _GPU if options.gpu else _CPU


# ---------------------------------------------------------------------------------------------- the contestants


def upstream(a_inp: Tensor, mu_inp: Tensor, w: Capsules, p_model: str) -> tuple[Tensor, Tensor, Tensor]:
    """heinsen_routing's equations: all votes are made, once, and held.

    Products are batched ones and sums are sums, which on a CPU take half the time of the same by einsum, compiled too.
    """
    V = mu_inp[:, :, None] @ w.W + w.B
    f = a_inp.sigmoid().unsqueeze(-1)
    a_out = mu_out = sig2_out = f  # made in the first iteration
    for t in range(ITERATIONS):
        if t == 0:
            R = torch.ones((), device=V.device, dtype=V.dtype) / V.shape[2]
        else:
            square = (V - mu_out[:, None]).square()
            if p_model == "skm":
                log_p = F.log_softmax(-square.sum((-2, -1)), -1)
            else:
                log_p = -(square / (2 * sig2_out[:, None])).sum((-2, -1))
                log_p = log_p - sig2_out[:, None].sqrt().log().sum((-2, -1))
            R = (F.logsigmoid(a_out)[:, None] + log_p).softmax(-1)
        D_use = f * R
        if t == 0:
            D_use = D_use.expand(-1, -1, V.shape[2])
        D_ign = f - D_use
        a_out = (w.beta_use * D_use).sum(1) - (w.beta_ign * D_ign).sum(1)
        q = (D_use / (D_use.sum(1, keepdim=True) + EPS))[..., None, None]
        mu_out = (q * V).sum(1)
        sig2_out = (q * (V - mu_out[:, None]).square()).sum(1) + EPS
    return a_out, mu_out, sig2_out


class Problem(NamedTuple):
    """A layer with its inputs and what comes back from the loss, in the order of its outputs."""

    layer: fastroute.GenerativeMatrixRouting
    w: Capsules
    a_inp: Tensor
    mu_inp: Tensor
    d: tuple[Tensor, Tensor, Tensor]


@lru_cache(maxsize=1)
def problem(case: Case, device: str) -> Problem:
    torch.manual_seed(0)
    B, n, m, c, d, h = case[:6]
    n_inp = -1 if case.any_length else n
    layer = fastroute.GenerativeMatrixRouting(n_inp, m, c, d, h, ITERATIONS, p_model=case.p_model, device=device)
    with torch.no_grad():
        for zero in (layer.B, layer.beta_use, layer.beta_ign):  # at first, which would hide faults
            zero.normal_(std=0.3)
    a_inp, mu_inp = torch.randn(B, n, device=device), torch.randn(B, n, c, d, device=device)
    ends = tuple(torch.randn(shape, device=device) for shape in ((B, m), (B, m, c, h), (B, m, c, h)))
    return Problem(layer, Capsules(layer.W, layer.B, layer.beta_use, layer.beta_ign), a_inp, mu_inp, ends)  # type: ignore[arg-type]


Routed = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
_OUTPUTS = ("a_out", "mu_out", "sig2_out")


def _pass(what: str, fn: Routed, p: Problem) -> tuple[Callable[[], Results], Callable[[], None]]:
    """ "forward", "graph" (forward, its graph kept) or "training", with gradients under their parameters' names.

    Returns the pass, and what lets go of its gradients.
    """
    leaves = {"da_inp": p.a_inp, "dmu_inp": p.mu_inp, **{f"d{k}": t for k, t in p.w._asdict().items()}}

    def reset() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def run() -> Results:
        if what == "forward":
            with torch.no_grad():
                return dict(zip(_OUTPUTS, fn(p.a_inp, p.mu_inp), strict=True))
        reset()
        for leaf in leaves.values():
            leaf.requires_grad_()
        made = fn(p.a_inp, p.mu_inp)
        if what == "graph":
            return dict(zip(_OUTPUTS, made, strict=True))
        torch.autograd.backward(made, p.d)
        found = dict(zip(_OUTPUTS, (t.detach() for t in made), strict=True))
        return found | {k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}

    return run, reset


def contestant(case: list[Any], what: str, rival: str, device: str = "cpu", small: bool = False) -> Here:
    """Also built by ``bench.child`` from JSON. ``small``: the same with few inputs."""
    shape = Case(*case)
    p = problem(shape.smaller() if small else shape, device)
    backend = "reference" if rival == "fastroute, tiles" else "auto"

    def routed(a_inp: Tensor, mu_inp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with harness.on(backend):
            made: tuple[Tensor, Tensor, Tensor] = p.layer(a_inp, mu_inp)
        return made

    if rival == "torch.compile":
        torch._dynamo.reset()
        compiled = torch.compile(upstream)

    def eager(a_inp: Tensor, mu_inp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made: tuple[Tensor, Tensor, Tensor]
        made = (compiled if rival == "torch.compile" else upstream)(a_inp, mu_inp, p.w, shape.p_model)
        return made

    run, reset = _pass(what, routed if rival.startswith("fastroute") else eager, p)
    return Here(rival, run, device, reset)


# ---------------------------------------------------------------------------------------------- the truth


def _exact(p: Problem, fn: Callable[..., Any]) -> Results:
    def leaf(t: Tensor) -> Tensor:
        return t.detach().double()

    w, ends = Capsules(*map(leaf, p.w)), tuple(map(leaf, p.d))
    wide = p._replace(w=w, a_inp=leaf(p.a_inp), mu_inp=leaf(p.mu_inp), d=ends)  # type: ignore[arg-type]
    return _pass("training", lambda a_inp, mu_inp: fn(a_inp, mu_inp, w), wide)[0]()


def _literal(p: Problem, case: Case) -> Results:
    def literal(a_inp: Tensor, mu_inp: Tensor, w: Capsules) -> tuple[Tensor, Tensor, Tensor]:
        made = reference(a_inp, mu_inp, w, n_iters=ITERATIONS, p_model=case.p_model, eps=EPS)
        return made.a_out, made.mu_out, made.sig2_out

    return _exact(p, literal)


#: Input capsules of a sample from which results are compared by norm, and those of fewer one by one.
MANY, FEWER = 500, 64


@lru_cache(maxsize=1)
def truth(case: Case, device: str) -> harness.Gate:
    with harness.threads(2):
        p = problem(case, device)
        if case.n < MANY:
            return Truth(lambda: _literal(p, case), torch.float32)
        few = case._replace(n=FEWER)
        fewer = problem(few, device)
        found = contestant(list(few), "training", "fastroute", device).results()
        known = Truth(lambda: _literal(fewer, few), torch.float32)
        return harness.ByNorm(known, found, _literal(p, case), case.n / few.n)


# ---------------------------------------------------------------------------------------------- counts


def flops(case: Case, what: str) -> int:
    """Of votes that are made whenever they are needed: in each iteration for moments, in all but the first for logits.

    A number of a vote takes 2 d; 4 more towards a logit, 6 towards the moments. The backward pass makes it twice per
    iteration: 4 towards a logit and 4 towards dD, then 8 to its gradient and 4 d from there to dW and dmu_inp.
    """
    B, n, m, c, d, h = case[:6]
    numbers = B * n * m * c * h
    vote = 2 * d
    made = ITERATIONS * (vote + 6) + (ITERATIONS - 1) * (vote + 4)
    if what == "training":
        made += ITERATIONS * (2 * vote + 12 + 4 * d) + (ITERATIONS - 1) * 4
    return numbers * made


def moved(case: Case, what: str) -> int:
    """Bytes that have to be read and written if neither parameters nor inputs stay in a cache from pass to pass.

    A pass reads both; a backward pass also adds to the gradients of both (the first writes them).
    """
    B, n, m, c, d, h = case[:6]
    parameters = (1 if case.any_length else n) * m * (d * h + c * h + 2)
    inputs, outputs = B * n * (c * d + 1), B * m * (2 * c * h + 2)
    floats = ITERATIONS * (parameters + inputs + outputs)
    if what == "training":
        floats += ITERATIONS * (parameters + inputs + 2 * outputs) + (2 * ITERATIONS - 1) * (parameters + inputs)
    return 4 * floats


# ---------------------------------------------------------------------------------------------- the rows


@pytest.fixture
def settings(row: Row, options: Options) -> Iterator[Case]:
    """The row's threads, float32 products in full, and its sizes in this run."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with harness.threads(row.threads, options):
        yield row.case.smaller() if options.quick else row.case
    torch.backends.cuda.matmul.allow_tf32 = tf32


def rivals_of(case: Case, row: Row, options: Options) -> list[Any]:
    names = ["eager"]
    if row.compiled:
        names.append("torch.compile")
    if not options.gpu and row.case == _LARGE:
        names.append("fastroute, tiles")
    return [contestant(list(case), row.what, name, options.device) for name in names]


def memory(case: Case, what: str, options: Options) -> dict[str, Any]:
    """Of each contestant: MB beyond module, inputs and gradients (CPU), or GB in all (GPU)."""
    found: dict[str, Any] = {}
    for rival in ("fastroute", "eager"):
        if options.gpu:
            p = problem(case, "cuda")
            one = contestant(list(case), what, rival, options.device)
            found[rival] = harness.gpu_peak(one, [p.a_inp, p.mu_inp, *p.layer.parameters()])
        else:
            arguments = {"case": list(case), "what": what, "rival": rival, "threads": 2}
            found[rival] = resident_growth(MODULE, arguments)["growth"]
    return found


def test_matrix_routing(benchmark: Any, row: Row, options: Options, settings: Case) -> None:
    case, device = settings, options.device
    harness.make_room(device, 20e9 if row.case == _GPU_LARGE else 0)
    checked = truth(case, device)
    subject = contestant(list(case), row.what, "fastroute", device)
    p = problem(case, device)
    info = {"case": str(case), "pass": row.what, "threads": row.threads, "targets": row.targets}
    info |= {"GFLOP": flops(case, row.what) / 1e9, "GB": moved(case, row.what) / 1e9}
    benchmark.extra_info.update(info, backend=fastroute.explain(p.layer, p.a_inp, p.mu_inp)[0].backend)
    rivals = rivals_of(case, row, options)
    harness.race(benchmark, subject, rivals, [], checked, options=options, seconds=2)
    if options.gpu:
        harness.add_roofline(benchmark.extra_info, device, torch.float32, False, options.quick)
    if row.memory and (device == "cuda" or not options.gpu):
        what = "graph" if row.what == "forward" else "training"
        benchmark.extra_info["memory"] = memory(case, what, options)
    harness.fail_if_wrong(benchmark, str(row))
