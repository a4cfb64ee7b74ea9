"""EfficientVectorRouting, forward and training, against the operator sequence that heinsen_routing runs.

Two iterations. Axes: B batch, n input vectors, m output vectors, d width of an input vector, h width of an output
vector.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastroute
from bench import harness
from bench.child import Elsewhere, resident_growth
from bench.harness import Here, Options, Product, Results, Truth
from fastroute.ops.efficient_routing import native
from fastroute.ops.efficient_routing.contract import Parameters
from fastroute.ops.efficient_routing.reference import efficient_routing as reference
from fastroute.ops.gemm import prefers_onednn

MODULE = "bench.bench_vector_routing"


class Case(NamedTuple):
    """The sizes of one call."""

    B: int
    n: int
    m: int
    d: int
    h: int
    any_length: bool = False  # n_inp = -1
    dtype: str = "float32"
    tf32: bool = False

    def __str__(self) -> str:
        batch = f"batch {self.B}, " if self.B > 1 else ""
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        tf32, any_length = ", TF32" * self.tf32, ", n_inp = -1" * self.any_length
        return f"{batch}{self.n} x {self.d} to {self.m} x {self.h}{any_length}{dtype}{tf32}"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def multiply_adds(self) -> int:
        """Of one product over all rows."""
        return self.B * self.n * self.m * self.d

    def smaller(self) -> Case:
        return self._replace(n=max(64, self.n // 10))


@dataclass(frozen=True)
class Row:
    """A case, a pass ("forward" under no_grad, or "training": forward and backward with x.grad), and its targets."""

    case: Case
    what: str
    targets: dict[str, float] = field(default_factory=dict, hash=False)
    threads: int = 1
    memory: bool = False

    def __str__(self) -> str:
        c = self.case
        sizes = f"B{c.B}-n{c.n}-m{c.m}-d{c.d}-h{c.h}" + "-any" * c.any_length + f"-{c.dtype}" + "-tf32" * c.tf32
        return f"{sizes}-{self.what}-{self.threads}thread"


_LARGE, _MIDDLE, _SMALL = (Case(1, n, 100, 256, 256) for n in (100_000, 20_000, 1_000))
_ANY = _LARGE._replace(any_length=True)
_WIDE = Case(2, 2_000, 1_000, 1_024, 1_024)
_BATCH, _TINY = Case(128, 64, 16, 32, 32), Case(4, 50, 10, 64, 64)  # on a CPU the grid has them

# The targets of a ratio are "at least"; those named max_ are "at most", in MB or ms or GB.
_CPU = [
    Row(_LARGE, "forward", {"eager": 2.7, "torch.compile": 1.7, "floor": 0.75, "max_MB": 20}, memory=True),
    Row(_LARGE, "training", {"eager": 2.5, "torch.compile": 1.5, "floor": 0.75, "max_MB": 40}, memory=True),
    Row(_ANY, "forward", {"eager": 2.0, "torch.compile": 1.4, "max_MB": 20}, memory=True),
    Row(_ANY, "training", {"eager": 1.8, "torch.compile": 1.3, "max_MB": 40}, memory=True),
    Row(_MIDDLE, "training", {"eager": 1.5, "torch.compile": 1.3}),
    Row(_WIDE, "training", {"eager": 1.1, "torch.compile": 1.05}, memory=True),
    Row(_SMALL, "forward", {"eager": 1.0}),
    Row(_SMALL, "training", {"eager": 1.0}),
]

_MILLION = Case(1, 1_000_000, 100, 1_024, 1_024, tf32=True)
_HALF = Case(4, 2_000, 1_000, 1_024, 2_048, dtype="bfloat16")

_MILLION_HALF, _MILLION_FULL = _MILLION._replace(dtype="bfloat16", tf32=False), _MILLION._replace(tf32=False)

_GPU = [
    Row(_MILLION, "forward", {"max_ms": 5, "max_GB": 10.4}, memory=True),
    Row(_MILLION, "training", {"max_ms": 20, "max_GB": 20.8}, memory=True),
    *(Row(case, what, memory=True) for case in (_MILLION_HALF, _MILLION_FULL) for what in ("forward", "training")),
    Row(_HALF, "forward", {"matmul": 0.45}, memory=True),
    Row(_HALF, "training", {"matmul": 0.45}, memory=True),
    *(Row(row.case, row.what) for row in _CPU),
    *(Row(case, what) for case in (_BATCH, _TINY) for what in ("forward", "training")),
]


def rows(options: Options) -> list[Row]:
    """conftest makes a test of each; rows of one case stand together, so that it is built once."""
    if options.gpu:
        return _GPU
    found: list[Row] = []
    for case in dict.fromkeys(row.case for row in _CPU):
        found += [row for row in _CPU if row.case == case]
        found += [Row(case, "training", threads=2)] * (case == _WIDE)  # of the others, the grid has two threads
    return found


# ---------------------------------------------------------------------------------------------- the contestants


def upstream(x: Tensor, w: Parameters) -> Tensor:
    """heinsen_routing's operators in their order: what does not change between iterations is computed once."""
    scaled = x * x.shape[-2] ** -0.5
    use, ign = (
        b if bias is None else F.linear(x, b, bias) for b, bias in ((w.beta_use, w.bias_use), (w.beta_ign, w.bias_ign))
    )
    f = ((scaled * w.W_A).sum(-1) + w.B_A).sigmoid().unsqueeze(-1)
    R, x_out = w.prior, x
    for t in range(2):
        if t > 0:
            pred = F.layer_norm(x_out, x_out.shape[-1:]) @ w.W_G1 * w.W_G2 + w.B_G2
            R = F.logsigmoid(x @ pred.mT * w.W_S + w.B_S).softmax(-1)
        D_use = f * R
        D_ign = f - D_use
        phi = use * D_use - ign * D_ign
        x_out = (phi.mT @ scaled * w.W_F1) @ w.W_F2 + phi.sum(-2).unsqueeze(-1) * w.B_F2
    return F.layer_norm(x_out, x_out.shape[-1:])


