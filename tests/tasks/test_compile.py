"""No graph depends on the task: twenty of them, one compilation. And torch.export, and two processes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastroute
from fastroute.compat.taskrouting import routed_vgg
from fastroute.tasks import set_task
from tests.helpers import seeds
from tests.helpers.opcheck import assert_same
from tests.helpers.subprocesses import check_python
from tests.helpers.tasks import T, images, masked, router, small_vgg, tasks_of

MANY = 20


def compiled(model: nn.Module, backend: str = "aot_eager", **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter, **options), counter


@pytest.mark.parametrize(("inplace", "backend"), [(False, "aot_eager"), (True, "aot_eager"), (True, "inductor")])
def test_a_router(inplace: bool, backend: str) -> None:
    """All forward passes, then all backward passes, which still know their tasks."""
    layer = router(tasks=MANY, inplace=inplace)
    run, counter = compiled(layer, backend)
    x = torch.randn(3, 8, 4, requires_grad=True)
    ys = []
    for task in range(MANY):
        layer.set_active_task(task)
        ys.append(run(x * 1))
    for task, y in enumerate(ys):
        assert torch.equal(y, masked(x, layer.get_unit_mapping(), task))
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx, masked(torch.ones_like(x), layer.get_unit_mapping(), task))
    assert counter.frame_count == 1
    for seed in range(4):  # another graph: a task for each sample
        set_task(layer, tasks_of(3, MANY, seed))
        assert torch.equal(run(x * 1), masked(x, layer.get_unit_mapping(), layer.active_task))
    assert counter.frame_count == 2


def test_tasks_as_arguments() -> None:
    layer, x = router(tasks=MANY), torch.randn(3, 8, 4)
    run, counter = compiled(layer)
    for task in range(MANY):
        assert torch.equal(run(x, torch.tensor(task)), layer(x, task))
    assert counter.frame_count == 1
    for seed in range(4):
        tasks = tasks_of(3, MANY, seed)
        assert torch.equal(run(x, tasks), layer(x, tasks))
    assert counter.frame_count == 2


@pytest.mark.parametrize("batch_norm", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_network(batch_norm: bool) -> None:
    """Logits and gradients are the eager ones; heads that are not used have zeros."""
    model, x = small_vgg(batch_norm, tasks=MANY, unused_grad="zeros").double(), images().double()
    run, counter = compiled(model)
    parameters = list(model.parameters())
    for task in range(MANY):
        set_task(model, task)
        for f in (run, model) if task < 3 else (run,):
            y = f(x)
            grads = torch.autograd.grad(y.square().sum(), parameters)
            if f is run:
                found = [y, *grads]
            else:
                for got, expected in zip(found, [y, *grads], strict=True):
                    assert_same(got.detach(), expected.detach())
    assert counter.frame_count == 1


def test_upstreams_network() -> None:
    model, x = small_vgg(family=routed_vgg).double(), images().double()
    run, counter = compiled(model)
    for task in range(T):
        set_task(model, task)
        assert_same(run(x).detach(), model(x).detach())
    assert counter.frame_count == 1


@pytest.mark.long
def test_any_batch_size() -> None:
    model = small_vgg(tasks=MANY).double().eval()
    run, counter = compiled(model, dynamic=True)
    for B in (4, 7, 9):
        x, tasks = images(B).double(), tasks_of(B, MANY)
        assert_same(run(x, tasks).detach(), model(x, tasks).detach())
    assert counter.frame_count == 1


class Told(nn.Module):
    """A model whose caller tells the task."""

    def __init__(self) -> None:
        super().__init__()
        self.router = router()

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return self.router(x, task).relu()  # type: ignore[no-any-return]


@pytest.mark.long
def test_export() -> None:
    """A program with the task as an input, saved and loaded; or with the active task of the moment in it."""
    x8, x3 = torch.randn(4, 8, 3, dtype=torch.float64), images().double()
    for model, x in ((router(), x8), (Told(), x8), (small_vgg().double().eval(), x3)):
        B = x.shape[0]
        with torch.no_grad():
            program = torch.export.export(model, (x, tasks_of(B)))
            stored = io.BytesIO()
            torch.export.save(program, stored)
            stored.seek(0)
            loaded = torch.export.load(stored).module()
            for seed in range(3):
                assert_same(loaded(x, tasks_of(B, seed=seed)), model(x, tasks_of(B, seed=seed)))
            if not isinstance(model, Told):
                set_task(model, 3)
                assert_same(torch.export.export(model, (x,)).module()(x), model(x, 3))


def test_vmap_over_tasks_of_a_network() -> None:
    model, x = small_vgg().double().requires_grad_(False), images().double()
    y = torch.vmap(lambda task: model(x, task))(torch.arange(T))
    for task in range(T):
        assert_same(y[task], model(x, task))


RANKS = """
import os, tempfile
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastroute.tasks import live, set_task
from tests.helpers.tasks import images, router, small_vgg, tasks_of

