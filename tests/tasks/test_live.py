"""Live channels equal masked ones: outputs, gradients, training."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastroute.tasks import (
    LiveSequential,
    RoutedConv2d,
    RoutedLinear,
    TaskRouter,
    live,
    on_task,
    route,
    set_task,
    vgg11_bn,
)
from fastroute.tasks import (
    live_products as products,
)
from tests.helpers import seeds
from tests.helpers.budget import assert_within_budget
from tests.tasks.nets import T, assert_same, conv_net, generator, images, passes, train, twin

MIXED = torch.tensor([1, 0, 3, 1, 1, 4])


@pytest.fixture
def always_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "grouped_is_cheaper", lambda *_, **__: True)


# ---------------------------------------------------------------------------------------------- one pass


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("task", [0, 4, torch.tensor(3), MIXED], ids=["first", "last", "0-d", "mixed"])
def test_live_equals_masked(task: int | Tensor, batch_norm: bool, training: bool) -> None:
    """Running statistics too, those of dead channels among them."""
    masked = conv_net(batch_norm).train(training)
    slim = twin(masked).train(training)
    assert isinstance(slim, LiveSequential)
    assert_same(passes(slim, images(), task), passes(masked, images(), task))


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_mixed_batch_by_groups(batch_norm: bool) -> None:
    masked = conv_net(batch_norm).eval()
    slim = twin(masked)
    assert_same(passes(slim, images(), MIXED), passes(masked, images(), MIXED))


@pytest.mark.usefixtures("always_grouped")
def test_grouped_equals_one_task_at_a_time() -> None:
    slim = twin(conv_net(True).eval())
    alone = torch.cat([slim(images()[i : i + 1], int(t)) for i, t in enumerate(MIXED)])
    torch.testing.assert_close(slim(images(), MIXED), alone, rtol=1e-13, atol=1e-14)


def test_less_is_computed() -> None:
    """The convolutions see live channels only."""
    slim = twin(conv_net())
    with torch.profiler.profile(record_shapes=True) as profile:
        slim(images(), 1)
    shapes = [e.input_shapes[1][:2] for e in profile.events() if e.name == "aten::conv2d"]
    assert shapes == [[4, 3], [6, 4], [5, 6]]


def test_batch_norm_live_leaves_dead_statistics() -> None:
    masked = conv_net(True)
    exact, cheap = twin(masked), twin(masked, batch_norm="live")
    router = next(m for m in masked.modules() if isinstance(m, TaskRouter))
    kept = router.get_unit_mapping()[2] != 0
    a, b = passes(exact, images(), 2), passes(cheap, images(), 2)
    for key in a:
        if not key.startswith("0.1.running"):
            continue
        assert torch.equal(a[key][kept], b[key][kept])
        assert torch.equal(b[key][~kept], passes(masked.eval(), images(), 2)[key][~kept])
        assert not torch.equal(a[key][~kept], b[key][~kept])
    assert_same({k: v for k, v in b.items() if "running" not in k}, {k: v for k, v in a.items() if "running" not in k})


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_options(affine: bool, tracks: bool, momentum: float | None) -> None:
    norm = nn.BatchNorm2d(8, affine=affine, track_running_stats=tracks, momentum=momentum)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU()).double()
    masked = route(net, T, 3, generator=generator())
    slim = twin(masked)
    for training in (True, True, False):
        masked.train(training), slim.train(training)
        assert_same(passes(slim, images(), 1), passes(masked, images(), 1))


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", [2, MIXED], ids=["one", "mixed"])
def test_budget(task: int | Tensor, dtype: torch.dtype) -> None:
    """Channels-last inside; outputs are contiguous."""
    for seed in range(2):
        masked, x = conv_net(dtype=dtype, seed=seed).eval(), images(dtype=dtype, seed=seed)
        exact, found = copy.deepcopy(masked).double(), passes(twin(masked), x, task)
        assert found["y"].is_contiguous()
        run = partial(passes, exact, x.double(), task)
        assert_within_budget(found, run, dtype, stored=dtype)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-2),
        partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-2),
    ],
    ids=["SGD", "Adam"],
)
@pytest.mark.long_after(1)
def test_twenty_steps(optimizer: partial[torch.optim.Optimizer], batch_norm: bool) -> None:
    """Task after task, so that what is dead now was live before."""
    masked = conv_net(batch_norm)
    slim, tasks = twin(masked), [3, 1, 4, 1, 0, 2, 3, 2]

    def trained(model: nn.Module) -> dict[str, Tensor]:
        return train(model, optimizer, 20, lambda n: tasks[n % 8])

    assert_within_budget(trained(slim), lambda: trained(copy.deepcopy(masked)), torch.float64)


def test_dead_weights_get_zeros_and_decay() -> None:
    slim = twin(conv_net())
    set_task(slim, 2)
    slim(images()).sum().backward()
    conv, router = slim[0][0], slim[0][1]
    dead = router.get_unit_mapping()[2] == 0
    assert conv.weight.grad is not None and not conv.weight.grad[dead].any() and conv.weight.grad[~dead].any()
    before = conv.weight.detach().clone()
    torch.optim.SGD(slim.parameters(), lr=1.0, weight_decay=0.25).step()
    assert torch.equal(conv.weight[dead], before[dead] * 0.75)


def test_gradcheck() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(12, 2)).double()
    slim = live(route(net, 3, 2, generator=generator(), where=lambda name, _: name != "4"))
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = dict(slim.named_parameters())

    def run(task: int | Tensor, x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(slim, given, (x, task))  # type: ignore[no-any-return]

    values = tuple(p.detach().clone().requires_grad_() for p in parameters.values())
    assert torch.autograd.gradcheck(partial(run, 1), (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(partial(run, 1), (x, *values), fast_mode=True)
    assert torch.autograd.gradcheck(partial(run, torch.tensor([2, 0])), (x, *values), fast_mode=True)


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("biased", [True, False])
def test_second_derivative_by_groups(biased: bool) -> None:
    """As of one sample after the other, of weights and biases too."""
    seeds.manual_seed(0)
    slim = live(nn.Sequential(
        nn.Conv2d(2, 4, 2, bias=biased), TaskRouter(4, 3, 2, generator=generator()), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 3, bias=biased), TaskRouter(3, 3, 1, generator=generator()), nn.Tanh(),
    )).double()  # fmt: skip
    x, tasks = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True), torch.tensor([2, 0, 2])
    ends, found = (x, *slim.parameters()), []
    for y in (slim(x, tasks), torch.cat([slim(each[None], int(task)) for each, task in zip(x, tasks, strict=True)])):
        first = torch.autograd.grad(y.sin().sum(), ends, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), ends)
        found.append({str(n): g.detach() for n, g in enumerate((*first, *second))})
    assert_same(*found)


# ---------------------------------------------------------------------------------------------- many models


@st.composite
def stacks(draw: st.DrawFn) -> tuple[nn.Sequential, int]:
    seeds.manual_seed(draw(st.integers(0, 99)))
    width, found = 3, []
    for _ in range(draw(st.integers(1, 4))):
        out, kernel = draw(st.integers(1, 7)), draw(st.sampled_from([1, 3]))
        found.append(
            nn.Conv2d(
                width, out, kernel, stride=draw(st.sampled_from([1, 2])), padding=kernel // 2, bias=draw(st.booleans())
            )
        )
        if draw(st.booleans()):
            found.append(nn.BatchNorm2d(out))
        found += draw(
            st.lists(
                st.sampled_from([nn.ReLU(), nn.Sigmoid(), nn.GELU(), nn.Identity(), nn.AvgPool2d(3, 1, 1)]), max_size=2
            )
        )
        width = out
    if draw(st.booleans()):
        found += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(width * 4, 3)]
    sigma = draw(st.sampled_from([0, 1, 3, 0.5, 0.9]))
    return route(nn.Sequential(*found).double(), T, sigma, generator=generator()), draw(st.integers(0, T - 1))  # type: ignore[return-value]


@given(stacks(), st.booleans(), st.booleans())
def test_any_stack(case: tuple[nn.Sequential, int], training: bool, mixed: bool) -> None:
    masked, task = case
    masked.train(training)
    slim, right = twin(masked), copy.deepcopy(masked)  # passes move running statistics
    chosen = MIXED if mixed else task
    given_cost = products.grouped_is_cheaper
    products.grouped_is_cheaper = lambda *_, **__: True
    try:
        found = passes(slim, images(), chosen)
        assert_within_budget(found, lambda: passes(copy.deepcopy(right), images(), chosen), torch.float64)
    finally:
        products.grouped_is_cheaper = given_cost


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("task", [2, MIXED], ids=["one", "mixed"])
def test_tasks_with_different_counts(task: int | Tensor) -> None:
    masked = conv_net()
    for router in masked.modules():
        if isinstance(router, TaskRouter):
            router.get_unit_mapping()[2, :-1] = 0
            router.get_unit_mapping()[1] = 1
    assert_same(passes(twin(masked), images(), task), passes(masked, images(), task))


def test_masks_may_change() -> None:
    masked = conv_net().eval()
    slim = twin(masked)
    other = conv_net(seed=7).state_dict()
    with torch.no_grad():
        slim(images(), 1)
    for model in (masked, slim):
        model.load_state_dict(other)
    with torch.no_grad():
        assert_same({"y": slim(images(), 1)}, {"y": masked_output(masked, 1)})
    for model in (masked, slim):
        next(m for m in model.modules() if isinstance(m, TaskRouter)).get_unit_mapping()[1] = 1
    with torch.no_grad():
        assert_same({"y": slim(images(), 1)}, {"y": masked_output(masked, 1)})


def test_kept_weights_follow_the_parameters() -> None:
    masked = conv_net().eval()
    slim = live(masked)
    with torch.no_grad():
        for task in (1, 2, 1):
            assert_same({"y": slim(images(), task)}, {"y": masked_output(masked, task)})
        masked[0][0].weight.mul_(3)
        assert_same({"y": slim(images(), 1)}, {"y": masked_output(masked, 1)})
        masked[0][0].weight.data.add_(1)
        slim.eval()
        assert_same({"y": slim(images(), 1)}, {"y": masked_output(masked, 1)})


def test_kept_weights_are_not_told_by_an_address() -> None:
    """What is freed leaves its address to what comes after it, as in ``net.half().float()``."""
    masked = conv_net().eval()
    slim, place = live(masked), np.zeros(masked[0][0].weight.numel())
    for value in (1.0, 2.0):
        place[:] = value
        masked[0][0].weight.data = torch.from_numpy(place).view(masked[0][0].weight.shape)
        with torch.no_grad():
            assert_same({"y": slim(images(), 1)}, {"y": masked_output(masked, 1)})
    assert len(pickle.dumps(slim)) == len(pickle.dumps(copy.deepcopy(slim)))  # copies keep nothing


def test_masks_are_not_told_by_an_address() -> None:
    masked = conv_net().eval()
    slim, router = live(masked), next(m for m in masked.modules() if isinstance(m, TaskRouter))
    masks = router._unit_mapping.clone()
    for k in range(6):
        router._unit_mapping = torch.ones_like(masks)  # frees those of the last call
        router._unit_mapping = masks.roll(k, 1)
        with torch.no_grad():
            assert_same({"y": slim(images(), 1)}, {"y": masked_output(masked, 1)})


def masked_output(model: nn.Module, task: int) -> Tensor:
    set_task(model, task)
    y: Tensor = model(images())
    return y


# ---------------------------------------------------------------------------------------------- around it


def test_keys_and_checkpoints() -> None:
    masked = conv_net(True)
    slim = twin(masked)
    assert list(slim.state_dict()) == list(masked.state_dict())
    slim.load_state_dict(masked.state_dict())
    again = copy.deepcopy(slim)
    assert_same(passes(again, images(), 1), passes(slim, images(), 1))
    assert live(masked)[0][0].weight is masked[0][0].weight  # type: ignore[index]


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("task", [1, MIXED], ids=["one", "mixed"])
def test_channels_last(task: int | Tensor) -> None:
    masked = conv_net(True).eval().to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    slim = twin(masked)
    assert_same(passes(slim, x, task), passes(masked, x, task))
    conv = live(route(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).double(), T, 3, generator=generator()))
    assert conv(x, task if isinstance(task, int) else 0).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("task", [1, MIXED], ids=["one", "mixed"])
def test_autocast(task: int | Tensor) -> None:
    masked = conv_net(dtype=torch.float32)
    slim = twin(masked)
    x = images(dtype=torch.float32)
    exact = passes(masked, x, task)
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = passes(masked, x, task), passes(slim, x, task)
    for key, right in exact.items():
        if right.is_floating_point():
            error, known = ours[key].float() - right, plain[key].float() - right
            assert ours[key].dtype == plain[key].dtype
            assert error.norm() <= 2 * known.norm() + torch.finfo(torch.bfloat16).eps * right.norm(), key


def test_compiles_once_for_all_tasks() -> None:
    slim = twin(conv_net())
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        seen.append(len(seen))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(slim, backend=backend, fullgraph=True)
    for task in range(T):
        set_task(slim, task)
        y = compiled(images())
        assert_same({"y": y.detach()}, {"y": slim(images()).detach()})
    assert len(seen) == 1


def test_compiles_for_mixed_tasks() -> None:
    """Densely."""
    slim = twin(conv_net())
    torch._dynamo.reset()
    compiled = torch.compile(slim, backend="aot_eager", fullgraph=True)
    assert_same({"y": compiled(images(), MIXED).detach()}, {"y": slim(images(), MIXED).detach()})


def test_dropout_draws_as_before() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.4), nn.Conv2d(8, 4, 3), nn.Dropout2d(0.5)).double()
    masked = route(net, T, 4, generator=generator())
    slim = twin(masked)
    results = []
    for model in (slim, masked):
        seeds.manual_seed(5)
        results.append(passes(model, images(), 2))
    assert_same(*results)


class MeetingPlace(nn.Module):
    """A layer that is called, with a router in it; threads meet in it."""

    def __init__(self) -> None:
        super().__init__()
        self.routed = nn.Sequential(nn.Linear(8, 8), TaskRouter(8, 4, 0.5, generator=generator()))
        self.meet: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self.meet()
        y: Tensor = x + self.routed(x)
        self.meet()
        return y


def test_threads_have_the_tasks_of_their_calls() -> None:
    block, x = MeetingPlace(), torch.randn(5, 3)
    slim = live(nn.Sequential(nn.Linear(3, 8), TaskRouter(8, 4, 0.5, generator=generator()), nn.ReLU(), block))
    expected, made = [slim(x, task) for task in range(3)], [torch.empty(0)] * 3
    block.meet = partial(threading.Barrier(3).wait, timeout=20)

    def run(task: int) -> None:
        made[task] = slim(x, task)

    threads = [threading.Thread(target=run, args=(task,)) for task in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, made, expected)) and block.routed[1].active_task == 0


def test_a_task_that_a_layer_sets_itself() -> None:
    """Within a call that has another; on_task afterwards leaves the call's."""
    block, x = MeetingPlace(), torch.randn(5, 3)
    slim = live(nn.Sequential(nn.Linear(3, 8), TaskRouter(8, 4, 0.5, generator=generator()), nn.ReLU(), block))
    h = slim[:3](x, 2)
    seen: list[object] = []

    def within() -> None:
        with on_task(block, 3):
            seen.append(block.routed[1].active_task)
        seen.append(block.routed[1].active_task)

    block.meet = within
    torch.testing.assert_close(slim(x, 2), h + block.routed[1](block.routed[0](h), 2))
    assert seen == [3, 2] * 2
    block.meet = lambda: set_task(block, 1)
    torch.testing.assert_close(slim(x, 2), h + block.routed[1](block.routed[0](h), 1))


