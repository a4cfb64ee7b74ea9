"""Masks and weights that are written to without a version: by data, NumPy, collectives, other processes.

PyTorch's ``_unsafe_preserve_version_counter`` stands for whoever changes no version, as c10d's collectives do.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastroute.tasks import RoutedConv2d, RoutedLinear, TaskRouter, live, on_task, set_task
from fastroute.tasks.active_task import Task
from tests.helpers import seeds

T = 4
F64 = torch.float64


def router(C: int, seed: int = 0) -> TaskRouter:
    return TaskRouter(C, T, 0.5, generator=seeds.generator(seed), dtype=F64)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=seeds.generator(7))


def layers() -> nn.Sequential:
    seeds.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), router(16), nn.ReLU(), nn.Linear(16, 12), router(12, 1), nn.ReLU(), nn.Linear(12, 2)
    ).double()


def by_data(t: Tensor, new: Tensor) -> None:
    t.data.copy_(new)


def by_numpy(t: Tensor, new: Tensor) -> None:
    t.detach().numpy()[:] = new.numpy()


def unseen(t: Tensor, new: Tensor) -> None:
    with torch.no_grad(), _unsafe_preserve_version_counter(t):
        t.copy_(new)


def by_storage(t: Tensor, new: Tensor) -> None:
    t.untyped_storage().copy_(new.contiguous().untyped_storage())


def other_memory(t: Tensor, new: Tensor) -> None:
    t.data = new


WRITES = {w.__name__: w for w in (by_data, by_numpy, unseen, by_storage, other_memory)}


# --------------------------------------------------------------------------------------------------------------- masks


def through(kind: str) -> tuple[Callable[[Task], Tensor], Callable[[Task], Tensor], list[TaskRouter]]:
    """(what may keep channels, what masks at every call, their routers)."""
    if kind == "live":
        plain, x = layers(), rand(5, 6)
        slim = live(plain)

        def masked(task: Task) -> Tensor:
            with on_task(plain, task):
                return plain(x)  # type: ignore[no-any-return]

        return partial(slim, x), masked, [m for m in plain if isinstance(m, TaskRouter)]
    inp, out = router(6), router(8, 1)
    routed: Any = (RoutedLinear if kind == "linear" else RoutedConv2d)(
        6, 8, *(() if kind == "linear" else (3,)), input_router=inp, output_router=out
    )
    routed, x = routed.double(), rand(5, 6) if kind == "linear" else rand(5, 6, 4, 4)
    function = nn.functional.linear if kind == "linear" else nn.functional.conv2d
    return partial(routed, x), lambda t: out(function(inp(x, t), routed.weight, routed.bias), t), [inp, out]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ["live", "linear", "convolution"])
@pytest.mark.parametrize("task", [1, torch.tensor(1), torch.arange(5) % T], ids=["int", "0-d", "[B]"])
def test_masks(kind: str, write: str, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """All, those of the task at hand, to as many channels and to fewer: with gradients, and without."""
    monkeypatch.setattr("fastroute.tasks.live_products.grouped_is_cheaper", lambda *a, **k: True)
    slim, masked, routers = through(kind)
    for change in (lambda m: 1 - m, lambda m: m * (torch.arange(m.shape[1]) % 3 > 0), lambda m: m.flip(1)):
        slim(task)
        for r in routers:
            WRITES[write](r._unit_mapping, change(r._unit_mapping.clone()))
        torch.testing.assert_close(slim(task), masked(task))
        with torch.no_grad():
            torch.testing.assert_close(slim(task), masked(task))


@pytest.mark.parametrize("what", ["masks", "weights"])
def test_tensors_of_inference_mode(what: str) -> None:
    with torch.inference_mode():
        plain, x = layers().eval(), rand(5, 6)
        slim = live(plain)
        for _ in range(3):
            torch.testing.assert_close(slim(x, 0), plain(x))
            for t in plain.buffers() if what == "masks" else plain.parameters():
                t.copy_(1 - t)


# ------------------------------------------------------------------------------------------------------------- weights


@contextmanager
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(  # type: ignore[attr-defined]
str(tmp_path / "s"), 1), rank=0,
                                         world_size=1)  # fmt: skip
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def changed_while_kept(plain: nn.Sequential) -> None:
    slim, x = live(plain.eval()), rand(5, 6)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(slim(x, 0), plain(x))
            for p in plain.parameters():
                unseen(p, p * 0.5)
        torch.testing.assert_close(slim(x, 0), plain(x))


def test_weights_that_another_process_shares() -> None:
    changed_while_kept(layers().share_memory())


def test_weights_in_a_process_group(tmp_path: Path) -> None:
    with one_process(tmp_path):
        changed_while_kept(layers())


# ---------------------------------------------------------------------------------------------------------- who is told

NETS: dict[str, Callable[[], nn.Module]] = {
    "masked": layers, "live": lambda: live(layers()), "a layer": lambda: nn.ModuleList([layers()])[0],
}  # fmt: skip


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    return NETS[request.param]().eval()


def each(net: nn.Module, x: Tensor) -> list[Tensor]:
    made = []
    for t in range(T):
        with on_task(net, t):
            made.append(net(x).detach())
    return made


def active(net: nn.Module) -> list[Any]:
    return [m.active_task for m in net.modules() if isinstance(m, TaskRouter)]


def test_interleaved_in_asyncio(net: nn.Module) -> None:
    x = rand(5, 6)
    expected, found = each(net, x), []

    async def serve(t: int, before: int, inside: int) -> None:
        for _ in range(before):
            await asyncio.sleep(0)
        with on_task(net, t):
            for _ in range(inside):
                await asyncio.sleep(0)
            found.append(torch.equal(net(x), expected[t]) and active(net) == [t, t])
        found.append(torch.equal(net(x), expected[0]))

    async def all_of_them() -> None:
        await asyncio.gather(*(serve(t, t, 5 - t if t % 2 else 2 * t) for t in range(T)))

    asyncio.run(all_of_them())
    assert found == [True] * 2 * T and active(net) == [0, 0]


def test_interleaved_in_generators_and_threads(net: nn.Module) -> None:
    """Left in the order in which they were entered; another thread sees nothing of it."""
    x = rand(5, 6)
    expected, found = each(net, x), []

    def steps(t: int) -> Iterator[bool]:
        with on_task(net, t):
            yield torch.equal(net(x), expected[t])

    first, second = steps(1), steps(2)
    assert next(first) and next(second)
    thread = threading.Thread(target=lambda: found.append(torch.equal(net(x), expected[0])))
    thread.start()
    thread.join()
    assert next(first, None) is None and torch.equal(net(x), expected[2])
    assert next(second, None) is None and torch.equal(net(x), expected[0])
    assert found == [True] and active(net) == [0, 0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_whose_backward_has_a_thread_of_its_own(net: nn.Module, use_reentrant: bool) -> None:
    """As that of a GPU has: it is the block's task, or an error."""
    x, raised = rand(5, 6).requires_grad_(), []

    def backward(y: Tensor) -> None:
        try:
            y.sum().backward()
        except RuntimeError as error:
            raised.append(str(error))

    for around in (2, 1):
        with on_task(net, 2):
            (expected,) = torch.autograd.grad(net(x).sum(), x)
            y, x.grad = checkpoint(net, x, use_reentrant=use_reentrant), None
        with on_task(net, around):
            thread = threading.Thread(target=backward, args=(y,))
            thread.start()
            thread.join()
        assert len(raised) == (around != 2)
        assert raised or (x.grad is not None and torch.equal(x.grad, expected))
    assert "task" in raised[0] and active(net) == [0, 0]


