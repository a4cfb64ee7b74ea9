"""Live networks whose weights, masks or tasks change where nobody tells them: the next call sees it, or refuses."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from fastroute.tasks import RoutedLinear, TaskRouter, live, on_task, set_task
from fastroute.tasks.active_task import Task
from tests.helpers import seeds
from tests.helpers.opcheck import assert_same

T = 4
Net = nn.Sequential


def masked(seed: int = 0, sigma: float = 0.5) -> Net:
    """Layers and masks drawn from a seed; two hidden layers, one of them normed."""
    seeds.manual_seed(seed)
    drawn = seeds.generator(seed)
    hidden = [nn.Linear(6, 16), nn.BatchNorm1d(16), TaskRouter(16, T, sigma, generator=drawn), nn.ReLU()]
    return Net(*hidden, nn.Linear(16, 12), TaskRouter(12, T, sigma, generator=drawn), nn.Linear(12, 2)).eval().double()


def inputs(B: int = 5) -> Tensor:
    return torch.randn(B, 6, dtype=torch.float64, generator=seeds.generator(7))


# ------------------------------------------------------------------------------------------------------------- weights

FUSED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "Adagrad": torch.optim.Adagrad,
}  # fmt: skip
#: What has gradients made, so that a fused step, of which no version tells, moves the weights.
PASSES: dict[str, Callable[[Net, nn.Module, Tensor], Tensor]] = {
    "live": lambda _, net, x: net(x, 1),
    "of several tasks": lambda _, net, x: net(x, torch.arange(len(x)) % T),
    "masked, of the same layers": lambda plain, _, x: plain(x),
}


@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("through", PASSES)
@pytest.mark.parametrize("compiling", [False, True], ids=["", "compiled"])
@pytest.mark.long_after(14)
def test_weights_after_a_fused_step(compiling: bool, through: str, optimizer: str) -> None:
    plain, x = masked(), inputs()
    net = live(plain)
    set_task(plain, 1)
    steps = FUSED[optimizer](net.parameters(), lr=0.1, fused=True)
    torch._dynamo.reset()
    step: Any = torch.compile(steps.step, backend="aot_eager") if compiling else steps.step
    for _ in range(3):
        with torch.no_grad():
            before = net(x, 1)
            assert_same(before, plain(x))
        PASSES[through](plain, net, x).square().sum().backward()
        step()
        steps.zero_grad()
        with torch.no_grad():
            assert_same(net(x, 1), plain(x))
            assert not torch.equal(net(x, 1), before)


def test_a_routed_layer_after_a_fused_step() -> None:
    out = TaskRouter(8, T, 0.5, generator=seeds.generator(0))
    layer, x = RoutedLinear(6, 8, output_router=out).eval().double(), inputs()
    step = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True).step
    for _ in range(2):
        with torch.no_grad():
            assert_same(layer(x, 1), out(nn.functional.linear(x, layer.weight, layer.bias), 1))
        layer(x, 1).sum().backward()
        step()


# --------------------------------------------------------------------------------------------------------------- masks


def loading(program: Any, x: Tensor, t: Tensor) -> Callable[..., Tensor]:
    def run(state: dict[str, Tensor]) -> Tensor:
        program.load_state_dict(state)
        made: Tensor = program(x, t)
        return made

    return run


def exported(net: nn.Module, x: Tensor, t: Tensor) -> Callable[..., Tensor]:
    return loading(torch.export.export(net, (x, t)).module(), x, t)


def saved_and_loaded(net: nn.Module, x: Tensor, t: Tensor) -> Callable[..., Tensor]:
    file = io.BytesIO()
    torch.export.save(torch.export.export(net, (x, t)), file)
    file.seek(0)
    return loading(torch.export.load(file).module(), x, t)


def compiled_call(net: nn.Module, x: Tensor, t: Tensor) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(lambda state: functional_call(net, state, (x, t)), fullgraph=True, backend="aot_eager")


def compiled_and_loaded(net: nn.Module, x: Tensor, t: Tensor) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    run: Any = torch.compile(net, fullgraph=True, backend="aot_eager")
    run(x, t)

    def loaded(state: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            for name, buffer in (*net.named_buffers(), *net.named_parameters()):
                if name in state:
                    buffer.copy_(state[name])
        made: Tensor = run(x, t)
        return made

    return loaded


GRAPHS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "exported": exported, "saved": saved_and_loaded, "functional_call": compiled_call,
    "changed in place": compiled_and_loaded,
}  # fmt: skip


#: PyTorch loads no program that has a part without gradients in it, as one of training has.
MODES = [(graph, False) for graph in GRAPHS]
MODES += [pytest.param(graph, True, marks=pytest.mark.long) for graph in GRAPHS if graph != "saved"]


@pytest.mark.parametrize(("graph", "training"), MODES)
def test_a_graph_reads_the_masks_that_it_is_given(graph: str, training: bool) -> None:
    x, t = inputs(), torch.tensor(1)
    run = GRAPHS[graph](live(masked(0)).train(training), x, t)
    for seed in (0, 1, 2):
        other = masked(seed).train(training)
        set_task(other, 1)
        state = copy.deepcopy(other.state_dict())
        assert_same(run(state).detach(), other(x).detach())


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.long_after(2)
def test_a_graph_refuses_masks_with_another_number_of_live_channels(graph: str) -> None:
    x, t = inputs(), torch.tensor(1)
    run = GRAPHS[graph](live(masked(0)), x, t)
    with pytest.raises(RuntimeError, match="expected masks with as many live channels"):
        run(masked(1, sigma=0.25).state_dict())


@pytest.mark.parametrize("task", [1, torch.tensor(1), torch.arange(5) % T, None])
def test_an_ensemble_with_masks_of_its_own(task: Task | None) -> None:
    """vmap maps over the masks, which nobody then can read."""
    nets, x = [live(masked(seed)) for seed in range(3)], inputs()
    found = vmap(lambda *state: functional_call(nets[0], state, (x, task)))(*stack_module_state(nets))  # type: ignore[arg-type]
    for y, net in zip(found, nets, strict=True):
        assert_same(y, net(x, task))
    assert_same(nets[0](x, 1), live(masked(0))(x, 1))


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_an_ensemble_with_some_parameters_of_its_own(kind: str) -> None:
    nets, x = [live(masked(seed)) for seed in range(3)], inputs()
    some = {k: v.detach() for k, v in stack_module_state(nets)[0].items() if kind in k}  # type: ignore[arg-type]
    with torch.no_grad():
        found = vmap(lambda given: functional_call(nets[0], given, (x, 1)))(some)
        for n, y in enumerate(found):
            assert_same(y, functional_call(nets[0], {k: v[n] for k, v in some.items()}, (x, 1)))


def test_a_routed_layer_of_an_ensemble() -> None:
    out = TaskRouter(8, T, 0.5, generator=seeds.generator(0))
    masks = out.get_unit_mapping()
    for compact in (False, True):
        layer, x = RoutedLinear(6, 8, output_router=out, compact_output=compact).double(), inputs()
        net = nn.ModuleList([out, layer])

        def run(mask: Tensor, net: nn.ModuleList = net, x: Tensor = x) -> Any:
            return functional_call(_Second(net), {"net.0._unit_mapping": mask}, (x,))

        with pytest.raises(ValueError, match="vmap") if compact else nullcontext():
            found = vmap(run)(torch.stack([masks, 1 - masks]))
            dense = nn.functional.linear(x, layer.weight, layer.bias)
            assert_same(found, torch.stack([dense * masks[1], dense * (1 - masks[1])]))


class _Second(nn.Module):
    """Of a ModuleList, for task 1."""

    def __init__(self, net: nn.ModuleList) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net[1](x, 1)


# --------------------------------------------------------------------------------------------------------------- tasks

#: What a task may be.
GIVEN: dict[str, Callable[[int], Task]] = {
    "int": lambda t: t, "0-d": lambda t: torch.tensor(t), "int32": lambda t: torch.tensor(t, dtype=torch.int32),
    "[B]": lambda t: (torch.arange(5) + t) % T,
}  # fmt: skip
NETS: dict[str, Callable[[], nn.Module]] = {"masked": masked, "live": lambda: live(masked())}
each_given = pytest.mark.parametrize("given", GIVEN)
each_net = pytest.mark.parametrize("net", NETS)
each_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])


def again(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(net, x, use_reentrant=True)


#: How a model is called so that its forward pass is made again; the last within another that is.
WAYS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "once": again,
    "within another": lambda net: lambda x: checkpoint(again(net), x, use_reentrant=True),
}


@each_given
@each_net
@each_mode
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("looked", [False, True], ids=["", "after a look"])
def test_another_active_task_in_a_reentrant_checkpoint(
    way: str, given: str, net: str, training: bool, looked: bool
) -> None:
    """Refused where it differs; with the same again, in two backward passes, the gradients are right."""
    task, x = GIVEN[given], inputs().requires_grad_()
    model = NETS[net]().train(training)
    run = WAYS[way](model)
    if looked:
        for t in range(T):
            set_task(model, task(t))
            with torch.no_grad():
                model(x)
    total = torch.zeros((), dtype=torch.float64)
    for t in (0, 1):
        set_task(model, task(t))
        total = total + run(x).square().sum()
    with pytest.raises(RuntimeError, match="expected a forward pass that is made again"):
        total.backward()

    set_task(model, task(1))
    y = run(x)
    for _ in range(2):
        found = _grad(y, x)
        assert_same(found, _grad(model(x), x))


def _grad(y: Tensor, x: Tensor) -> Tensor:
    x.grad = None
    y.square().sum().backward(retain_graph=True)
    assert x.grad is not None
    return x.grad


def test_a_task_tensor_that_is_written_to() -> None:
    model, x, t = masked(), inputs().requires_grad_(), torch.tensor(0)
    set_task(model, t)
    y = checkpoint(model, x, use_reentrant=True)
    t.fill_(1)
    with pytest.raises(RuntimeError, match="expected a forward pass that is made again"):
        y.sum().backward()


@each_net
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_a_task_tensor_that_is_set_again(net: str, dtype: torch.dtype) -> None:
    model, x, t = NETS[net](), inputs(), torch.tensor(1, dtype=dtype)
    outputs = []
    for _ in range(2):
        t.fill_(2 - t)
        for own in (lambda: model.set_active_task(t), lambda: set_task(model, t)):
            if net == "live" or own.__code__.co_names[0] == "set_task":
                own()
        outputs.append(model(x))
        set_task(model, int(t))
        assert_same(outputs[-1], model(x))


@each_net
@pytest.mark.parametrize("sigma", [0.5, 0.0])
def test_frozen_nets_whose_saved_tensors_are_moved(net: str, sigma: float) -> None:
    """Nothing is made again, so nothing needs gradients."""
    plain, x = masked(sigma=sigma).requires_grad_(False), inputs()
    model = plain if net == "masked" else live(plain)
    set_task(plain, 1)
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    assert not y.requires_grad
    assert_same(y, model(x))


def test_a_live_chain_of_idle_routers_where_saved_tensors_are_kept() -> None:
    net, x = live(Net(TaskRouter(6, T, 0.0))), inputs().requires_grad_()
    for hooks in (torch.autograd.graph.save_on_cpu(), nullcontext()):
        with hooks:
            assert torch.equal(net(x), x)
    assert torch.equal(checkpoint(net, x, use_reentrant=False), x)


def test_a_live_chain_without_routers_has_no_task() -> None:
    net = live(masked())
    parts = Net(net[:1], net[1:])
    assert not hasattr(parts[0], "active_task")
    set_task(parts, 1)
    with on_task(parts, 2):
        y = parts(inputs())
    assert_same(y, net(inputs(), 2))
    assert parts[1].active_task == 1


# --------------------------------------------------------------------------------------------------- others' tensors


@pytest.mark.parametrize("before", [[], [nn.Identity()], [nn.Dropout(0.5)], [nn.Flatten()]], ids=lambda b: f"{b}")
@pytest.mark.parametrize("inplace", [False, True])
def test_what_an_idle_router_is_given_stays(before: list[nn.Module], inplace: bool) -> None:
    """Unless it, too, writes in place, as it then does in the masked net."""
    layers = [*before, TaskRouter(6, T, 0.0, inplace=inplace), nn.ReLU(inplace=True), nn.Linear(6, 8)]
    plain = Net(*layers, TaskRouter(8, T, 0.5, generator=seeds.generator(0))).eval().double()
    kept = []
    for net in (plain, live(plain)):
        x = inputs()
        set_task(plain, 1)
        net(x)
        kept.append(x)
    assert torch.equal(*kept)
    assert torch.equal(kept[0], inputs()) == (not inplace)


@pytest.mark.parametrize("before", [nn.Tanh(), nn.ReLU(), nn.ReLU(inplace=True)], ids=str)
@pytest.mark.parametrize("task", [1, torch.tensor([0, 3, 3, 1, 0])], ids=["one", "several"])
def test_what_a_layer_before_the_router_keeps_is_not_overwritten(task: Task, before: nn.Module) -> None:
    """By one behind it: the router's result is another tensor than what it was given."""
    masks = TaskRouter(8, T, 0.5, generator=seeds.generator(0))
    plain = Net(nn.Linear(6, 8), before, masks, nn.LeakyReLU(0.1, inplace=True), nn.Linear(8, 2)).double()
    found = []
    for net in (plain, live(copy.deepcopy(plain))):
        x = inputs().requires_grad_()
        set_task(net, task)
        net(x).sum().backward()
        found.append([x.grad, net[0].weight.grad])
    for dense, compact in zip(*found, strict=True):
        assert_same(dense, compact)


@pytest.mark.parametrize("norms", ["autocast", "float32 norms"])
@pytest.mark.parametrize("B", [6, 4000])
def test_dtypes_of_several_tasks_are_those_of_one(norms: str, B: int) -> None:
    """Few samples run densely, many task by task."""
    seeds.manual_seed(0)
    wide = [nn.Linear(64, 256), nn.BatchNorm1d(256), TaskRouter(256, T, 0.5, generator=seeds.generator(0)), nn.ReLU()]
    last = [nn.Linear(256, 256), nn.BatchNorm1d(256), TaskRouter(256, T, 0.5, generator=seeds.generator(1))]
    plain = Net(*wide, *last).eval()
    x, t = torch.randn(B, 64, generator=seeds.generator(2)), torch.arange(B) % T
    if norms != "autocast":
        x = x.bfloat16()
        plain.bfloat16()
        for norm in (plain[1], plain[5]):
            norm.float()
    net = live(plain)
    set_task(plain, t)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=norms == "autocast"):
        found, want = net(x, t), plain(x)
        assert found.dtype == want.dtype == net(x, 1).dtype == torch.bfloat16
    assert float((found - want).abs().max()) <= 0.05 * float(want.abs().max())
