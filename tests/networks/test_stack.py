"""Modules whose parameters are stacked: the same numbers as a list of them, the same checkpoints, fewer parameters."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastroute import use_backend
from fastroute.networks import MLP, RELAX, Loss, NegLossReward, Selection, grouped_modules
from fastroute.networks.stacked_modules import Stack, unstacked_state_dict
from fastroute.ops import dispatch
from tests.helpers import seeds
from tests.helpers.backends import each_backend
from tests.helpers.networks import LEARNING, F, decision, play, scatter_tables, start
from tests.helpers.opcheck import assert_same

KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(F, F),
    "no bias": lambda: nn.Linear(F, F, bias=False),
    "deep": lambda: nn.Sequential(
        nn.Linear(F, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, F), nn.Tanh()
    ),
    "norms": lambda: nn.Sequential(nn.RMSNorm(F), nn.Linear(F, 8), nn.GroupNorm(2, 8), nn.Linear(8, F), nn.Sigmoid()),
    "mlp": lambda: MLP(F, F, (5,)),
}
K = 4
each_kind = pytest.mark.parametrize("kind", KINDS)


def modules(kind: str) -> nn.ModuleList:
    seeds.manual_seed(0)
    made = nn.ModuleList(KINDS[kind]() for _ in range(K)).double()
    with torch.no_grad():
        for p in made.parameters():  # norms start out alike
            p.add_(torch.randn_like(p))
    return made


def run(over: nn.ModuleList | Stack, x: Tensor, actions: Tensor) -> Tensor:
    each = [over.pattern] if isinstance(over, Stack) else list(over)
    return grouped_modules.run(each, x, dispatch.plan(actions, K), grouped_modules.Recipe(), keep_empty=True)


@each_kind
def test_same_numbers(kind: str) -> None:
    listed = modules(kind)
    stack = Stack(listed)
    x = torch.randn(30, F, dtype=torch.float64)
    actions = torch.randint(-1, K - 1, (30,))  # nobody takes the last one
    results = []
    for over in (listed, stack):
        leaf = x.clone().requires_grad_()
        y = run(over, leaf, actions)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad])
    for got, expected in zip(results[1], results[0], strict=True):
        assert got is not None and expected is not None
        assert_same(got, expected)
    for name, p in stack.pattern.named_parameters():
        own = [m.get_parameter(name) for m in listed]
        assert p.grad is not None
        assert_same(p.grad, torch.stack([torch.zeros_like(q) if q.grad is None else q.grad for q in own]))
        assert not p.grad[-1].any()


@each_kind
def test_checkpoints_of_a_list(kind: str) -> None:
    listed = modules(kind)
    holder, other = nn.Module(), nn.Module()
    holder.layers, other.layers = Stack(listed), Stack(modules(kind))
    plain = nn.Module()
    plain.layers = listed
    saved = unstacked_state_dict(holder)
    assert list(saved) == list(plain.state_dict())
    assert all(torch.equal(t, saved[k]) for k, t in plain.state_dict().items())
    with torch.no_grad():
        for p in listed.parameters():
            p.mul_(2)
    for assign in (False, True):
        file = io.BytesIO()
        torch.save(plain.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
        assert all(torch.equal(t, unstacked_state_dict(other)[k]) for k, t in plain.state_dict().items())
    back = nn.Module()
    back.layers = modules(kind)
    back.load_state_dict(unstacked_state_dict(other), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), listed.parameters(), strict=True))


def test_what_does_not_fit_a_checkpoint_is_named() -> None:
    holder = nn.Module()
    holder.layers = Stack(modules("linear"))
    good = unstacked_state_dict(holder)
    for change, telling in (
        ({"layers.2.weight": None}, r"Missing key.*layers\.2\.weight"),
        ({"layers.9.weight": torch.zeros(F, F)}, r"Unexpected key.*layers\.9\.weight"),
        (
            {"layers.1.bias": torch.zeros(3)},
            r"size mismatch for layers\.1\.bias: expected \[6\], the checkpoint has \[3\]",
        ),
    ):
        wrong = {k: t for k, t in {**good, **change}.items() if t is not None}
        with pytest.raises(RuntimeError, match=telling):
            holder.load_state_dict(wrong)
    incomplete = {k: t + 1 for k, t in good.items() if k != "layers.0.bias"}
    before = holder.layers.pattern.bias.clone()
    found = holder.load_state_dict(incomplete, strict=False)
    assert found.missing_keys == ["layers.0.bias"] and not found.unexpected_keys
    assert torch.equal(holder.layers.pattern.bias, torch.cat([before[:1], before[1:] + 1]))


def test_one_parameter_each() -> None:
    stack = Stack(modules("mlp"))
    assert [tuple(p.shape) for p in stack.parameters()] == [(K, 5, F), (K, 5), (K, F, 5), (K, F)]
    assert all(p.is_leaf and p.is_contiguous() for p in stack.parameters())
    assert all(p.dtype == torch.float32 for p in copy.deepcopy(stack).float().parameters())


def test_single_modules_and_copies() -> None:
    listed = modules("deep")
    stack = copy.deepcopy(Stack(listed))
    x = torch.randn(5, F, dtype=torch.float64)
    assert len(stack) == K and len(list(stack)) == K
    for k in range(-1, K):
        assert torch.equal(stack[k](x), listed[k](x))
    assert list(stack.state_dict()) == [f"pattern.{name}" for name in dict(listed[0].named_parameters())]
    with pytest.raises(IndexError, match=r"^index: expected one below 4, got 4"):
        stack[4]
    with pytest.raises(TypeError, match="run by Selection"):
        stack(x)


@pytest.mark.parametrize("unlike", [
    [nn.Linear(3, 4), nn.Linear(3, 5)],
    [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())],
    [nn.BatchNorm1d(3), nn.BatchNorm1d(3)],
    [nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)],
    [nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)],
    [],
])  # fmt: skip
def test_what_cannot_be_stacked(unlike: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"^stacked: expected "):
        Stack(unlike)


# ------------------------------------------------------------------------------------------------- in a network


def network(algo: str, storage: str, stacked: bool, hidden: tuple[int, ...] = ()) -> nn.ModuleDict:
    seeds.manual_seed(1)
    decisions = nn.ModuleList(
        decision(algo, K, 3, policy_storage_type=storage, approx_hidden_dims=hidden, stacked=stacked) for _ in range(2)
    )
    selections = nn.ModuleList(
        Selection(*(nn.Sequential(nn.Linear(F, F), nn.Tanh()) for _ in range(K)), stacked=stacked) for _ in range(2)
    )
    return nn.ModuleDict({"decisions": decisions, "selections": selections}).double()


def gradients_by_module(net: nn.ModuleDict) -> dict[str, Tensor]:
    """Under the names of a checkpoint; zeros for None."""
    shadow = copy.deepcopy(net)
    for to, p in zip(shadow.parameters(), net.parameters(), strict=True):
        to.data = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return unstacked_state_dict(shadow)


@each_backend
@pytest.mark.parametrize("storage", ["approx", "tabular"])
@pytest.mark.parametrize("algo", [algo for algo in LEARNING if algo != "RELAX"])
def test_networks_learn_the_same(algo: str, storage: str, backend: str) -> None:
    apart = network(algo, storage, False)
    scatter_tables(apart)
    together = network(algo, storage, True)
    together.load_state_dict(apart.state_dict(), strict=True)
    assert sum(p.numel() for p in together.parameters()) == sum(p.numel() for p in apart.parameters())
    assert len(list(together.parameters())) < len(list(apart.parameters())) / 2
    x, y = torch.randn(20, F, dtype=torch.float64), torch.randint(F, (20,))
    agents, forced = torch.randint(2, (20,)), torch.randint(K - 1, (2, 20))  # an agent and a module without samples
    results = []
    for net in (apart, together):
        for layer in net["decisions"]:
            layer._uniform = lambda *shape, like: torch.full(shape, 0.3, dtype=like.dtype)
        with use_backend(backend):
            out, meta, _ = play(net["decisions"], net["selections"], x, agents=agents, forced=forced)
            losses = Loss(nn.CrossEntropyLoss(), NegLossReward())(out, meta, y)
            sum(losses).backward()
        results.append({"y": out.detach(), **gradients_by_module(net)})
    for name, expected in results[0].items():
        assert_same(results[1][name], expected, name)


def test_hidden_layers_and_critics() -> None:
    for algo in ("ActorCritic", "AAC", "WPL"):
        apart, together = network(algo, "approx", False, (5,)), network(algo, "approx", True, (5,))
        together.load_state_dict(apart.state_dict())
        x, agents = torch.randn(9, F, dtype=torch.float64), torch.arange(9) % 3
        forced = torch.zeros(2, 9, dtype=torch.int64)
        made = [play(n["decisions"], n["selections"], x, agents=agents, forced=forced) for n in (apart, together)]
        for a, b in zip(made[0][1].records, made[1][1].records, strict=True):
            assert_same(b.states(), a.states())


def test_masks_drops_and_single_choices() -> None:
    select = Selection(*modules("mlp"), stacked=True, dropped="identity")
    x = torch.randn(5, F, dtype=torch.float64)
    y, _, _ = select(x, start(x), torch.tensor([0, 1, -1, 3, 2]), torch.tensor([True, True, True, False, True]))
    assert torch.equal(y[2:4], x[2:4])
    assert_same(y[1], select._submodules[1](x[1]))
    mixed, _, _ = select(x, start(x), torch.tensor([[0, 1]] * 5), weights=torch.tensor([[0.25, 0.75]] * 5))
    assert_same(mixed, 0.25 * select._submodules[0](x) + 0.75 * select._submodules[1](x))
    single = Selection(nn.Linear(F, F), stacked=True)
    assert list(single.state_dict()) == ["_submodules.0.weight", "_submodules.0.bias"]


def test_relax_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match=r"^stacked: RELAX differentiates"):
        RELAX(K, F, num_agents=2, stacked=True)


@pytest.mark.long
def test_optimizers_compile_and_copies() -> None:
    """One graph whatever K is; a deep copy trains on its own."""
    net = network("REINFORCE", "approx", True)
    twin = copy.deepcopy(net)
    x, y, agents = torch.randn(12, F, dtype=torch.float64), torch.randint(F, (12,)), torch.arange(12) % 3
    forced = torch.randint(K, (2, 12))
    losses = Loss(nn.CrossEntropyLoss(), NegLossReward())

    def loss_of(net: nn.ModuleDict) -> Tensor:
        out, meta, _ = play(net["decisions"], net["selections"], x, agents=agents, forced=forced)
        made: Tensor = sum(losses(out, meta, y))
        return made

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for which in (net, twin):
        optimizer = torch.optim.Adam(which.parameters(), 1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            (compiled if which is net else loss_of)(which).backward()
            optimizer.step()
    for name, t in net.state_dict().items():
        assert_same(t, twin.state_dict()[name], name)


def test_a_layer_in_two_places_stays_the_stacks_own() -> None:
    """Called, as for its hook, a module has a stack's parameters for the time of the call."""
    seeds.manual_seed(0)
    layers = [nn.Linear(F, F, dtype=torch.float64) for _ in range(3)]
    modules = [nn.Sequential(layer, nn.Tanh(), layer) for layer in layers]
    selection = Selection(*copy.deepcopy(modules), stacked=True)
    own = list(selection.parameters())
    selection._submodules.pattern[1].register_forward_hook(lambda m, given, y: 2 * y)  # type: ignore[union-attr]
    x, actions = torch.randn(5, F, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    for _ in range(2):
        y, _, _ = selection(x, start(x), actions)
        expected = torch.stack([layers[a](2 * layers[a](row).tanh()) for a, row in zip(actions, x, strict=True)])
        assert_same(y, expected)
        assert all(p is q for p, q in zip(selection.parameters(), own, strict=True))
    for p, name in zip(own, ("weight", "bias"), strict=True):
        made = torch.autograd.grad(expected.sum(), [getattr(m, name) for m in layers], retain_graph=True)
        assert_same(torch.autograd.grad(y.sum(), p, retain_graph=True)[0], torch.stack(made))
