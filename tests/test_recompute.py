"""A forward pass that torch.utils.checkpoint makes again for backward leaves no second trace, and is the same."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastroute
from fastroute import networks
from fastroute.networks import Loss, MoE, TopKGating, Trajectory
from fastroute.tasks import RoutedLinear, TaskRouter, live, on_task, route, set_task, vgg11_bn
from tests.helpers import seeds
from tests.helpers.networks import LEARNING, linears

B, F, K = 8, 6, 3
KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def batch(seed: int = 0) -> Tensor:
    return torch.randn(B, F, generator=seeds.generator(seed)).requires_grad_()


def plain(function: Callable[..., Any], *args: Any, use_reentrant: bool) -> Any:
    return function(*args)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor | None]:
    return [x.grad, *(p.grad for p in module.parameters())]


def same(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


# ------------------------------------------------------------------------------------------------------- networks


def mixture(run: Callable[..., Any], **options: Any) -> tuple[Trajectory, list[Tensor | None], TopKGating]:
    seeds.fixed_seed(0)
    net = nn.ModuleList([TopKGating(K, F, 2, **options), linears(K)])
    meta, x = Trajectory(B), batch()

    def layer(x: Tensor) -> Tensor:
        y, _, actions = net[0](x, meta)
        return net[1](y, meta, actions)[0]

    y = run(layer, x, use_reentrant=False)
    (y.sum() + meta.aux_loss).backward()
    return meta, gradients(net, x), net[0]


@pytest.mark.parametrize("options", [{}, {"jitter": 0.3}, {"bias_balancing": 0.1, "z_loss": 0.1}], ids=str)
def test_a_gating_adds_its_losses_once(options: dict[str, Any]) -> None:
    once, expected, _ = mixture(plain, **options)
    again, found, gate = mixture(checkpoint, **options)
    same(found, expected)
    assert len(again.mixtures) == len(once.mixtures) == 1
    assert torch.equal(again.aux_loss, once.aux_loss)
    assert gate.counts is None or int(gate.counts.sum()) == 2 * B


def routed(run: Callable[..., Any], algo: str, **options: Any) -> tuple[Trajectory, list[Tensor | None], Any]:
    seeds.fixed_seed(0)
    reward = networks.CollaborationReward(0.3, K, 100)
    decide = getattr(networks, algo)(K, F, additional_reward_func=reward, **options)
    net = nn.ModuleList([decide, linears(K, store_module_pointers=True)])
    meta, x = Trajectory(B), batch()

    def layer(x: Tensor) -> Tensor:
        y, _, actions = net[0](x, meta)
        return net[1](y, meta, actions)[0]

    y = x
    for _ in range(2):
        y = run(layer, y, use_reentrant=False)
    loss, routing = Loss(nn.MSELoss(), networks.NegLossReward())(y, meta, torch.ones(B, F))
    (loss + routing).backward()
    return meta, gradients(net, x), reward


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("algo", LEARNING)
def test_a_decision_is_recorded_once(algo: str, detach: bool) -> None:
    once, expected, _ = routed(plain, algo, detach=detach)
    again, found, reward = routed(checkpoint, algo, detach=detach)
    same(found, expected)
    assert len(again.records) == 2 and torch.equal(again.actions, once.actions)
    assert int((reward.history >= 0).sum()) == 2 * B
    assert [count for count, _, _ in again._batch.pointers] == [1, 2] and set(again._batch.pointed(0)) == {0, 1}


@KINDS
def test_a_trajectory_made_within_is_whole(reentrant: bool) -> None:
    def train(run: Callable[..., Any]) -> list[Tensor | None]:
        seeds.fixed_seed(0)
        net = networks.Sequential(TopKGating(K, F, 2), linears(K), networks.REINFORCE(K, F), linears(K))
        x = batch()

        def step(x: Tensor) -> Any:
            y, meta = net(x)
            loss, routing = Loss(nn.MSELoss(), networks.NegLossReward())(y, meta, torch.ones(B, F))
            assert len(meta.records) == len(meta.mixtures) == 1
            return loss + routing

        run(step, x, use_reentrant=reentrant).backward()
        return gradients(net, x)

    same(train(checkpoint), train(plain))


@KINDS
@pytest.mark.parametrize("options", [{}, {"shared_experts": 1, "jitter": 0.3, "bias_balancing": 0.1}], ids=str)
def test_moe(options: dict[str, Any], reentrant: bool) -> None:
    def train(run: Callable[..., Any]) -> list[Tensor | None]:
        seeds.fixed_seed(0)
        moe, x = MoE(F, 8, 4, **options), batch()

        def step(x: Tensor) -> tuple[Tensor, Tensor]:
            y, aux = moe(x, return_aux=True)
            return y, aux.loss

        y, loss = run(step, x, use_reentrant=reentrant)
        (y.sum() + loss).backward()
        return [moe.gate.counts, *gradients(moe, x)]

    same(train(checkpoint), train(plain))


def test_losses_that_a_checkpoint_records_without_gradients_are_refused() -> None:
    gate, meta, x = TopKGating(K, F, 2), Trajectory(B), batch()
    y = checkpoint(lambda x: gate(x, meta)[0] * 2, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        (y.sum() + meta.aux_loss).backward()


@KINDS
def test_what_is_not_read_is_not_refused(reentrant: bool) -> None:
    gate, select, meta, x = TopKGating(K, F, 2), linears(K), Trajectory(B), batch()

    def layer(x: Tensor) -> Tensor:
        y, _, actions = gate(x, meta)
        return select(y, meta, actions)[0]

    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert gate.router.weight.grad.abs().sum() > 0 and len(meta.mixtures) == 1


@KINDS
@pytest.mark.parametrize("layer", ["gating", "decision", "moe"])
def test_draws_that_cannot_be_made_again_are_refused(layer: str, reentrant: bool) -> None:
    generator, x = torch.Generator().manual_seed(0), batch()
    if layer == "moe":
        step = MoE(F, 8, 4, jitter=0.1, generator=generator)
    else:
        made = (
            TopKGating(K, F, 2, jitter=0.1, generator=generator)
            if layer == "gating"
            else networks.GumbelSoftmax(K, F, generator=generator, detach=False)
        )
        select = linears(K)

        def step(x: Tensor) -> Tensor:
            return select(*made(x, Trajectory(B)))[0]

    with pytest.raises(RuntimeError, match="generator"):
        checkpoint(step, x, use_reentrant=reentrant).sum().backward()


# ------------------------------------------------------------------------------- first passes in a backward pass

Hook = Callable[[Callable[[], object], Tensor, nn.Module], object]
HOOKS: dict[str, Hook] = {
    "tensor": lambda f, y, _: y.register_hook(lambda g: f()),
    "method": lambda f, y, _: y.register_hook(Once(f).hook),
    "arguments": lambda f, y, _: y.register_hook(lambda *gradients, more=1: f()),
    "partial": lambda f, y, _: y.register_hook(functools.partial(lambda f, g: f(), f)),
    "pre": lambda f, y, _: y.grad_fn.register_prehook(lambda g: f()),
    "post": lambda f, y, _: y.grad_fn.register_hook(lambda g_inp, g_out: f()),
    "accumulated": lambda f, _, m: m.weight.register_post_accumulate_grad_hook(lambda p: f()),
    "module": lambda f, _, m: m.register_full_backward_hook(lambda m, g_inp, g_out: f()),
    "callback": lambda f, y, _: y.register_hook(
        lambda g: torch.autograd.Variable._execution_engine.queue_callback(lambda: f())
    ),
}


class Once:
    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run

    def hook(self, g: Tensor) -> None:
        self.run()


def another() -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    """A training step of another model, itself checkpointed, and all that its layers have noted since."""
    reward = networks.CollaborationReward(0.3, K, 100)
    gate = TopKGating(K, F, 2, bias_balancing=0.1)
    net = networks.Sequential(gate, linears(K), networks.REINFORCE(K, F, additional_reward_func=reward), linears(K))
    tasks = live(
        nn.Sequential(
            nn.Linear(F, 6), TaskRouter(6, 2, 0.5, generator=seeds.generator(0)), nn.BatchNorm1d(6), nn.ReLU()
        )
    )
    mixture, x, seen, totals = MoE(F, 8, 4, bias_balancing=0.1), batch(), [], []
    monitor = fastroute.RoutingMonitor(net)

    def step() -> None:
        with torch.enable_grad(), monitor:
            y, meta = net(x)
            loss, routing = Loss(nn.MSELoss(), networks.NegLossReward())(y, meta, torch.ones(B, F))
            seen.extend([meta.actions, meta.aux_loss.detach()])
            z = checkpoint(mixture, tasks(x, 1), use_reentrant=False)
            (loss + routing + z.sum()).backward()
        totals.append(torch.tensor([len(meta.records), len(meta.mixtures)]))

    def notes() -> list[Tensor]:
        counted = [torch.as_tensor(v) for v in monitor.numbers(reset=False).values()]
        return [
            *seen,
            *totals,
            *counted,
            reward.history,
            gate.counts,
            mixture.gate.counts,
            *tasks.state_dict().values(),
        ]

    return step, notes


@KINDS
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", ["after", "within"])
def test_a_model_that_a_hook_trains_is_trained_for_the_first_time(where: str, hook: str, reentrant: bool) -> None:
    seeds.fixed_seed(0)
    step, expected = another()
    torch.manual_seed(1)
    step()
    seeds.fixed_seed(0)
    step, found = another()
    layer, x = nn.Linear(F, F), batch()

    def trained() -> None:
        torch.manual_seed(1)
        step()

    hooked: list[object] = []

    def block(x: Tensor) -> Tensor:
        y = layer(x)
        if where == "within" and hook != "module" and y.requires_grad and not hooked:
            hooked.append(HOOKS[hook](trained, y, layer))
        return y.tanh()

    if hook == "module":
        HOOKS[hook](trained, x, layer)
    y = checkpoint(block, x, use_reentrant=reentrant)
    if where == "after" and hook != "module":
        HOOKS[hook](trained, y, layer)
    y.sum().backward()
    same(found(), expected())


class Kept:
    """What checkpointing of one's own may keep instead of a tensor."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


