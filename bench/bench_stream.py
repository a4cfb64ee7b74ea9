"""EfficientVectorRouting.stream from a file, against the same vectors whole in memory.

Two iterations; gradients, where a row trains, are those of the parameters, since streamed vectors have none.
Axes: n input vectors, m output vectors, d width of an input vector, h width of an output vector.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastroute
from bench import harness
from bench.bench_vector_routing import Case, Row, problem, truth, upstream
from bench.child import resident_growth
from bench.harness import Here, Options, Product, Results

MODULE = "bench.bench_stream"

_FIXED = Case(1, 100_000, 100, 256, 256)
_GRAM = _FIXED._replace(any_length=True)
_WIDE = Case(1, 20_000, 100, 1_024, 1_024, any_length=True)

# The targets of a ratio are "at least"; those named max_ are "at most", in MB. Reading narrow vectors takes as long as
# a product with a hundred outputs, so the target of the floor is that of the wide ones.
_ROWS = [
    Row(case, what, {"max_MB": 300, **({"floor": 0.7} if case == _WIDE else {})}, memory=True)
    for case in (_FIXED, _GRAM, _WIDE)
    for what in ("forward", "training")
]


def rows(options: Options) -> list[Row]:
    """conftest makes a test of each."""
    return _ROWS


# ---------------------------------------------------------------------------------------------- the contestants


@lru_cache(maxsize=1)
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fastroute-bench-stream-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@lru_cache(maxsize=2)
def _file(case: Case, device: str) -> np.memmap[Any, Any]:
    """The problem's vectors, in a file."""
    x = problem(case, device).x[0].cpu()
    path = _folder() / f"{case.n}-{case.d}-{case.any_length}.bin"
    x.numpy().tofile(path)
    return np.memmap(path, np.float32, "r", shape=tuple(x.shape))


def contestant(case: list[Any], what: str, rival: str, device: str = "cpu", small: bool = False) -> Here:
    """Also built by ``bench.child`` from JSON. ``small``: the same with few rows."""
    shape = Case(*case)
    shape = shape.smaller() if small else shape
    p = problem(shape, device)
    leaves = {f"d{k}": t for k, t in p.w._asdict().items() if t is not None and k != "prior"}
    streams = rival in ("fastroute", "fastroute, from memory")
    vectors = None if not streams else _file(shape, device) if rival == "fastroute" else p.x[0]
    ways: dict[str, Callable[[], Tensor]] = {
        "fastroute": lambda: p.layer.stream(vectors)[None],
        "fastroute, from memory": lambda: p.layer.stream(vectors)[None],
        "fastroute, whole": lambda: p.layer(p.x),
        "eager, whole": lambda: upstream(p.x, p.w),
    }

    def reset() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def run() -> Results:
        if what == "forward":
            with torch.no_grad():
                return {"x_out": ways[rival]()}
        reset()
        y = ways[rival]()
        y.backward(p.dy)
        return {"x_out": y.detach(), **{k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}}

    p.x.requires_grad_(False)
    return Here(rival, run, device, reset)


def products(case: Case, what: str) -> list[Product]:
    """Every matrix product: of a pass with the outputs' matrices, of what is summed over rows, and those per output.

    With n_inp = -1 the first iteration is the Gram matrix (three of its four quarters) where d <= 2 m, and else has
    both betas in one.
    """
    _, n, m, d, h, any_length = case[:6]
    gram = any_length and d <= 2 * m
    made = [Product("nn", m, d, h, 2), Product("nn", m, h, d)]  # votes, predictions
    if gram:
        made += [Product("tn", d, n, d // 2), Product("tn", d // 2, n, d // 2), Product("nn", m, d, d)]
    elif any_length:
        made += [Product("nt", n, d, m), Product("tn", m, n, d)]
    else:
        made += [Product("tn", m, n, d)]
    made += [Product("nt", n, d, (3 if any_length else 1) * m), Product("tn", m, n, d)]
    if what == "forward":
        return made
    made += [
        Product("nt", m, h, d, 2), Product("tn", d, m, h, 2),  # of the votes: dU, dW_F2
        Product("nn", m, h, d), Product("nt", m, d, h), Product("tn", h, m, d),  # predictions again, dz, dW_G1
        Product("nt", n, d, (4 if any_length else 2) * m), Product("tn", (3 if any_length else 1) * m, n, d),
    ]  # fmt: skip
    if gram:
        return [*made, Product("nt", n, d, d), Product("nn", m, d, d), Product("tn", d, m, d)]
    if any_length:
        return [*made, Product("nt", n, d, 2 * m), Product("tn", m, n, d)]
    return [*made, Product("nt", n, d, m)]


# ---------------------------------------------------------------------------------------------- the rows


@pytest.fixture
def settings(row: Row, options: Options) -> Iterator[Case]:
    """The row's threads, and its sizes in these options."""
    with harness.threads(row.threads, options):
        yield row.case.smaller() if options.quick else row.case


def test_stream(benchmark: Any, row: Row, options: Options, settings: Case) -> None:
    case, device = settings, options.device
    checked = truth(case, device)
    names = ("fastroute", "fastroute, from memory", "fastroute, whole", "eager, whole")
    subject, *rivals = (contestant(list(case), row.what, name, device) for name in names)
    made = products(case, row.what)
    layer, _, x, _ = problem(case, device)
    passes = 2 if row.what == "forward" else 4
    benchmark.extra_info.update(
        case=str(case),
        threads=row.threads,
        targets=row.targets,
        GFLOP=harness.flops(made) / 1e9,
        GB=passes * x.nbytes / 1e9,
        backend=fastroute.explain(layer, x)[0].backend,
        **{"pass": row.what},
    )
    floors = harness.floors(made, case.torch_dtype, device)
    harness.race(benchmark, subject, rivals, floors, checked, options=options, seconds=3)
    if options.gpu:
        harness.add_roofline(benchmark.extra_info, device, case.torch_dtype, case.tf32, options.quick)
    elif row.memory:
        arguments = {"case": list(case), "what": row.what, "threads": 1}
        benchmark.extra_info["memory"] = {
            name: resident_growth(MODULE, {**arguments, "rival": name})["growth"] for name in (names[0], names[-1])
        }
    harness.fail_if_wrong(benchmark, str(row))
