"""Masking channels by task: in place forward; with ReLU, trained; with BatchNorm and ReLU, trained.

Axes: B samples, C channels, H x W positions, T = 20 tasks of which each keeps half of the channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.harness import Results, Step, Truth
from fastroute import functional
from fastroute.ops.backends import taken
from fastroute.ops.batch_norm_mask_relu import reference as batch_norm_mask_relu_reference
from fastroute.ops.task_mask import reference as reference

TASKS, TASK = 20, 3
EPS = 1e-5


class Case(NamedTuple):
    """What is done, to x of which shape."""

    kind: str  #: "mask", in place and forward alone; "relu" and "norm", forward and backward
    shape: tuple[int, ...]
    channels_last: bool = False
    each: bool = False  #: a task for every sample
    half: bool = False  #: bfloat16

    def __str__(self) -> str:
        last, each = ", channels last" * self.channels_last, ", a task per sample" * self.each
        return f"{self.kind} {list(self.shape)}{last}{each}{', bfloat16' * self.half}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32


@dataclass(frozen=True)
class Row:
    """A case, and what is asked of it: see ``report`` for "best rival"."""

    case: Case
    threads: int = 1
    targets: dict[str, float] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        kind, shape, last, each, half = self.case
        size = "x".join(map(str, shape)) + "-last" * last + "-each" * each + "-bf16" * half
        return f"{kind}-{size}-{self.threads}thread"


TARGETS = {
    "mask": {"x *= mask": 10.0},
    "relu": {"x * mask, relu": 2.0},
    "norm": {"BatchNorm, x * mask, relu": 1.0},
}


def rows(options: harness.Options) -> list[Row]:
    """conftest makes a test of each; rows of one case stand together, so that it is built once."""
    large, small, flat = (64, 256, 32, 32), (32, 512, 16, 16), (4096, 1024)
    found: list[Row] = []
    for kind in ("mask", "relu", "norm"):
        cases = [Case(kind, large), Case(kind, large, True), Case(kind, small), Case(kind, small, each=True)]
        for case in (*cases, Case(kind, flat), Case(kind, large, half=True)):
            asked = TARGETS[kind] if case == Case(kind, large) and not options.gpu else {}
            found += [Row(case, targets=asked)] + [Row(case, threads=2)] * (not options.gpu)
    return found


# ---------------------------------------------------------------------------------------------- the contestants


class Problem(NamedTuple):
    x: Tensor
    mapping: Tensor
    task: int | Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor


@lru_cache(maxsize=1)
def problem(case: Case, device: str) -> Problem:
    torch.manual_seed(0)
    x, dy = (torch.randn(case.shape, device=device).to(case.dtype) for _ in range(2))
    if case.channels_last:
        x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    C = case.shape[1]
    mapping = (torch.rand(TASKS, C, device=device).argsort(1) >= C // 2).float()
    task = torch.randint(TASKS, case.shape[:1], device=device) if case.each else TASK
    weight, bias = torch.rand(C, device=device) + 0.5, torch.randn(C, device=device)
    return Problem(x, mapping, task, dy, weight.to(case.dtype), bias.to(case.dtype))


def over(p: Problem) -> Tensor:
    """The mask as [B or 1, C, 1...], gathered."""
    rows = p.mapping[p.task].to(p.x.dtype)
    return rows.reshape(-1, p.x.shape[1], *[1] * (p.x.dim() - 2))


def upstream(x: Tensor, p: Problem) -> Tensor:
    """The routing layer's sequence of operators: ids as floats, a row for each sample, ``.data`` written."""
    ids = (torch.ones(len(x)) * (p.task.cpu() if isinstance(p.task, Tensor) else p.task)).to(torch.int64).to(x.device)
    x.data.mul_(p.mapping[ids][(...,) + (None,) * (x.dim() - 2)])
    return x


def _norm(x: Tensor, p: Problem) -> Tensor:
    return F.batch_norm(x, None, None, p.weight, p.bias, True, 0.1, EPS)


@cache
def ways(kind: str) -> dict[str, Callable[[Tensor, Problem], Tensor]]:
    """The rivals: what is not in place gets what the layer before it has just made."""

    def product(x: Tensor, p: Problem) -> Tensor:
        return (x * over(p)).relu()

    def normed(x: Tensor, p: Problem) -> Tensor:
        return (_norm(x, p) * over(p)).relu()

    if kind == "mask":
        return {"upstream": upstream, "x *= mask": lambda x, p: x.mul_(over(p))}
    if kind == "relu":
        return {
            "upstream, relu": lambda x, p: upstream(x * 1.0, p).relu(),
            "x * mask, relu": product,
            "torch.compile": torch.compile(product, dynamic=False, options=harness.ANY_THREADS),
        }
    return {
        "upstream": lambda x, p: upstream(_norm(x, p), p).relu(),
        "BatchNorm, x * mask, relu": normed,
        "torch.compile": torch.compile(normed, dynamic=False, options=harness.ANY_THREADS),
    }


def unmasked(x: Tensor, p: Problem) -> Tensor:
    """Another function, and so no rival: the floor of what masks after a BatchNorm, unless it saves work."""
    return _norm(x, p).relu()