def again_by_a_function(layer: nn.Module, x: Tensor) -> None:
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return layer(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(layer(x), x, g)[0]

    Again.apply(x).sum().backward()


def again_by_hooks(layer: nn.Module, x: Tensor) -> None:
    layer(x)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: (layer(x), kept.y)[1]):
        y = x.exp()
    y.sum().backward()


def again_by_a_look(layer: nn.Module, x: Tensor) -> None:
    y = checkpoint(lambda x: layer(x).exp(), x, use_reentrant=False)
    y.grad_fn._saved_result  # noqa: B018


def again_in_a_thread(layer: nn.Module, x: Tensor) -> None:
    thread = threading.Thread(target=lambda: checkpoint(layer, x, use_reentrant=True).sum().backward())
    thread.start()
    thread.join()


def again_in_nested_ones(layer: nn.Module, x: Tensor) -> None:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    checkpoint(inner, x, use_reentrant=True).sum().backward()


def again_in_a_hook(layer: nn.Module, x: Tensor) -> None:
    def hook(_: Tensor) -> None:
        with torch.enable_grad():
            checkpoint(layer, x, use_reentrant=False).sum().backward()

    y = x * 1
    y.register_hook(hook)
    y.sum().backward()


AGAIN = [again_by_a_function, again_by_hooks, again_by_a_look, again_in_a_thread, again_in_nested_ones, again_in_a_hook]