class Scaled(nn.Module):
    """By a number for each sample, in the order of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(1.0, 1 + x.shape[0], dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))


@pytest.mark.usefixtures("always_grouped")
def test_what_is_called_sees_samples_in_their_order() -> None:
    """A batch of several tasks is sorted by task only between layers that are read."""
    masked = conv_net()
    masked[0].insert(3, Scaled())
    seen: list[Tensor] = []
    slim = twin(masked)
    for net in (masked, slim):
        net[0][6].register_forward_hook(lambda module, x, y: seen.append(y.detach().clone()))
    assert_same(passes(slim, images(), MIXED), passes(masked, images(), MIXED))
    torch.testing.assert_close(*seen)


def test_hooks_see_dense_activations() -> None:
    masked = conv_net()
    seen: list[torch.Size] = []
    masked[0][3].register_forward_hook(lambda module, x, y: seen.append(x[0].shape))
    slim = live(masked)
    assert_same(passes(slim, images(), 1), passes(masked, images(), 1))
    assert seen[0] == seen[1] == (6, 8, 8, 8)


def test_a_router_turned_off() -> None:
    masked = conv_net()
    slim = twin(masked)
    for model in (masked, slim):
        next(m for m in model.modules() if isinstance(m, TaskRouter)).use_routing = False
    assert_same(passes(slim, images(), 1), passes(masked, images(), 1))


def test_routers_at_different_tasks() -> None:
    masked = conv_net()
    slim = twin(masked)
    for model in (masked, slim):
        for n, router in enumerate(m for m in model.modules() if isinstance(m, TaskRouter)):
            router.set_active_task(n)
    assert_same({"y": slim(images())}, {"y": masked(images())})


@pytest.mark.long
def test_vgg() -> None:
    masked = vgg11_bn(task_count=3, sigma=0.75, generator=generator(), dtype=torch.float32)
    slim = twin(masked)
    assert isinstance(slim.features, LiveSequential)
    x = torch.randn(2, 3, 32, 32)
    for model in (masked, slim):
        set_task(model, 1)
        model.eval()
    torch.testing.assert_close(slim(x), masked(x))
    torch.testing.assert_close(slim(x, torch.tensor([2, 0])), masked(x, torch.tensor([2, 0])))


# ---------------------------------------------------------------------------------------------- the cost rule


def test_the_cost_rule() -> None:
    few, many = dict(dense=(64, 64), live=(32, 32)), dict(dense=(64, 64), live=(60, 60))
    assert products.grouped_is_cheaper(60 * 1024, 20, **few, elements=9)
    assert not products.grouped_is_cheaper(60 * 4, 60, **few, elements=9)
    assert not products.grouped_is_cheaper(60 * 1024, 60, **many) or 60 * 1024 * (64 * 64 - 60 * 60) > 128 * 60 * 3600
    assert not products.grouped_is_cheaper(1000, 5, dense=(8, 8), live=(8, 8))
    border = 128 * 20 / 3  # (p + 128 G) / 4 = p, where a product costs nothing by itself
    assert products.grouped_is_cheaper(int(border) + 1, 20, **few, call=0)
    assert not products.grouped_is_cheaper(int(border), 20, **few, call=0)
    assert not products.grouped_is_cheaper(256 * 64, 42, dense=(32, 16), live=(16, 8), elements=9)  # small images
    assert products.grouped_is_cheaper(256 * 64, 42, dense=(32, 16), live=(16, 8), elements=9, call=0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 4, (3, 1), stride=(2, 1), padding=(0, 2), dilation=(2, 3)),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 2, padding="valid", stride=3),
    ],
)
def test_positions(layer: nn.Conv2d) -> None:
    x = torch.randn(2, 3, 9, 11)
    assert products.positions(layer, x) == layer(x)[:, 0].numel()


# ---------------------------------------------------------------------------------------------- layers by hand


def routers() -> tuple[TaskRouter, TaskRouter]:
    return TaskRouter(6, T, 2, generator=generator(1)), TaskRouter(8, T, 5, generator=generator(2))


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("task", [3, MIXED], ids=["one", "mixed"])
@pytest.mark.parametrize("ends", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", [RoutedConv2d, RoutedLinear])
def test_routed_layers(kind: type[nn.Module], ends: tuple[bool, bool], task: int | Tensor) -> None:
    inp, out = routers()
    a, b = inp if ends[0] else None, out if ends[1] else None
    sizes = (6, 8, 3) if kind is RoutedConv2d else (6, 8)
    seeds.manual_seed(0)
    layer = kind(*sizes, input_router=a, output_router=b).double()
    plain = (nn.Conv2d if kind is RoutedConv2d else nn.Linear)(*sizes).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(6, 6, *(5, 5)[: len(sizes) * 2 - 4], dtype=torch.float64)
    results = []

    def masked(x: Tensor) -> Tensor:
        y = plain(x if a is None else a(x, task))
        return y if b is None else b(y, task)  # type: ignore[no-any-return]

    for run in (lambda x: layer(x, task), masked):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.sin().sum().backward()
        results.append({"y": y.detach(), "dx": leaf.grad})
    results[0] |= {k: p.grad for k, p in layer.named_parameters()}
    results[1] |= {k: p.grad for k, p in plain.named_parameters()}
    assert_same(*results)  # type: ignore[arg-type]


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("kind", [RoutedConv2d, RoutedLinear, "live"])
@pytest.mark.parametrize("tasks", [(0, MIXED), (MIXED, 3), (MIXED, MIXED.flip(0)), (MIXED, MIXED.int())])
def test_two_routers_have_a_task_each(kind: type[nn.Module] | str, tasks: tuple[int | Tensor, int | Tensor]) -> None:
    inp, out = routers()
    seeds.manual_seed(0)
    plain = nn.Conv2d(6, 8, 1) if kind is RoutedConv2d else nn.Linear(6, 8)
    masked, layer = nn.Sequential(inp, plain, out), live(nn.Sequential(inp, plain, out))
    if kind != "live":
        sizes = (6, 8, 1) if kind is RoutedConv2d else (6, 8)
        layer = kind(*sizes, input_router=inp, output_router=out)  # type: ignore[operator]
        layer.load_state_dict(plain.state_dict())
    inp.set_active_task(tasks[0])
    out.set_active_task(tasks[1])
    x = torch.randn(6, 6, *(2, 2)[: plain.weight.dim() - 2])
    assert_same({"y": layer(x).detach()}, {"y": masked(x).detach()})


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("again", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
def test_gradients_of_many_tasks_are_summed_in_float32(kind: type[nn.Module], dtype: torch.dtype, again: bool) -> None:
    """300 ones are 300; a sum in bfloat16 stays at 256."""
    layer = kind(2, 4, *(1,)[: kind is nn.Conv2d]).to(dtype)
    net = live(nn.Sequential(layer, TaskRouter(4, 400, 1, balanced=True, generator=generator())))
    x, scale = torch.ones(400, 2, *(1, 1)[: layer.weight.dim() - 2], dtype=dtype), torch.ones((), requires_grad=again)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y = net(x, torch.arange(400)) * scale
    for found in torch.autograd.grad(y.float().sum(), tuple(layer.parameters()), create_graph=again):
        assert torch.equal(found, torch.full_like(found, 300))


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_batch_norm_by_groups_in_half_precision(dtype: torch.dtype, mean: float) -> None:
    """As PyTorch's: in float32. float16 has no 1e-8, and a shift by a mean of 30 loses bfloat16's digits."""
    seeds.manual_seed(0)
    norm = nn.BatchNorm1d(8, eps=1e-8)
    net = nn.Sequential(nn.Linear(6, 8), norm, TaskRouter(8, T, 4, generator=generator())).to(dtype).eval()
    nn.init.constant_(norm.running_mean, mean)
    nn.init.constant_(net[0].bias, mean)
    nn.init.zeros_(norm.running_var[:2])
    nn.init.zeros_(net[0].weight[:2])
    x, slim = torch.randn(6, 6, dtype=dtype), twin(net)
    set_task(net, MIXED)
    y, masked = slim(x, MIXED), net(x)
    assert (y - masked).abs().max() <= 4 * torch.finfo(dtype).eps * masked.abs().max()


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("task", [0, torch.tensor([0, 1, 0])], ids=["one", "mixed"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_statistics_that_no_task_reads_reach_no_gradient(task: int | Tensor, bad: float) -> None:
    router, norm = TaskRouter(4, 2, 2), nn.BatchNorm1d(4).eval()
    router._unit_mapping.copy_(torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]]))
    norm.running_mean[3], norm.running_var[3] = bad, bad  # type: ignore[index]
    live(nn.Sequential(nn.Linear(5, 4), norm, router)).eval()(torch.ones(3, 5), task).sum().backward()
    for parameter in norm.parameters():
        assert parameter.grad is not None and parameter.grad[3] == 0 and parameter.grad.isfinite().all()


def test_compact_ends() -> None:
    inp, out = routers()
    first = RoutedLinear(4, 6, output_router=inp, compact_output=True)
    second = RoutedLinear(6, 8, input_router=inp, output_router=out, compact_input=True)
    x = torch.randn(3, 4)
    compact = first(x, 2)
    assert compact.shape == (3, 4)
    dense = out(
        torch.nn.functional.linear(
            inp(torch.nn.functional.linear(x, first.weight, first.bias), 2), second.weight, second.bias
        ),
        2,
    )
    torch.testing.assert_close(second(compact, 2), dense)
    with pytest.raises(ValueError, match=r"task: expected one task for all samples with compact_input"):
        second(compact, torch.tensor([0, 1, 2]))


# ---------------------------------------------------------------------------------------------- bad input


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_route_names_what_it_cannot_handle() -> None:
    with pytest.raises(ValueError, match=r"got body\.1\.conv \(Conv2d\) in body\.1 \(Residual\)"):
        model = nn.Module()
        model.body = nn.Sequential(nn.Conv2d(3, 3, 1), Residual())
        route(model, T, 1)
    assert len(model.body) == 2  # nothing was changed
    with pytest.raises(ValueError, match=r"got none in Sequential"):
        route(nn.Sequential(nn.Linear(3, 3)), T, 1)
    with pytest.raises(ValueError, match=r"expected a model without routers"):
        route(conv_net(), T, 1)
    conv = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"got 1 \(Conv2d\), which is also 0"):
        route(nn.Sequential(conv, conv), T, 1)
    with pytest.raises(ValueError, match=r"sigma"):
        route(nn.Sequential(nn.Conv2d(3, 3, 1)), T, 1.5)


def test_route_places_routers() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 5, 1)), nn.BatchNorm2d(5)
    )
    kinds = [type(m).__name__ for m in route(net, T, 1).children()]
    assert kinds == ["Conv2d", "BatchNorm2d", "TaskRouter", "ReLU", "Sequential", "BatchNorm2d", "TaskRouter"]
    named = nn.Sequential()
    named.add_module("first", nn.Conv2d(3, 4, 1))
    assert list(dict(route(named, T, 1).named_children())) == ["first", "taskrouter_first"]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"expected a TaskRouter in a Sequential, got none in Linear"):
        live(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r'batch_norm: expected "exact" or "live", got \'fast\''):
        live(conv_net(), batch_norm="fast")
    slim = twin(conv_net())
    with pytest.raises(IndexError, match=r"got 5"):
        slim(images(), T)
    for wrong in (torch.tensor(T), torch.tensor([0, 1, 2, 3, 4, T])):
        with pytest.raises(IndexError, match=r"5"):
            slim(images(), wrong)
    with pytest.raises((ValueError, IndexError), match=r"task"):
        slim(images(), torch.tensor([0, 1]))
    inp, out = routers()
    with pytest.raises(ValueError, match=r"input_router: expected a router of 4 units, got 6"):
        RoutedLinear(4, 8, input_router=inp)
    with pytest.raises(TypeError, match=r"output_router: expected a TaskRouter or None, got Linear"):
        RoutedLinear(4, 8, output_router=nn.Linear(8, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"compact_output: expected a router on that side"):
        RoutedLinear(4, 8, compact_output=True)
    with pytest.raises(ValueError, match=r"groups: expected 1, got 2"):
        RoutedConv2d(6, 8, 3, groups=2)
    with pytest.raises(ValueError, match=r"x: expected 6 channels, got 5"):
        RoutedLinear(6, 8, input_router=inp)(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"x: expected \[B, C, H, W\], got \[2, 6\]"):
        RoutedConv2d(6, 8, 1, output_router=out)(torch.randn(2, 6))


@pytest.mark.usefixtures("always_grouped")
def test_nan_stays_in_its_sample() -> None:
    slim = twin(conv_net().eval())
    x = images()
    x[2] = torch.nan
    y = slim(x, MIXED)
    assert y[2].isnan().all() and not y[[0, 1, 3, 4, 5]].isnan().any()


def test_an_empty_batch() -> None:
    slim = twin(conv_net())
    assert slim(images()[:0], 1).shape == (0, 4)
    assert slim(images()[:0], MIXED[:0]).shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("task", [1, MIXED], ids=["one", "mixed"])
def test_on_a_gpu(task: int | Tensor, training: bool) -> None:
    """And nothing waits for the device."""
    masked = conv_net(True).train(training)
    expected = passes(masked, images(), task)
    slim = twin(masked).cuda().train(training)
    set_task(slim, task)
    x = images().cuda()
    slim(x)  # reads the masks
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = slim(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(y.cpu(), expected["y"])