def ours(kind: str, backend: str) -> Callable[[Tensor, Problem], Tensor]:
    def call(x: Tensor, p: Problem) -> Tensor:
        with harness.on(backend):
            if kind == "norm":
                return functional.batch_norm_mask_relu(
                    x, p.mapping, p.task, None, None, p.weight, p.bias, True, 0.1, EPS
                )  # fmt: skip
            return functional.task_mask(x, p.mapping, p.task, relu=kind == "relu", inplace=kind == "mask")

    return call


def contestant(case: Case, p: Problem, name: str, fn: Callable[[Tensor, Problem], Tensor], device: str) -> Step:
    """In place, x of one's own; once masked it stays so, and takes as long."""
    x = p.x.clone(memory_format=torch.preserve_format)
    leaves = [x] if case.kind == "relu" else [x, *(t.clone() for t in (p.weight, p.bias))]
    mine = p._replace(x=x, **({"weight": leaves[1], "bias": leaves[2]} if len(leaves) > 1 else {}))
    if case.kind != "mask":
        for leaf in leaves:
            leaf.requires_grad_()

    def run() -> Tensor:
        y = fn(x, mine)
        if case.kind != "mask":
            y.backward(p.dy)
        return y.detach()

    def drop() -> None:
        for leaf in leaves:
            leaf.grad = None

    def check() -> Results:
        drop()
        y = run()
        return {"y": y} | {f"d{k}": t.grad for k, t in enumerate(leaves) if t.grad is not None}

    return Step(name, check, run, drop, device)


# ---------------------------------------------------------------------------------------------- the truth


def _plain(case: Case, p: Problem, dtype: torch.dtype) -> Results:
    x, weight, bias = (t.to(dtype).requires_grad_(case.kind != "mask") for t in (p.x, p.weight, p.bias))
    if case.kind != "norm":
        y, leaves = reference.task_mask(x, p.mapping, p.task, case.kind == "relu"), [x]
    else:
        leaves = [x, weight, bias]
        y = batch_norm_mask_relu_reference.batch_norm_mask_relu(
            x, p.mapping, p.task, None, None, weight, bias, True, 0.1, EPS
        )
    if case.kind != "mask":
        y.backward(p.dy.to(dtype))
    return {"y": y.detach()} | {f"d{k}": t.grad for k, t in enumerate(leaves) if t.grad is not None}


#: Numbers from which results are compared by norm, and of how many samples one then stands for all.
MANY, OF = 1 << 22, 16


@lru_cache(maxsize=1)
def truth(case: Case, device: str) -> harness.Gate:
    p = problem(case, device)
    if p.x.numel() < MANY or len(p.x) <= OF:
        return Truth(lambda: _plain(case, p, torch.float64), case.dtype)
    few = case._replace(shape=(len(p.x) // OF, *case.shape[1:]))
    fewer = problem.__wrapped__(few, device)
    known = Truth(lambda: _plain(few, fewer, torch.float64), case.dtype)
    found = contestant(few, fewer, "fastroute", ours(case.kind, "auto"), device).check()
    with harness.threads(2):
        return harness.ByNorm(known, found, _plain(case, p, torch.float64), OF)


# ---------------------------------------------------------------------------------------------- the rows


def moved(case: Case, p: Problem) -> float:
    """Bytes, half of the channels being dead: each number read or written once in each pass that must."""
    size = p.x.nbytes
    return size * {"mask": 0.5, "relu": 1.5 + 2.0, "norm": 2.0 + 2.0 + 1.0}[case.kind]


@pytest.fixture
def settings(row: Row, options: harness.Options) -> Iterator[Case]:
    """The row's threads, and its sizes in these options."""
    with harness.threads(row.threads, options):
        yield row.case._replace(shape=(4, *row.case.shape[1:])) if options.quick else row.case


def test_task_mask(benchmark: Any, row: Row, options: harness.Options, settings: Case) -> None:
    case, device = settings, options.device
    p, checked = problem(case, device), truth(case, device)
    subject = contestant(case, p, "fastroute", ours(case.kind, "auto"), device)
    rivals = [contestant(case, p, name, fn, device) for name, fn in ways(case.kind).items()]
    if not options.gpu:
        rivals.append(contestant(case, p, "fastroute, reference", ours(case.kind, "reference"), device))
    floor = [contestant(case, p, "BatchNorm, relu, no mask", unmasked, device)] if case.kind == "norm" else []
    what = "forward" if case.kind == "mask" else "training"
    info: dict[str, Any] = {"case": str(case), "pass": what, "threads": row.threads, "targets": row.targets}
    info |= {"GFLOP": 0.0, "GB": moved(case, p) / 1e9}
    info["backend"] = taken("task_mask", torch.device(device).type, case.dtype)
    benchmark.extra_info.update(info)
    harness.race(benchmark, subject, rivals, floor, checked, options=options, seconds=2, most=100)
    if options.gpu:
        harness.add_roofline(benchmark.extra_info, device, case.dtype, False, options.quick)
    harness.fail_if_wrong(benchmark, str(row))
