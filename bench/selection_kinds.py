"""``Selection`` of every kind of module beside a loop over sorted samples, which is what one writes by hand.

``python -m bench.selection_kinds`` times a forward pass without gradients and a training step, on one thread, the least
process CPU time of rounds in turn, and prints a table: ms of ours, and how many times as long the loop takes.

Axes: B samples, K modules, F = 64 features.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
from torch import Tensor, nn

import fastroute
from bench.harness import least

F = 64
#: A module, and the shape of its samples.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(F, F), (F,)),
    "Linear, LayerNorm, ReLU": (lambda: nn.Sequential(nn.Linear(F, F), nn.LayerNorm(F), nn.ReLU()), (F,)),
    "Linear, RMSNorm, SiLU": (lambda: nn.Sequential(nn.Linear(F, F), nn.RMSNorm(F), nn.SiLU()), (F,)),
    "Linear, GELU, Linear": (lambda: nn.Sequential(nn.Linear(F, 2 * F), nn.GELU(), nn.Linear(2 * F, F)), (F,)),
    "Linear, Dropout, Linear": (lambda: nn.Sequential(nn.Linear(F, F), nn.Dropout(0.1), nn.Linear(F, F)), (F,)),
    "Linear, BatchNorm1d": (lambda: nn.Sequential(nn.Linear(F, F), nn.BatchNorm1d(F)), (F,)),
    "Linear of 512": (lambda: nn.Linear(512, 512), (512,)),
    "Linear on 16 tokens": (lambda: nn.Linear(F, F), (16, F)),
    "LayerNorm, Linear on 16 tokens": (lambda: nn.Sequential(nn.LayerNorm(F), nn.Linear(F, F)), (16, F)),
    "Flatten, Linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 32)), (4, 8, 8)),
    "Conv2d, ReLU, MaxPool2d": (
        lambda: nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), (16, 16, 16)),
    "Conv2d, GroupNorm, ReLU": (
        lambda: nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()), (16, 8, 8)),
    "GroupNorm": (lambda: nn.GroupNorm(4, 16), (16, 8, 8)),
}  # fmt: skip
SIZES = ((1, 4), (32, 4), (256, 4), (256, 20), (2048, 8))


def by_hand(modules: Sequence[nn.Module], x: Tensor, actions: Tensor) -> Tensor:
    order = actions.argsort(stable=True)
    parts = x[order].split(actions.bincount(minlength=len(modules)).tolist())
    y = torch.cat([m(part) for m, part in zip(modules, parts, strict=True) if len(part)])
    return torch.empty_like(y).index_copy(0, order, y)


def row(kind: str, B: int, K: int, seconds: float) -> str:
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    modules = [make() for _ in range(K)]
    if B == 1:
        modules = [m.eval() for m in modules]  # batch norm takes no single sample
    layer, meta = fastroute.Selection(*copy.deepcopy(modules)), fastroute.Trajectory(B)
    x, actions = torch.randn(B, *shape, requires_grad=True), torch.randint(K, (B,))
    each: list[tuple[Callable[[], Tensor], list[nn.Parameter]]] = [
        (lambda: layer(x, meta, actions)[0], list(layer.parameters())),
        (lambda: by_hand(modules, x, actions), [p for m in modules for p in m.parameters()]),
    ]
    steps: list[Callable[[], object]] = []
    for f, parameters in each:

        def forward(f: Callable[[], Tensor] = f) -> None:
            with torch.no_grad():
                f()

        def training(f: Callable[[], Tensor] = f, parameters: list[nn.Parameter] = parameters) -> None:
            for p in (x, *parameters):
                p.grad = None
            f().sum().backward()

        steps += [forward, training]
    ours, our_step, theirs, their_step = (1e3 * took for took in least(steps, seconds))
    ratios = [
        f"{'**' if ratio < 0.95 else ''}{ratio:.2f}{'**' if ratio < 0.95 else ''}"
        for ratio in (theirs / ours, their_step / our_step)
    ]
    return f"| {kind} | {B} | {K} | {ours:.3f} | {ratios[0]}× | {our_step:.3f} | {ratios[1]}× |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.selection_kinds", description=__doc__)
    parser.add_argument("--only", default="", help="kinds whose names have this in them")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each row")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| modules | B | K | forward, ms | loop | training, ms | loop |\n|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for B, K in SIZES:
            if args.only in kind and B * math.prod(KINDS[kind][1]) <= 1 << 21:
                print(row(kind, B, K, args.seconds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
