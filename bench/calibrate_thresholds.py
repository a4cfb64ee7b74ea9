"""Where the small thresholds of the CPU's paths get their numbers: both ways around each, in turn.

``python -m bench.calibrate_thresholds`` times a training step (forward and backward) on one thread, in process CPU
time, with a constant set so that one way is taken and then so that the other is. A row says how many of what the
constant counts the size has, both times in ms, and how much faster the way below it is. ``--only`` chooses by name.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
from torch import nn

import fastroute
from bench.harness import least

Step = Callable[[], object]


class Size(NamedTuple):
    name: str
    counted: float  #: in what the constant counts
    step: Callable[[], Step]  #: made under either setting


class Threshold(NamedTuple):
    module: str
    constant: str
    below: Any  #: what makes every size lie below it, and what makes it lie beyond
    beyond: Any
    ways: tuple[str, str]
    sizes: Callable[[], Sequence[Size]]


def _training(f: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> Step:
    def step() -> object:
        for leaf in leaves:
            leaf.grad = None
        f().sum().backward()
        return None

    return step


def _selection(modules: Sequence[nn.Module], x: torch.Tensor) -> Step:
    layer, actions = fastroute.Selection(*modules), torch.arange(len(x)) % len(modules)
    return _training(lambda: layer(x, fastroute.Trajectory(len(x)), actions)[0], *layer.parameters())


def _convolutions() -> list[Size]:
    def step(K: int, B: int, C: int, side: int) -> Step:
        return _selection([nn.Conv2d(C, C, 3, padding=1) for _ in range(K)], torch.randn(B, C, side, side))

    sizes = (
        (4, 4, 4, 4), (20, 64, 4, 4), (20, 64, 16, 4), (20, 64, 16, 8), (4, 8, 8, 16), (20, 64, 32, 8), (20, 64, 8, 16),
        (4, 32, 8, 32), (4, 64, 16, 32), (4, 64, 32, 32), (4, 128, 64, 32),
    )  # fmt: skip
    return [
        Size(f"{B} images of {C} x {s} x {s}, {K} modules", 4.0 * B * s * s * 9 * C / K, partial(step, K, B, C, s))
        for K, B, C, s in sizes
    ]


def _uneven() -> list[Size]:
    def step(K: int, rows: int, first: int) -> Step:
        actions = torch.cat((torch.zeros(first, dtype=torch.int64), 1 + torch.arange(rows - first) % (K - 1)))
        layer, x = fastroute.Selection(*(nn.Linear(64, 64) for _ in range(K))), torch.randn(rows, 64)

        def f() -> torch.Tensor:
            with fastroute.use_backend("reference"):
                y: torch.Tensor = layer(x, fastroute.Trajectory(rows), actions)[0]
            return y

        return _training(f, *layer.parameters())

    sizes = (
        (4, 64, 16), (4, 64, 24), (4, 64, 32), (20, 256, 13), (20, 256, 20), (20, 256, 26), (20, 256, 51),
        (20, 4096, 205), (20, 4096, 410), (100, 400, 4), (100, 400, 8), (100, 400, 16),
    )  # fmt: skip
    return [
        Size(f"{rows} rows, {K} modules, {first} rows of one", float(first), partial(step, K, rows, first))
        for K, rows, first in sizes
    ]


def _modules() -> list[Size]:
    def step(K: int, B: int) -> Step:
        return _selection([nn.Linear(48, 48) for _ in range(K)], torch.randn(B, 48))

    sizes = itertools.product((4, 16, 32, 64, 200), (64, 256))
    return [Size(f"{K} modules of 48 x 48, {B} rows", 2.0 * K, partial(step, K, B)) for K, B in sizes]


def _agent() -> list[Size]:
    def step(B: int, K: int, F: int) -> Step:
        layer, (h, _, agents) = fastroute.REINFORCE(K, F), fastroute.Initialization()(torch.randn(B, F))
        return lambda: layer(h, fastroute.Trajectory(B), agents)

    sizes = ((256, 20, 64), (1024, 20, 256), (4096, 20, 256), (4096, 64, 512), (16384, 64, 512))
    return [Size(f"{B} rows, {F} to {K}", float(B * K * F), partial(step, B, K, F)) for B, K, F in sizes]


def _heads(compiled: bool) -> Callable[[], list[Size]]:
    def step(n: int) -> Step:
        trunk = [{"name": "trunk", "layers": nn.Linear(64, 64)}]
        heads = [{"name": f"t{i}", "layers": nn.Linear(64, 2), "anchor_layer": "trunk"} for i in range(n)]
        model, x = fastroute.MTLModel([*trunk, *heads], [f"t{i}" for i in range(n)]), torch.randn(64, 64)
        called = torch.compile(model) if compiled else model
        return _training(lambda: torch.cat(called(x)[0]), *model.parameters())

    return lambda: [Size(f"{n} heads 64-2, batch 64", float(n), partial(step, n)) for n in (2, 3, 4, 6, 8, 16)]


THRESHOLDS = (
    Threshold("fastroute.networks.grouped_modules", "_UNFOLDED_BYTES_OF_A_MODULE", 1 << 40, -1,
              ("patches, one product", "convolutions one by one"), _convolutions),
    Threshold("fastroute.ops.grouped_linear.plain", "BATCHED_ROWS", math.inf, 0,
              ("one batched product", "a product per module"), _uneven),
    Threshold("fastroute.ops.grouped_linear.op", "MOST_PLANNED", math.inf, -1,
              ("plan and product in one call", "two calls"), _modules),
    Threshold("fastroute.networks.decisions.storage", "_LARGE", math.inf, -1,
              ("product and draw in one op", "the library's product"), _agent),
    Threshold("fastroute.multitask.heads", "_LEAST", {"cpu": 10**9}, {"cpu": 0},
              ("a loop", "together"), _heads(compiled=False)),
    Threshold("fastroute.multitask.heads", "_FEWEST", 10**9, 0,
              ("a loop, compiled", "grouped, compiled"), _heads(compiled=True)),
)  # fmt: skip


@contextmanager
def _set(threshold: Threshold, value: Any) -> Iterator[None]:
    module = importlib.import_module(threshold.module)
    before = getattr(module, threshold.constant)
    setattr(module, threshold.constant, value)
    try:
        yield
    finally:
        setattr(module, threshold.constant, before)


def timed(threshold: Threshold, size: Size, seconds: float) -> tuple[float, float]:
    """The least CPU seconds of a step below and beyond."""
    values, steps = (threshold.below, threshold.beyond), []
    for value in values:
        with _set(threshold, value):
            steps.append(size.step())
    below, beyond = least(steps, seconds, within=lambda way: _set(threshold, values[way]))
    return below, beyond


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.calibrate_thresholds", description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size")
    parser.add_argument("--out", type=Path, help="JSON of the times to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for threshold in THRESHOLDS:
        name = f"{threshold.module}.{threshold.constant}"
        if args.only not in name:
            continue
        now = getattr(importlib.import_module(threshold.module), threshold.constant)
        now = now["cpu"] if isinstance(now, dict) else now
        print(f"\n{name} = {now:,}; below: {threshold.ways[0]}; beyond: {threshold.ways[1]}", flush=True)
        for size in threshold.sizes():
            torch.manual_seed(0)
            below, beyond = timed(threshold, size, args.seconds)
            rows.append(
                {"constant": name, "size": size.name, "counted": size.counted, "below": below, "beyond": beyond}
            )
            side = "below" if size.counted < now else "beyond"
            times = f"{1e3 * below:.3f} | {1e3 * beyond:.3f} | {beyond / below:.2f}x"
            print(f"| {size.name} | {size.counted:,.1f} | {times} | {side} |", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