@pytest.mark.parametrize("run", AGAIN, ids=lambda run: run.__name__)
def test_a_pass_that_is_made_again_counts_once(run: Callable[[nn.Module, Tensor], None]) -> None:
    moe = MoE(F, 8, 4, bias_balancing=0.1)
    run(moe, batch())
    assert int(moe.gate.counts.sum()) == B * moe.gate.k


# ---------------------------------------------------------------------------------- a policy that saves all results


def of_triplet(first: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    net = nn.ModuleList([first, linears(K)])
    return net, lambda x: net[1](*net[0](x, Trajectory(len(x))))[0]


def with_itself(layer: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    return layer, layer


def of_a_cell(kind: Any) -> tuple[nn.Module, Callable[..., Tensor]]:
    """One that routes: PyTorch's own is written into by the operator that it is."""
    cell = kind(F, 4, num_selections=K, depth_routing=2, routing_agent=networks.REINFORCE, detach=False)
    return cell, lambda x: torch.cat([*cell(x)[0]], -1)


def of_tasks(task: Any) -> tuple[nn.Module, Callable[..., Tensor]]:
    router = TaskRouter(10, K, 0.5, generator=seeds.generator(0))
    model = live(nn.Sequential(nn.Linear(F, 10), router, nn.ReLU(), nn.Linear(10, F)))
    return model, lambda x: model(x, task)


def weighed(name: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    nodes: list[dict[str, Any]] = [{"name": n, "layers": nn.Linear(F, 1), "loss": nn.MSELoss()} for n in "AB"]
    model = fastroute.MTLModel(nodes, ["A", "B"], weighting=name)
    return model, lambda x: model.loss(model(x)[0], [torch.ones(B, 1)] * 2)[0]


SAVED: dict[str, Callable[[], tuple[nn.Module, Callable[..., Tensor]]]] = {
    "gating": lambda: of_triplet(TopKGating(K, F, 2, bias_balancing=0.1)),
    "capacity": lambda: of_triplet(TopKGating(K, F, 2, capacity=1.0)),
    "moe": lambda: with_itself(MoE(F, 8, 4)),
    **{algo: lambda algo=algo: of_triplet(getattr(networks, algo)(K, F)) for algo in LEARNING if algo != "RELAX"},  # type: ignore[misc]
    "gru": lambda: of_a_cell(networks.RoutingGRUCell),
    "lstm": lambda: of_a_cell(networks.RoutingLSTMCell),
    "task": lambda: of_tasks(1),
    "tasks": lambda: of_tasks(torch.arange(B) % K),
    "capsules": lambda: with_itself(fastroute.EfficientVectorRouting(B, 3, F, 5)),
    **{name: lambda name=name: weighed(name) for name in ("dwa", "stch", "famo", "uncertainty")},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", SAVED)
def test_a_policy_that_saves_all_results(name: str) -> None:
    """No layer writes into what an operator gave: a checkpoint may have kept it."""
    policy = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE)

    def train(run: Callable[..., Any], **options: Any) -> list[Tensor | None]:
        seeds.fixed_seed(0)
        (net, call), x = SAVED[name](), batch()
        run(call, x, use_reentrant=False, **options).square().sum().backward()
        return gradients(net, x)

    same(train(checkpoint, context_fn=policy), train(lambda f, x, **_: f(x)))


# ---------------------------------------------------------------------------------------------------------- tasks


def masked() -> nn.Module:
    seeds.fixed_seed(0)
    generator = seeds.generator(0)
    router = lambda: TaskRouter(10, K, 0.5, generator=generator)  # noqa: E731
    return nn.Sequential(nn.Linear(F, 10), router(), nn.ReLU(inplace=True), nn.Linear(10, 10), router(), nn.ReLU())


def between() -> nn.Module:
    seeds.fixed_seed(0)
    router = TaskRouter(10, K, 0.5, generator=seeds.generator(0))
    return nn.Sequential(RoutedLinear(F, 10, output_router=router), nn.Tanh(), RoutedLinear(10, 4, input_router=router))


NETS: dict[str, Callable[[], nn.Module]] = {"masked": masked, "live": lambda: live(masked())}


class Both(nn.Module):
    """A model whose forward takes no task."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x).square()


TASKS = {"ints": (0, 1), "tensors": (torch.arange(B) % K, (torch.arange(B) + 1) % K)}


@KINDS
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("net", NETS)
def test_a_task_set_within_the_checkpoint(net: str, tasks: str, reentrant: bool) -> None:
    def train(run: Callable[..., Any]) -> list[Tensor | None]:
        model, x = Both(NETS[net]()), batch()

        def trunk(x: Tensor, task: Any) -> Tensor:
            with on_task(model, task):
                return model(x)

        sum(run(trunk, x, t, use_reentrant=reentrant).sum() for t in TASKS[tasks]).backward()
        assert all(m.active_task == 0 for m in model.modules() if isinstance(m, TaskRouter))
        return gradients(model, x)

    same(train(checkpoint), train(plain))


@KINDS
def test_a_task_given_in_the_call(reentrant: bool) -> None:
    def train(run: Callable[..., Any]) -> list[Tensor | None]:
        model, x = live(masked()), batch()
        sum(run(model, x, t, use_reentrant=reentrant).sum() for t in (0, 1)).backward()
        return gradients(model, x)

    same(train(checkpoint), train(plain))


@KINDS
@pytest.mark.parametrize("net", NETS)
def test_a_task_that_changes_before_it_is_recomputed_is_refused(net: str, reentrant: bool) -> None:
    model, x, total = NETS[net](), batch(), 0.0
    for t in (0, 1):
        set_task(model, t)
        total = total + checkpoint(model, x, use_reentrant=reentrant).sum()
    with pytest.raises(RuntimeError, match="give the task in the call"):
        total.backward()


@pytest.mark.parametrize("net", [*NETS, "between"])
def test_tasks_of_samples_that_change_are_refused(net: str) -> None:
    model, x, total = {**NETS, "between": between}[net](), batch(), 0.0
    for t in TASKS["tensors"]:
        for m in [model, *model.modules()]:
            for router in m.__dict__.get("_ends", ()):
                if router is not None:
                    set_task(router, t)
        if net != "between":
            set_task(model, t)
        total = total + checkpoint(model, x, use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match="give the task in the call"):
        total.backward()


@KINDS
@pytest.mark.parametrize("net", NETS)
def test_a_task_that_is_set_after_each_backward_is_fine(net: str, reentrant: bool) -> None:
    def train(run: Callable[..., Any]) -> list[Tensor | None]:
        model, x = NETS[net](), batch()
        for t in (0, 1, 0):
            set_task(model, t)
            model.eval()(x)
            run(model.train(), x, use_reentrant=reentrant).square().sum().backward()
            set_task(model, t)
        return gradients(model, x)

    same(train(checkpoint), train(plain))


def test_a_head_behind_what_is_not_trained() -> None:
    """The router's input needs no gradient, the layer after it does."""
    model, x, total = masked(), batch(), 0.0
    model[0].requires_grad_(False)
    for t in (0, 1):
        set_task(model, t)
        total = total + checkpoint(model, x.detach(), use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match="give the task in the call"):
        total.backward()


@KINDS
def test_running_statistics_of_live_layers_move_once(reentrant: bool) -> None:
    def train(run: Callable[..., Any]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        seeds.fixed_seed(0)
        layers = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
        model = live(route(layers, K, 0.5, generator=seeds.generator(0), where=lambda name, m: name == "0"))
        x = torch.randn(4, 2, 8, 8, generator=seeds.generator(1)).requires_grad_()
        run(model, x, use_reentrant=reentrant).square().sum().backward()
        return model.state_dict(), gradients(model, x)

    found, expected = train(checkpoint), train(plain)
    same(found[1], expected[1])
    same(list(found[0].values()), list(expected[0].values()))


@KINDS
def test_vgg_given_the_task(reentrant: bool) -> None:
    def train(run: Callable[..., Any]) -> list[Tensor | None]:
        seeds.fixed_seed(0)
        model = vgg11_bn(task_count=2, generator=seeds.generator(0))
        x = torch.randn(2, 3, 32, 32, generator=seeds.generator(1)).requires_grad_()
        sum(run(model, x, t, use_reentrant=reentrant).square().sum() for t in (0, 1)).backward()
        return gradients(model, x)

    same(train(checkpoint), train(plain))


def test_on_task_leaves_what_was() -> None:
    model = masked()
    set_task(model, 2)
    with pytest.raises(ZeroDivisionError), on_task(model, 1):
        assert model[1].active_task == model[4].active_task == 1
        1 / 0  # noqa: B018
    assert model[1].active_task == model[4].active_task == 2
    with pytest.raises(IndexError), on_task(model, K):
        pass
    assert model[1].active_task == 2
