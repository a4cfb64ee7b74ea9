"""Communication of a routing whose input vectors are spread over ranks, and what a step costs on many GPUs.

``python -m bench.distributed_model`` rewrites its tables in docs/distributed.md, and its picture in docs/img.
The bytes are the algorithm's, and tested; the times are a model: nothing here was measured on more than one machine.
Axes: B batch, n input vectors, m output vectors, d width of an input, h of an output, T iterations, N ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "distributed.md"
PICTURE = ROOT / "docs" / "img" / "distributed_scaling.png"


class Routing(NamedTuple):
    B: int
    n: int
    m: int
    d: int
    h: int
    T: int = 2
    any_length: bool = False

    def all_reduces(self) -> list[int]:
        """Elements of each all-reduce of a training step, in order."""
        made = [self.B * self.m * (self.d + 1)] * self.T + [self.B * self.m * self.d] * (self.T - 1)
        if self.any_length:  # the gradients of W_A, B_A, W_S, B_S and both Linears, which all vectors share
            scores = 2 * self.m if self.T > 1 else 0
            made.append(self.d + 1 + scores + 2 * self.m * (self.d + 1))
        return made

    def flops(self, N: int) -> float:
        """Of a rank in a training step: matrix products over its vectors, forward and backward, and per output."""
        later, md = self.T - 1, self.m * self.d
        if self.any_length:  # the first iteration is a Gram matrix
            multiplications = later * (3 + 11) * md + 1.75 * self.d**2
        else:
            multiplications = later * (2 + 5) * md + (1 + 2) * md
        outputs = 3 * (self.T + later) * md * self.h
        return 2.0 * self.B * (self.n / N * multiplications + outputs)

    def bytes(self, N: int) -> float:
        """Of a rank's memory traffic in a training step, in float32: vectors and the parameters that belong to them."""
        vectors, pairs = self.B * self.n / N * self.d, self.n / N * self.m
        parameters = 0.0 if self.any_length else 1.0
        forward = (self.T + parameters) * vectors + parameters * (2 + 4 * (self.T - 1)) * pairs
        backward = (3 * self.T + parameters) * vectors + parameters * (4 + 10 * (self.T - 1)) * pairs
        return 4 * (forward + backward)


class Machine(NamedTuple):
    """What is assumed of a GPU and of what connects them."""

    flops: float = 150e12  # TF32 products, of 495e12
    memory: float = 2.7e12  # bytes/s, of 3.35e12
    launches: float = 60e-6  # s, the kernels' launches of a step that the GPU waits for
    node: int = 8
    inside: float = 300e9  # bytes/s of an all-reduce within a node (NVLink)
    between: float = 40e9  # bytes/s between nodes (a 400 Gbit/s port per GPU)
    inside_latency: float = 4e-6  # s per step of a tree within a node
    between_latency: float = 8e-6  # s per step of a tree between nodes

    def all_reduce(self, size: float, N: int) -> float:
        """Seconds: within the node and between nodes, latencies of a tree and 2 (k - 1) / k of the bytes on a link."""
        inside, nodes = min(N, self.node), math.ceil(N / self.node)
        time = 2 * (inside - 1) / inside * size / self.inside + 2 * math.log2(inside) * self.inside_latency
        return time + 2 * (nodes - 1) / nodes * size / self.between + 2 * math.log2(nodes) * self.between_latency

    def step(self, case: Routing, N: int) -> tuple[float, float]:
        """(seconds of computing, seconds of communication) of a training step."""
        compute = max(case.flops(N) / self.flops, case.bytes(N) / self.memory) + self.launches
        return compute, sum(self.all_reduce(4 * size, N) for size in case.all_reduces())


STRONG = {
    "n = 1 million": Routing(1, 1_000_000, 100, 1024, 1024),
    "n = 100 million, any length": Routing(1, 100_000_000, 100, 1024, 1024, any_length=True),
    "batch 64, n = 4925, any length": Routing(64, 4925, 64, 1024, 1024, any_length=True),
}
WEAK = {f"{n:,} vectors per GPU": Routing(1, n, 100, 1024, 1024, any_length=True) for n in (10_000, 100_000, 1_000_000)}
RANKS = (1, 2, 8, 32, 128, 512, 2048, 4096)


def efficiencies(weak: bool, machine: Machine) -> dict[str, list[tuple[int, float, float]]]:
    """{case: [(N, seconds of a step, share of N times one GPU's speed)]}"""
    found = {}
    for name, case in (WEAK if weak else STRONG).items():
        alone = sum(machine.step(case, 1))
        rows = []
        for N in RANKS:
            time = sum(machine.step(case._replace(n=case.n * N) if weak else case, N))
            rows.append((N, time, alone / time / (1 if weak else N)))
        found[name] = rows
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] + ["---:"] * (len(head) - 1), *rows))


def text(machine: Machine) -> str:
    parts = []
    for weak in (False, True):
        rows = [
            [name, *(f"{1e3 * time:.2f} ms, {100 * share:.0f} %" for _, time, share in found)]
            for name, found in efficiencies(weak, machine).items()
        ]
        parts.append(table(["weak scaling" if weak else "strong scaling", *(f"N = {N}" for N in RANKS)], rows))
    return "\n\n".join(parts)


def put(name: str, text: str, page: Path = PAGE) -> None:
    """Between the page's markers."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    page.write_text(between.sub(lambda _: f"{begin}\n{text}\n{end}", page.read_text()))


def draw(machine: Machine) -> None:
    from fastroute.plots.figures import LINES, empty_figure

    figure = empty_figure(8.0, 4.2, None)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, weak in zip(axes, (False, True), strict=True):
        for (name, found), style in zip(efficiencies(weak, machine).items(), LINES, strict=False):
            axis.plot([N for N, _, _ in found], [share for _, _, share in found], **style, markersize=5, label=name)
        axis.set(xscale="log", xlabel="GPUs", title="weak scaling" if weak else "strong scaling", ylim=(0, 1.05))
        axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("efficiency (model)")
    figure.savefig(PICTURE)


if __name__ == "__main__":
    put("model", text(Machine()))
    draw(Machine())