file = tempfile.mktemp()
models = [
    nn.Sequential(nn.Conv2d(3, 8, 3), router(), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 14 * 14, 2)).double(),
    small_vgg(True, unused_grad="zeros").double(),
]
alike = [small_vgg(unused_grad="zeros").double() for _ in range(2)]  # masked, and live channels only
alike[1].load_state_dict(alike[0].state_dict())  # the masks, too
alike[1] = live(alike[1])
child = os.fork()
rank = 0 if child else 1
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
x = [images(4, seed=s).double() for s in (0, 1)]
tasks = (1, 3)
for model in models:
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), 0.01)
    masks = [b.clone() for k, b in model.named_buffers() if "mapping" in k]
    for step in range(3):
        set_task(ddp, tasks[rank])  # each rank is at a task of its own
        optimizer.zero_grad()
        if step == 0:
            alone = [torch.autograd.grad(model_out.square().sum(), list(model.parameters()), allow_unused=True)
                     for s in (0, 1) for model_out in [set_task(model, tasks[s]) or model(x[s])]]
            set_task(ddp, tasks[rank])
        ddp(x[rank]).square().sum().backward()
        assert all(m.active_task == tasks[rank] for m in model.modules() if hasattr(m, "active_task"))
        if step == 0:
            for p, *grads in zip(model.parameters(), *alone):
                torch.testing.assert_close(p.grad, sum(g for g in grads) / 2)
        optimizer.step()
    for p in model.parameters():
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach())
        assert torch.equal(*both)
    assert all(torch.equal(a, b) for a, b in zip(masks, (b for k, b in model.named_buffers() if "mapping" in k)))

ddps = [DistributedDataParallel(model) for model in alike]
optimizers = [torch.optim.SGD(ddp.parameters(), 0.01, momentum=0.9, weight_decay=0.1) for ddp in ddps]
for task in ((1, 3)[rank], (4, 0)[rank], tasks_of(4, seed=rank)):  # each rank at its own; at last a mixed batch
    for ddp, optimizer in zip(ddps, optimizers):
        set_task(ddp, task)
        optimizer.zero_grad()
        ddp(x[rank]).square().sum().backward()
        optimizer.step()
for p, q in zip(alike[0].parameters(), alike[1].parameters(), strict=True):
    torch.testing.assert_close(p, q)
    both = [torch.empty_like(q) for _ in range(2)]
    dist.all_gather(both, q.detach())
    assert torch.equal(*both)
del ddp, ddps  # before their group
dist.destroy_process_group()
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("both done")
else:
    os._exit(0)
"""


@pytest.mark.long
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes() -> None:
    """DistributedDataParallel, each process at another task: gradients are averages, no parameter is unused.

    Live channels train as masks do.
    """
    assert "both done" in check_python(RANKS, timeout=120)


@pytest.mark.parametrize("task", [2, torch.tensor(2), torch.tensor([0, 1, 2, 1])], ids=["int", "0-d", "[B]"])
def test_a_compiled_part_works_on_the_task_of_the_call(task: Any) -> None:
    """Its task is not handed to it: what the graph reads is the task of the call, and afterwards the active one."""
    masks = seeds.generator(0)
    part = nn.Sequential(nn.Linear(6, 6), fastroute.TaskRouter(6, 3, 0.5, generator=masks))
    net = fastroute.live(nn.Sequential(part, nn.ReLU()))
    x, mapping = torch.randn(4, 6), part[1]._unit_mapping
    torch._dynamo.reset()
    part.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(net(x, task), (part[0](x) * mapping[task]).relu())
        torch.testing.assert_close(net(x), (part[0](x) * mapping[0]).relu())
