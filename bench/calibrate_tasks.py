"""Where the cost rule of mixed batches gets its two numbers: a layer run densely with masks, and task by task.

``python -m bench.calibrate_tasks`` times both ways, forward and backward, for convolutions of many sizes, fits what a
weight's gathering and one more product cost (``fastroute.tasks.live_products.GATHER`` and ``CALL``), and prints how
much time the rule loses against always knowing the better way. One thread, process CPU time, both ways in turn.

Axes: C channels in and out, S x S positions, G tasks, n samples of each, K elements of a kernel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
from torch import Tensor, nn

from fastroute import functional
from fastroute.tasks import live_execution, live_products
from fastroute.tasks.live_channels import sort


class Point(NamedTuple):
    """A layer and a batch."""

    C: int
    S: int
    G: int
    n: int
    sigma: float
    K: int = 9

    @property
    def live(self) -> int:
        return self.C - int(self.C * self.sigma)

    @property
    def positions(self) -> int:
        return self.G * self.n * self.S * self.S

    @property
    def dense_work(self) -> int:
        return self.positions * self.C * self.C * self.K

    def favours(self, gather: float, call: float) -> bool:
        widths = (self.C, self.C), (self.live, self.live)
        return live_products.grouped_is_cheaper(self.positions, self.G, *widths, self.K, gather=gather, call=call)


class Timed(NamedTuple):
    """Seconds of either way."""

    point: Point
    dense: float
    grouped: float


#: What the rule has to get right: layers of a vgg11 at 32 x 32 and 64 x 64, 20 tasks with 3 images each; and of the
#: small networks of the demo and of examples/, 42 tasks with 6 images of 8 x 8 each.
NAMED = [Point(C, S, 20, 3, 0.5) for C, S in ((64, 32), (128, 16), (256, 16), (256, 8), (512, 8), (512, 4), (512, 2))]
NAMED += [Point(C, S, 42, 6, 0.5) for C, S in ((16, 8), (32, 8), (32, 4))]


def points(count: int, most: float) -> list[Point]:
    """Some of a grid, in a fixed random order: layers of up to ``most`` multiply-adds."""
    grid = itertools.product((16, 32, 64, 128, 256, 512), (2, 4, 8, 16, 32), (4, 20, 60), (1, 3, 12), (0.25, 0.5, 0.75))
    found = [Point(*p, K) for p, K in itertools.product(grid, (9, 9, 1))]
    found = [p for p in dict.fromkeys(found) if 1e6 <= p.dense_work <= most and p not in NAMED]
    random.Random(0).shuffle(found)
    return NAMED + found[:count]


def ways(p: Point) -> tuple[Callable[[], None], Callable[[], None]]:
    """The layer densely, and task by task; what is between layers is compact in the one, full in the other."""
    generator = torch.Generator().manual_seed(0)
    side = math.isqrt(p.K)
    layer = nn.Conv2d(p.C, p.C, side, padding=side // 2)
    task = torch.arange(p.G).repeat_interleave(p.n)
    order = sort(task, p.G)
    assert order is not None
    live = torch.rand(p.G, p.C, generator=generator).argsort(1)[:, : p.live].sort(1).values
    mapping = torch.zeros(p.G, p.C).scatter_(1, live, 1.0)

    def images(channels: int, few: bool) -> Tensor:
        x = torch.randn(p.G * p.n, channels, p.S, p.S, generator=generator)
        return (x if few else x.contiguous(memory_format=torch.channels_last)).requires_grad_()

    few = p.positions < live_execution._FEW * p.G  # as a live chain has it
    full, compact = images(p.C, False), images(p.live, few)
    d_full, d_compact = torch.randn_like(full), torch.randn_like(compact)

    def drop() -> None:
        for t in (full, compact, *layer.parameters()):
            t.grad = None

    def dense() -> None:
        drop()
        functional.task_mask(layer(full), mapping, task).backward(d_full)

    def grouped() -> None:
        drop()
        live_products.grouped(layer, compact, live, live, order.groups).backward(d_compact)

    return dense, grouped


def timed(p: Point, rounds: int) -> Timed:
    both = ways(p)
    samples: list[list[float]] = [[], []]
    for n in range(rounds + 1):
        for way, found in zip(both, samples, strict=True):
            began = time.process_time()
            way()
            if n:  # the first round is for warming up
                found.append(time.process_time() - began)
    return Timed(p, *map(statistics.median, samples))


def lost(rows: Sequence[Timed], gather: float, call: float) -> float:
    """Share of time lost against the better way: the mean over layers, each counting the same."""
    chosen = (t.grouped if t.point.favours(gather, call) else t.dense for t in rows)
    return statistics.fmean(c / min(t.dense, t.grouped) for c, t in zip(chosen, rows, strict=True)) - 1


def fit(rows: Sequence[Timed]) -> tuple[float, float, float]:
    """(share lost, gather, call): the middle of what is within a thousandth of the best."""
    gathers = [0, 16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024]
    calls = [0.0, *(10 ** (k / 8) for k in range(28, 62))]
    found = [(lost(rows, g, c), g, c) for g in gathers for c in calls]
    best = min(found)[0]
    good = [f for f in found if f[0] <= best + 1e-3]
    middle = good[len(good) // 2]
    return middle


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.calibrate_tasks", description=__doc__)
    parser.add_argument("--points", type=int, default=120, help="layers besides the named ones")
    parser.add_argument("--most", type=float, default=1.5e9, help="multiply-adds of the largest, forward and dense")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON of the times to write")
    parser.add_argument("--again", type=Path, help="fit these times instead of measuring")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.again:
        rows = [Timed(Point(*p), d, g) for p, d, g in json.loads(args.again.read_text())]
    else:
        rows = []
        for p in points(args.points, args.most):
            rows.append(timed(p, args.rounds))
            print(f"{p}: dense {rows[-1].dense * 1e3:.2f} ms, grouped {rows[-1].grouped * 1e3:.2f} ms", file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(rows))
    share, gather, call = fit(rows)
    print(f"fitted: gather {gather:g}, call {call:.3g}: {share:.1%} lost against the better way, {len(rows)} layers")
    for name, g, c in (
        ("as it is", live_products.GATHER, live_products.CALL),
        ("always densely", math.inf, 0.0),
        ("always task by task", 0.0, -math.inf),
    ):
        wrong = [t for t in rows if t.point.favours(g, c) != (t.grouped < t.dense)]
        worst = max((max(t.dense, t.grouped) / min(t.dense, t.grouped) for t in wrong), default=1.0)
        print(f"{name}: {lost(rows, g, c):.1%} lost, {len(wrong)} of {len(rows)} wrong, the worst {worst:.2f} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