class Problem(NamedTuple):
    """A layer with its input and what comes back from the loss."""

    layer: fastroute.EfficientVectorRouting
    w: Parameters
    x: Tensor
    dy: Tensor


@lru_cache(maxsize=1)
def problem(case: Case, device: str) -> Problem:
    torch.manual_seed(0)
    n_inp = -1 if case.any_length else case.n
    factory: dict[str, Any] = {"device": device, "dtype": case.torch_dtype}
    layer = fastroute.EfficientVectorRouting(n_inp, case.m, case.d, case.h, **factory)
    with torch.no_grad():
        for bias in (layer.B_A, layer.B_F2, layer.B_G2, layer.B_S):  # zero at first, which would hide faults
            bias.normal_(std=0.3)
    x, dy = torch.randn(case.B, case.n, case.d, **factory), torch.randn(case.B, case.m, case.h, **factory)
    return Problem(layer, layer._parameters_by_name(), x, dy)


def _pass(
    what: str, fn: Callable[[Tensor], Tensor], w: Parameters, x: Tensor, dy: Tensor
) -> tuple[Callable[[], Results], Callable[[], None]]:
    """ "forward", "graph" (forward, its graph kept) or "training", with gradients under their parameters' names.

    Returns the pass, and what lets go of its gradients.
    """
    leaves = {"dx": x, **{f"d{k}": t for k, t in w._asdict().items() if t is not None and k != "prior"}}

    def reset() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def run() -> Results:
        if what == "forward":
            with torch.no_grad():
                return {"x_out": fn(x)}
        reset()
        for leaf in leaves.values():
            leaf.requires_grad_()
        y = fn(x)
        if what == "graph":
            return {"x_out": y}
        y.backward(dy)
        return {"x_out": y.detach(), **{k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}}

    return run, reset


def contestant(case: list[Any], what: str, rival: str, device: str = "cpu", small: bool = False) -> Here:
    """Also built by ``bench.child`` from JSON. ``small``: the same with few rows."""
    shape = Case(*case)
    p = problem(shape.smaller() if small else shape, device)
    backend = {"fastroute": "auto", "fastroute, tiles": "reference"}.get(rival, "auto")

    def routed(x: Tensor) -> Tensor:
        with harness.on(backend):
            y: Tensor = p.layer(x)
        return y

    def eager(x: Tensor) -> Tensor:
        return upstream(x, p.w)

    if rival == "torch.compile":
        torch._dynamo.reset()
        compiled = torch.compile(upstream)

        def fn(x: Tensor) -> Tensor:
            return compiled(x, p.w)
    else:
        fn = eager if rival == "eager" else routed
    run, reset = _pass(what, fn, p.w, p.x, p.dy)
    return Here(rival, run, device, reset)


# ---------------------------------------------------------------------------------------------- the truth


def _exact(x: Tensor, dy: Tensor, parameters: Sequence[Tensor | None]) -> Results:
    w = Parameters(*(None if t is None else t.detach().double() for t in parameters))  # type: ignore[arg-type]

    def literal(x: Tensor) -> Tensor:
        return reference(x, w, n_iters=2, normalize=True)

    return _pass("training", literal, w, x.detach().double(), dy.double())[0]()


