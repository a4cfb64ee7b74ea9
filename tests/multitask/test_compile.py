"""One graph for all batch sizes, whatever forward returns; torch.export; two processes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from fastroute.compat import torchmtl
from fastroute.multitask import MTLModel
from tests.helpers import seeds
from tests.helpers.multitask import README_TASKS, readme, select
from tests.helpers.opcheck import assert_same
from tests.helpers.subprocesses import check_python


def model_of_readme(cls: Any = MTLModel, **options: Any) -> Any:
    seeds.manual_seed(0)
    return cls(readme(), README_TASKS, **options).double()


def batch(B: int) -> Tensor:
    return torch.randn(B, 16, generator=seeds.generator(B), dtype=torch.float64)


def compiled(model: nn.Module, backend: str = "aot_eager", **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter, **options), counter


def compare(run: Any, model: Any, x: Tensor) -> None:
    found, expected = run(x), model(x)
    for a, b in zip(found[0], expected[0], strict=True):
        assert_same(a.detach(), b.detach())
    assert found[1] == expected[1] and all(f is g for f, g in zip(found[1], expected[1], strict=True))
    assert found[2][:2] == [1.0, 1.0] and found[2][2] is model.Task3_loss


@pytest.mark.parametrize("cls", [MTLModel, torchmtl.MTLModel], ids=["fastroute", "compat"])
def test_any_batch_size(cls: Any) -> None:
    """Losses, numbers and the learned Parameter come out of the graph as they are, the same objects."""
    model = model_of_readme(cls)
    run, _ = compiled(model, dynamic=True)
    for B in (4, 7, 9):
        compare(run, model, batch(B))
    assert counters["stats"]["unique_graphs"] == 1


def test_any_batch_size_of_the_outputs() -> None:
    model = model_of_readme().outputs_only()
    run, counter = compiled(model, dynamic=True)
    for B in (4, 7, 9):
        for a, b in zip(run(batch(B)), model(batch(B)), strict=True):
            assert_same(a.detach(), b.detach())
    assert counter.frame_count == 1


@pytest.mark.parametrize("options", [{}, {"keep_outputs": True}, {"order": "bfs", "run_all": True}])
def test_gradients(options: dict[str, Any]) -> None:
    model = model_of_readme(**options)
    run, counter = compiled(model)
    found = []
    for f in (run, model):
        y_hat, losses, weights = f(batch(5))
        terms = [w * loss(y, torch.ones_like(y)) for y, loss, w in zip(y_hat, losses, weights, strict=True)]
        total = torch.cat([term.reshape(1) for term in terms]).sum()
        found.append(torch.autograd.grad(total, list(model.parameters())))
        if options.get("keep_outputs"):
            assert list(model.outputs) == ["root", *model.layer_names]
    for a, b in zip(*found, strict=True):
        assert_same(a, b)
    assert counter.frame_count == 1


def test_inductor() -> None:
    model = model_of_readme()
    run, _ = compiled(model, "inductor")
    with torch.no_grad():
        compare(run, model, batch(5))


def test_a_training_step_with_the_loss_in_the_graph() -> None:
    model = model_of_readme()

    def step(x: Tensor) -> Tensor:
        terms = [w * f(y, torch.ones_like(y)) for y, f, w in zip(*model(x), strict=True)]
        return sum(t.sum() for t in terms)  # type: ignore[return-value]

    torch._dynamo.reset()
    assert_same(torch.compile(step, fullgraph=True, backend="aot_eager")(batch(5)).detach(), step(batch(5)).detach())


def test_what_changes_later_is_seen() -> None:
    model = model_of_readme()
    run, _ = compiled(model, "eager")
    compare(run, model, batch(5))
    model.loss_weights["Task2"] = 0.5
    assert run(batch(5))[2][1] == 0.5
    model.output_tasks = ["Task2"]
    assert len(run(batch(5))[0]) == 1
    with torch.no_grad():
        model.Task2[0].weight.zero_()
    assert_same(run(batch(5))[0][0].detach(), model(batch(5))[0][0].detach())


def test_lists_and_dicts_as_input() -> None:
    model = MTLModel(select(), ["t", "cat_ba", "raw"]).double()
    run, counter = compiled(model)
    x = [torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)]
    found, expected = run(x)[0], model(x)[0]
    assert_same(found[0].detach(), expected[0].detach())
    assert found[2][0] is x[0] and counter.frame_count == 1


def test_export() -> None:
    """The outputs alone, for any batch size, saved and loaded."""
    model = model_of_readme().outputs_only()
    dynamic = {"input": {0: torch.export.Dim("B")}}
    program = torch.export.export(model, (batch(4),), dynamic_shapes=dynamic)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    for B in (2, 4, 7):
        for a, b in zip(loaded(batch(B)), model(batch(B)), strict=True):
            assert_same(a.detach(), b.detach())


RANKS = """
import os, tempfile
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastroute.multitask import MTLModel
from tests.helpers import seeds
from tests.helpers.multitask import README_TASKS, readme

