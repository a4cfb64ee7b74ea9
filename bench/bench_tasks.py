"""Task routing: a routed VGG-11 for one task and for twenty in a batch, and changing the task.

Axes: B images of S x S, T = 20 tasks, half of every layer's channels off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench import harness
from bench.harness import Product, Results, Step, Truth
from fastroute.tasks import TaskRouter, live, set_task, vgg11, vgg11_bn

TASKS = 20


class Case(NamedTuple):
    """The network and a batch: all images of one task, or as many of each."""

    net: str
    B: int
    S: int
    mixed: bool = False
    training: bool = True

    def __str__(self) -> str:
        tasks = f"{TASKS} tasks" if self.mixed else "one task"
        return f"{self.net}, {self.B} images {self.S}x{self.S}, {tasks}"


@dataclass(frozen=True)
class Row:
    """A case, and what is asked of it: see ``report``."""

    case: Case
    threads: int = 1
    targets: dict[str, float] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        c = self.case
        what = "training" if c.training else "forward"
        return f"{c.net}-B{c.B}-S{c.S}-{'mixed' if c.mixed else 'one'}-{what}-{self.threads}thread"


def rows(options: harness.Options) -> list[Row]:
    """conftest makes a test of each; rows of one network stand together."""
    found = []
    asked = [
        (Case("vgg11", 16, 64), {"dense masked": 2.9}),
        (Case("vgg11", 16, 64, training=False), {"dense masked": 2.8}),
        (Case("vgg11_bn", 16, 64), {}),
        (Case("vgg11", 60, 32, mixed=True), {"loop over tasks": 2.0}),
        (Case("vgg11", 60, 64, mixed=True), {"loop over tasks": 3.3}),
    ]
    if options.gpu:
        asked = [(Case("vgg11", 64, 224), {"dense masked": 2.5}), (Case("vgg11", 64, 224, training=False), {})]
    for case, targets in asked:
        found += [Row(case, targets=targets)] + [Row(case, threads=2)] * (not options.gpu and not case.mixed)
    return found


# ---------------------------------------------------------------------------------------------- the contestants


class Upstream(TaskRouter):
    """Its operators: a row of the mask per sample, multiplied into ``x.data``; right where a ReLU follows."""

    def forward(self, x: Tensor, task: Any = None) -> Tensor:
        rows = (torch.ones(len(x)) * self.active_task).long().to(x.device)
        x.data.mul_(self._unit_mapping.index_select(0, rows)[:, :, None, None])
        return x


class Times(TaskRouter):
    """x * mask."""

    def forward(self, x: Tensor, task: Any = None) -> Tensor:
        return x * self._unit_mapping[self._task(task)].view(-1, x.shape[1], 1, 1)


class Problem(NamedTuple):
    """A network and what it gets; models of the other ways share its layers."""

    net: nn.Module
    x: Tensor
    task: Any
    dy: Tensor


@lru_cache(maxsize=1)
def problem(case: Case, device: str) -> Problem:
    torch.manual_seed(0)
    make = vgg11_bn if case.net == "vgg11_bn" else vgg11
    made = make(task_count=TASKS, sigma=0.5, generator=torch.Generator().manual_seed(0), unused_grad="zeros")
    net = made.to(device).train(case.training)
    task: Any = torch.arange(case.B, device=device) % TASKS if case.mixed else 3
    return Problem(
        net, torch.randn(case.B, 3, case.S, case.S, device=device), task, torch.randn(case.B, 2, device=device)
    )


def variant(net: nn.Module, router: type[TaskRouter] | None) -> nn.Module:
    """The same layers and parameters with other routers, or none."""
    memo = {id(p): p for p in net.parameters()}
    other = copy.deepcopy(net, memo)
    features: Any = other.features
    for key, module in features.named_children():
        if isinstance(module, TaskRouter):
            if router is None:
                features._modules[key] = nn.Identity()
            else:
                module.__class__ = router
    return other


def contestant(p: Problem, name: str, model: nn.Module, training: bool, device: str, loop: bool = False) -> Step:
    parameters = list(p.net.named_parameters())
    # before a BatchNorm a bias changes nothing: its gradient is exactly zero, and what is found of it is rounding alone
    normed = any(isinstance(m, nn.BatchNorm2d) for m in p.net.modules())
    idle = {f"{name}.bias" for name, m in p.net.named_modules() if normed and isinstance(m, nn.Conv2d)}
    # only a mixed batch has heads of several tasks; a head that is not in the batch gets no gradient
    parts = [(t, (p.task == t).nonzero()[:, 0]) for t in range(TASKS)] if loop else [(p.task, slice(None))]
    inputs = [(t, rows, p.x[rows], p.dy[rows]) for t, rows in parts]

    def step() -> Tensor:
        y = torch.empty_like(p.dy)
        with torch.set_grad_enabled(training):
            for task, rows, x, dy in inputs:
                set_task(model, task)
                made = model(x)
                if training:
                    made.backward(dy)
                y[rows] = made.detach()
        return y

    def drop() -> None:
        for _, parameter in parameters:
            parameter.grad = None

    def check() -> Results:
        state = {k: t.clone() for k, t in model.state_dict().items()}
        drop()
        found = {"y": step()}
        compared = [(k, q.grad) for k, q in parameters if k.startswith("features") and k not in idle]
        found |= {f"d{k}": grad.clone() for k, grad in compared if grad is not None}
        model.load_state_dict(state)
        return found

    return Step(name, check, step, drop, device)


def subject(p: Problem, case: Case, device: str) -> Step:
    return contestant(p, "fastroute", live(variant(p.net, TaskRouter)), case.training, device)


def rivals_of(p: Problem, case: Case, device: str, checked: harness.Gate) -> list[Step]:
    def made(name: str, model: nn.Module, loop: bool = False) -> Step:
        return contestant(p, name, model, case.training, device, loop)

    if case.mixed:
        return [
            made("loop over tasks", variant(p.net, Upstream), loop=True),
            made("loop, live", live(variant(p.net, TaskRouter)), loop=True),
            made("dense masked", variant(p.net, TaskRouter)),
        ]
    plain = variant(p.net, Times)
    unrouted = made("unrouted", variant(p.net, None))
    unrouted.check = lambda: checked.exact  # another function: timed for what routing costs
    found = [
        made("upstream", variant(p.net, Upstream)),
        made("dense masked", variant(p.net, TaskRouter)),
        made("x * mask, torch.compile", torch.compile(plain, options=harness.ANY_THREADS)),  # type: ignore[arg-type]
        unrouted,
    ]
    if case.net == "vgg11_bn":
        found.insert(0, made('fastroute, batch_norm="live"', live(variant(p.net, TaskRouter), batch_norm="live")))
    return found


# ---------------------------------------------------------------------------------------------- the truth


def _exact(p: Problem, case: Case) -> Results:
    net = copy.deepcopy(variant(p.net, Times)).double()
    other = Problem(net, p.x.double(), p.task, p.dy.double())
    return contestant(other, "", net, case.training, p.x.device.type).check()


#: Images and their side: of more numbers than so few images of the least side have, results are compared by norm.
FEWER, LEAST = 4, 32


@lru_cache(maxsize=1)
def truth(case: Case, device: str) -> harness.Gate:
    p, few = problem(case, device), case._replace(B=TASKS if case.mixed else FEWER, S=LEAST)
    times = case.B * case.S**2 / (few.B * few.S**2)
    if times <= 1:
        return Truth(lambda: _exact(p, case), torch.float32)
    fewer = problem.__wrapped__(few, device)
    known = Truth(lambda: _exact(fewer, few), torch.float32)
    with harness.threads(2):
        found = subject(fewer, few, device).results()
        return harness.ByNorm(known, found, _exact(p, case), times)


# ---------------------------------------------------------------------------------------------- the rows


def products(p: Problem, case: Case) -> list[Product]:
    """Of live channels, as matrices [positions, li k^2] x [li k^2, lo]; the heads are left out."""
    found, inputs, size = [], 3, case.S
    for module in p.net.features:  # type: ignore[union-attr]
        if isinstance(module, nn.MaxPool2d):
            size //= 2
        if isinstance(module, nn.Conv2d):
            rows, inner, out = case.B * size * size, 9 * inputs, module.out_channels // 2
            found.append(Product("nt", rows, inner, out))
            if case.training:
                found += [Product("tn", out, rows, inner)] + [Product("nn", rows, out, inner)] * (inputs != 3)
            inputs = out
    return found


@pytest.fixture
def settings(row: Row, options: harness.Options) -> Iterator[Case]:
    """The row's threads, and its sizes in these options."""
    with harness.threads(row.threads, options):
        yield row.case._replace(B=TASKS if row.case.mixed else 2, S=32) if options.quick else row.case