#: Rows from which results are compared by norm: to round them at random takes minutes, or more than a GPU's memory.
#: On a CPU so it does where a product over all rows has so many multiply-adds.
MANY, FEWER, MUCH = 100_000, 50, 30_000_000
DRAWS = 3  #: by which it is told how far rounded inputs move results: one alone may be small by luck


def by_norm(case: Case, device: str) -> harness.ByNorm:
    """The gate of a case of many rows; exact results are by tiles of rows in float64."""
    few = case._replace(n=max(case.n // FEWER, 64))
    known, found = rounding(few, device), contestant(list(few), "training", "fastroute", device).results()
    exact = by_tiles(case, device)
    return harness.ByNorm(
        known, found, exact, case.n / few.n,
        lambda: (moves(case, device, exact), moves(few, device, by_tiles(few, device))),
    )  # fmt: skip


def by_tiles(case: Case, device: str, draw: torch.Generator | None = None) -> Results:
    """Results in float64; with ``draw``, after every number given is rounded to float32 at random."""
    p = problem(case, device)
    layer, x, dy = copy.deepcopy(p.layer).double(), p.x.detach().double(), p.dy.double()
    with torch.no_grad():
        for t in (x, dy, *layer.parameters()) if draw is not None else ():
            for part in t.view(-1).split(1 << 24):
                half = torch.rand(part.shape, generator=draw, device=device, dtype=part.dtype).sub_(0.5)
                part.mul_(half.mul_(torch.finfo(torch.float32).eps).add_(1.0))
    with fastroute.use_backend("reference"):
        run, _ = _pass("training", layer, layer._parameters_by_name(), x, dy)
        return {name: t.detach() for name, t in run().items()}


def moves(case: Case, device: str, exact: Results) -> dict[str, float]:
    """How far each result moves, by norm and relative, where every number given is rounded at random."""
    draw, squares = torch.Generator(device).manual_seed(0), dict.fromkeys(exact, 0.0)
    for _ in range(DRAWS):
        for name, t in by_tiles(case, device, draw).items():
            squares[name] += (harness.apart(t, exact[name]) / max(harness.size(exact[name], 2), 1e-300)) ** 2
    return {name: math.sqrt(square / DRAWS) for name, square in squares.items()}


@lru_cache(maxsize=1)
def truth(case: Case, device: str) -> harness.Gate:
    with harness.threads(2):
        much = case.n >= MANY or (device == "cpu" and case.multiply_adds >= MUCH)
        return by_norm(case, device) if much else rounding(case, device)


def rounding(case: Case, device: str) -> Truth:
    p = problem(case, device)
    half = case.torch_dtype if case.torch_dtype.itemsize == 2 else None
    how = {"stored": half, "operands": "tf32" if device == "cuda" and torch.backends.cuda.matmul.allow_tf32 else None}
    return Truth(lambda: _exact(p.x, p.dy, p.w), case.torch_dtype, **how)


# ---------------------------------------------------------------------------------------------- counts


def products(case: Case, what: str) -> list[Product]:
    """Every matrix product of the algorithm: three over the rows forward, seven backward, and those per output.

    With n_inp = -1, the Gram matrix (three of its four quarters) stands for the first iteration, and the second
    has linear betas in its products.
    """
    B, n, m, d, h, any_length = case[:6]
    forward = [Product("nn", B * m, d, h, 2), Product("nn", B * m, h, d)]  # votes, predictions
    backward = [
        Product("nt", B * m, h, d, 2), Product("tn", d, B * m, h, 2),  # of the votes: dU, dW_F2
        Product("nn", B * m, h, d),  # predictions again
        Product("nt", B * m, d, h), Product("tn", h, B * m, d),  # dz, dW_G1
    ]  # fmt: skip
    if any_length:
        forward += [Product("tn", d, n, d // 2, B), Product("tn", d // 2, n, d // 2, B), Product("nn", m, d, d, B)]
        forward += [Product("nt", n, d, 3 * m, B), Product("tn", m, n, d, B)]
        backward += [Product("nt", n, d, 4 * m, B), Product("nn", n, m, d, 4 * B), Product("tn", m, n, d, 3 * B)]
        backward += [Product("nt", n, d, d, B), Product("nn", m, d, d, B), Product("tn", d, m, d, B)]
    else:
        forward += [Product("tn", m, n, d, 2 * B), Product("nt", n, d, m, B)]
        backward += [Product("nt", n, d, m, 3 * B), Product("nn", n, m, d, 3 * B), Product("tn", m, n, d, B)]
    return forward + (backward if what == "training" else [])


def moved(case: Case, what: str) -> int:
    """Bytes that have to be read and written if x, the parameters and their gradients do not stay in a cache."""
    B, n, m, d, h, any_length = case[:6]
    rows = 0 if any_length else 1
    per_output = 3 * m * d + 2 * d * h + m * h + (2 * m * d if any_length else 0)
    floats = 2 * B * n * d + rows * (n * d + 6 * n * m) + 2 * B * n + per_output
    if what == "training":
        floats += 5 * B * n * d + rows * (2 * n * d + 14 * n * m) + 2 * per_output
    return floats * case.torch_dtype.itemsize


# ---------------------------------------------------------------------------------------------- the rows


@pytest.fixture
def settings(row: Row, options: Options) -> Iterator[Case]:
    """The row's threads and precision, and its sizes in this options."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = row.case.tf32
    with harness.threads(row.threads, options):
        yield row.case.smaller() if options.quick else row.case
    torch.backends.cuda.matmul.allow_tf32 = tf32


#: Multiply-adds of a product up to which plain PyTorch's tiles stand beside: of more, they say the same.
TILED = 1 << 30


def rivals_of(case: Case, row: Row, options: Options) -> list[Any]:
    tiles = not options.gpu and case.multiply_adds < TILED
    names = ["eager", "torch.compile", *["fastroute, tiles"] * tiles]
    found: list[Any] = [contestant(list(case), row.what, name, options.device) for name in names]
    if options.gpu and case.n < MANY:
        found.append(harness.replayed(contestant(list(case), row.what, "fastroute", options.device)))
    own = case.m * case.d <= native.WIDEST  # whose products are no library's
    if not options.gpu and not own and row.threads == 1 and prefers_onednn():
        arguments = {"case": list(case), "what": row.what, "rival": "fastroute", "threads": 1}
        found.append(Elsewhere("fastroute, MKL", MODULE, arguments, {"FASTROUTE_GEMM": "mm"}))
    return found


def memory(case: Case, what: str, options: Options) -> dict[str, Any]:
    """Of each contestant: MB beyond module, input and gradients (CPU), or GB in all (GPU)."""
    found: dict[str, Any] = {}
    for rival in ("fastroute", "eager")[: 1 if what == "graph" and not options.gpu else 2]:
        if options.gpu:
            one = contestant(list(case), what, rival, options.device)
            found[rival] = harness.gpu_peak(one, [problem(case, "cuda").x, *problem(case, "cuda").layer.parameters()])
        else:
            arguments = {"case": list(case), "what": what, "rival": rival, "threads": 2}
            found[rival] = resident_growth(MODULE, arguments)["growth"]
    return found


def test_vector_routing(benchmark: Any, row: Row, options: Options, settings: Case) -> None:
    case, device = settings, options.device
    harness.make_room(device, 75e9 if case.n >= MANY else 0)
    checked = truth(case, device)
    subject = contestant(list(case), row.what, "fastroute", device)
    rivals = rivals_of(case, row, options)
    made = products(case, row.what)
    layer, _, x, _ = problem(case, device)
    info = {"case": str(case), "pass": row.what, "threads": row.threads, "targets": row.targets}
    info |= {"GFLOP": harness.flops(made) / 1e9, "GB": moved(case, row.what) / 1e9}
    benchmark.extra_info.update(info, backend=fastroute.explain(layer, x)[0].backend)
    try:
        harness.race(
            benchmark,
            subject,
            rivals,
            harness.floors(made, case.torch_dtype, device) if row.threads == 1 else [],
            checked,
            options=options,
            seconds=2,
        )
    finally:
        for one in rivals:
            one.close()
    if options.gpu:
        harness.add_roofline(benchmark.extra_info, device, case.torch_dtype, case.tf32, options.quick)
    if row.memory and (device == "cuda" or not options.gpu):
        what = "graph" if row.what == "forward" else "training"
        benchmark.extra_info["memory"] = memory(case, what, options)
    harness.fail_if_wrong(benchmark, str(row))


def test_grid(benchmark: Any, options: Options) -> None:
    """Many sizes against upstream's operators; ``bench.routing_grid`` says which, and what a cell is."""
    from bench import routing_grid

    if options.gpu:
        pytest.skip("the grid is a CPU's")
    cells = benchmark.pedantic(routing_grid.run, (options.quick, options.whole), rounds=1)
    benchmark.extra_info.update(grid=cells)
    wrong = [cell for cell in cells if "off" in cell]
    assert not wrong, wrong