file = tempfile.mktemp()
seeds.manual_seed(0)
layers = readme()
layers[3]["loss"] = nn.BCEWithLogitsLoss(pos_weight=torch.ones(1))  # a buffer, which is broadcast
models = [MTLModel(layers, README_TASKS).double(), MTLModel(readme(), ["Task1", "Task3"]).double()]
for name in models[1].unused:
    getattr(models[1], name).requires_grad_(False)
child = os.fork()
rank = 0 if child else 1
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
x, y = torch.randn(2, 4, 16).double(), torch.rand(2, 3, 4, 1).double()

def total(f, rank):
    return sum((w * loss(a, b)).sum() for a, loss, w, b in zip(*f(x[rank]), y[rank]))

for model in models:
    ddp = DistributedDataParallel(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.01)
    for step in range(3):
        optimizer.zero_grad()
        alone = [torch.autograd.grad(total(model, r), parameters) for r in (0, 1)]
        total(ddp, rank).backward()
        for p, a, b in zip(parameters, *alone):
            torch.testing.assert_close(p.grad, (a + b) / 2)
        optimizer.step()
    for p in parameters:
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach())
        assert torch.equal(*both)
model = models[0]  # a target of None on one rank
ddp, parameters = DistributedDataParallel(model), list(model.parameters())
targets = [dict(zip(README_TASKS, y[r])) for r in (0, 1)]
targets[1]["Task2"] = None
del targets[0]["Task3"]
for step in range(2):
    def loss(f, r):
        return model.loss(f(x[r]), targets[r])[0]
    alone = [torch.autograd.grad(loss(model, r), parameters, materialize_grads=True) for r in (0, 1)]
    model.zero_grad()
    loss(ddp, rank).backward()
    for p, a, b in zip(parameters, *alone):
        torch.testing.assert_close(p.grad, (a + b) / 2)
del ddp  # before its group
dist.destroy_process_group()
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("both done")
else:
    os._exit(0)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.long
def test_two_processes() -> None:
    """DistributedDataParallel: gradients are averages, the learned weight's too."""
    assert "both done" in check_python(RANKS, timeout=120)


@pytest.mark.long
def test_any_batch_size_of_the_losses() -> None:
    """Which tasks are alike is compared, not looked up: a size that is hashed is the graph's for ever."""
    seeds.manual_seed(0)
    widths = {"a": 2, "b": 3, "c": 2}
    heads = {t: nn.Linear(16, n).double() for t, n in widths.items()}
    tasks = [{"name": t, "layers": heads[t], "loss": nn.MSELoss()} for t in widths]
    model = MTLModel(tasks, list(widths))  # type: ignore[arg-type]

    def step(x: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        _, losses = model.loss(model(x), y)
        return losses

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for B in (4, 7):
        x = batch(B)
        y = {t: x[:, :n] for t, n in widths.items()}
        found = run(x, y)
        for t in widths:
            assert_same(found[t].detach(), (heads[t](x) - y[t]).square().mean().detach())
    assert counter.frame_count == 1
