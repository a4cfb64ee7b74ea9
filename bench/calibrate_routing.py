"""Where ``efficient_routing``'s choice on a CPU gets its number: its own products against the library's, by width.

``python -m bench.calibrate_routing`` times a training pass, forward and backward op, both ways in turn, on one thread
in process CPU time, fits the largest m d up to which own products are taken
(``fastroute.ops.efficient_routing.native.WIDEST``), and prints how much time the rule loses against always knowing the
better way. ``FASTROUTE_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`` does so for another processor.

Axes: B batch, n input vectors, m output vectors, d width of an input vector and of an output vector.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch

from bench.harness import least
from fastroute.capsules import EfficientVectorRouting
from fastroute.ops.efficient_routing import native

_OUTPUTS, _WIDTHS = (10, 32, 64, 100, 200, 400, 1000), (32, 128, 256, 512, 1024)
_WORK = 1 << 27  # multiply-adds of one product


class Timed(NamedTuple):
    m: int
    d: int
    own: float
    library: float

    def loss(self, widest: float) -> float:
        """What the rule takes over the better way, as a share of it."""
        taken = self.own if self.m * self.d <= widest else self.library
        return taken / min(self.own, self.library) - 1


def _passes(m: int, d: int, n: int) -> tuple[Callable[[], object], Callable[[], object]]:
    ops, layer, x, dy = (
        torch.ops.fastroute,
        EfficientVectorRouting(n, m, d, d),
        torch.randn(1, n, d),
        torch.randn(1, m, d),
    )
    w = [None if t is None else t.detach() for t in layer._parameters_by_name()]
    given = (x, *w, None, None, 2, True)
    other = (*given, "native", "")

    def own() -> object:
        _, kept = ops._efficient_routing_native(*given)
        return ops._efficient_routing_native_backward(*given, dy, kept, True, True)

    def library() -> object:
        _, *kept = ops.efficient_routing(*other)
        return ops.efficient_routing_backward(*other, dy, *kept, True, True)

    return own, library


def timed(m: int, d: int, rounds: int) -> Timed:
    n = min(max(_WORK // (m * d), 64), 1 << 14)
    return Timed(m, d, *least(_passes(m, d, n), rounds=rounds))


def lost(rows: Sequence[Timed], widest: float) -> float:
    return sum(row.loss(widest) for row in rows) / len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.calibrate_routing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON of the times to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    EfficientVectorRouting(2, 2, 2, 2)(torch.randn(1, 2, 2))  # loads the extension
    rows = []
    for m, d in itertools.product(_OUTPUTS, _WIDTHS):
        rows.append(timed(m, d, args.rounds))
        print(f"{m} x {d}: own {1e3 * rows[-1].own:.2f} ms, {rows[-1].library / rows[-1].own:.2f}x", file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(rows))
    fitted = min((float(1 << k) for k in range(8, 22)), key=lambda widest: (lost(rows, widest), -widest))
    for name, widest in (
        ("fitted", fitted), ("as it is", native.WIDEST), ("always own", math.inf), ("always the library", 0.0),
    ):  # fmt: skip
        worst = max(row.loss(widest) for row in rows)
        print(f"{name}, m d to {widest:g}: {lost(rows, widest):.1%} lost, at worst {worst:.0%}, {len(rows)} sizes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