def test_what_is_set_and_copied_within(net: nn.Module) -> None:
    x = rand(5, 6)
    expected = each(net, x)
    with on_task(net, 1):
        with on_task(net, torch.tensor(2)):
            assert torch.equal(net(x), expected[2])
            set_task(net, 3)
            assert torch.equal(net(x), expected[3])
            copied = copy.deepcopy(net)
        assert torch.equal(net(x), expected[1])
    assert torch.equal(net(x), expected[0]) and torch.equal(copied(x), expected[3])


@pytest.mark.parametrize("own", [False, True], ids=["around", "within"])
@pytest.mark.long_after(2)
def test_compiled_models_see_it(net: nn.Module, own: bool) -> None:
    torch._dynamo.reset()
    x, expected = rand(5, 6), each(net, rand(5, 6))

    def call(x: Tensor, t: Tensor) -> Tensor:
        with on_task(net, t):
            return net(x)  # type: ignore[no-any-return]

    run: Any = torch.compile(call if own else net, fullgraph=True, backend="aot_eager")
    set_task(net, 3)
    for t in (1, 2, 1):
        if own:
            torch.testing.assert_close(run(x, torch.tensor(t)), expected[t])
        with on_task(net, t):
            made = run(x, torch.tensor(0)) if own else run(x)
            torch.testing.assert_close(made, expected[0 if own else t])
            assert active(net) == [t, t]
        torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), expected[3])


@pytest.mark.parametrize("task", [1, torch.tensor(2), torch.arange(5) % T], ids=["int", "0-d", "[B]"])
def test_a_checkpoint_that_saves_every_operator(net: nn.Module, task: Task) -> None:
    """A check of ours is no operator that it could miss, nor does one write to what was saved."""
    x = rand(5, 6).requires_grad_()
    policy = partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE)
    set_task(net, task)
    grads = [
        torch.autograd.grad(f(x).square().sum(), [x, *net.parameters()])
        for f in (net, partial(checkpoint, net, use_reentrant=False, context_fn=policy), net)
    ]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))