def test_tasks(benchmark: Any, row: Row, options: harness.Options, settings: Case) -> None:
    case, device = settings, options.device
    p, checked = problem(case, device), truth(case, device)
    rivals, made = rivals_of(p, case, device, checked), products(p, case)
    info: dict[str, Any] = {"case": str(case), "threads": row.threads, "targets": row.targets}
    info |= {"pass": "training" if case.training else "forward", "GFLOP": harness.flops(made) / 1e9}
    info["GB"] = sum(4 * q.numel() for q in p.net.features.parameters()) / 1e9  # type: ignore[union-attr]
    benchmark.extra_info.update(info)
    floors = harness.floors(made, torch.float32, device)
    mine = subject(p, case, device)
    harness.race(benchmark, mine, rivals, floors, checked, options=options, seconds=4, most=15)
    if options.gpu:
        harness.add_roofline(benchmark.extra_info, device, torch.float32, False, options.quick)
    harness.fail_if_wrong(benchmark, str(row))


def test_switching(benchmark: Any, options: harness.Options) -> None:
    """A thousand changes of task: a millisecond here is a microsecond each."""
    model = vgg11(task_count=TASKS)
    if options.gpu:
        model.to(options.device)

    def many(change: Callable[[int], Any]) -> Callable[[], Any]:
        return lambda: [change(n % TASKS) for n in range(1000)]

    def told(task: int) -> None:
        model.apply(lambda m: m.set_active_task(task) if hasattr(m, "active_task") else None)

    switching = Step("fastroute", lambda: {}, many(lambda n: set_task(model, n)))
    rival = Step("apply", lambda: {}, many(told), every=3)
    info = {"case": "1000 changes of vgg11's task", "pass": "switch", "threads": 1, "targets": {"max_ms": 20.0}}
    benchmark.extra_info.update(info | {"GFLOP": 0.0, "GB": 0.0})
    nothing = Truth(lambda: {}, torch.float32)
    nothing.excess = lambda found, rival=False: ("", 0.0)  # type: ignore[method-assign]
    harness.race(benchmark, switching, [rival], [], nothing, options=options, seconds=2)
