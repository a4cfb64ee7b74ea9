"""What every decision has in common: shapes, dtypes, state columns, draws, flags, replays, agents, masks.

Axes: B samples, K choices, A agents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats  # comes with scikit-learn
from torch import Tensor, nn

from fastroute import networks, use_backend
from fastroute.networks import MLP, Loss, NegLossReward, PassThrough, PerTaskAssignment
from tests.helpers import seeds
from tests.helpers.backends import each_backend
from tests.helpers.networks import FORMULAS, LEARNING, F, columns, decision, gradients, linears, scatter_tables, start
from tests.helpers.opcheck import assert_same

F64 = torch.float64
B, K = 24, 4
STORAGES: dict[str, dict[str, Any]] = {
    "approx": {},
    "hidden": {"approx_hidden_dims": (7, 5)},
    "tabular": {"policy_storage_type": "tabular"},
    "policy-net": {"policy_net": nn.Sequential(nn.Linear(F, 5), nn.Tanh(), nn.Linear(5, K))},
}
each_class = pytest.mark.parametrize("algo", LEARNING)
each_formula = pytest.mark.parametrize("formula", FORMULAS)
each_storage = pytest.mark.parametrize("storage", STORAGES)
SHIFT, CLAMP = 1e-6, 2.0**-23


def made(algo: str, storage: str, A: int, formula: str, train: bool = True, **options: Any) -> Any:
    seeds.manual_seed(0)
    layer = decision(algo, K, A, formula=formula, **STORAGES[storage], **options).double()
    scatter_tables(layer)
    return layer.train(train)


def batch(A: int = 1) -> tuple[Tensor, Tensor]:
    generator = seeds.generator(5)
    return torch.randn(B, F, generator=generator, dtype=F64), torch.randint(A, (B,), generator=generator)


def scores(layer: Any, x: Tensor, agents: Tensor, which: str = "_policy") -> Tensor:
    """Sample by sample from its agent's storage."""
    return torch.cat([getattr(layer, which)[int(a)](x[b : b + 1]) for b, a in enumerate(agents)])


def columns_of(layer: Any, algo: str, x: Tensor, agents: Tensor, formula: str, train: bool) -> list[Tensor]:
    """The state's columns [B, K], from the table in the classes' docstrings. (RELAX's are tested with its loss.)"""
    z = scores(layer, x, agents)
    log_p = (z / getattr(layer, "_temperature", 1.0)).log_softmax(1) if algo != "WPL" else None
    if algo == "WPL":
        weight = z - z.min(1, keepdim=True).values + SHIFT
        log_p = (weight / weight.sum(1, keepdim=True)).clamp(CLAMP, 1 - CLAMP).log()
    first = z if algo in ("QLearning", "SARSA", "GumbelSoftmax", "RELAX") or "Learning" in algo else log_p
    assert first is not None
    found = [first]
    if "EGreedy" in algo:
        assert log_p is not None
        p, e = log_p.exp(), layer._exploration
        found.append(p)
        top = torch.eye(K, dtype=F64)[p.argmax(1)]
        if not train:
            found.append(p)
        elif formula == "intended":
            found.append(e * p + (1 - e) * top)
        else:
            rest = p / (1 - log_p.max(1, keepdim=True).values) * e / (K - 1)
            found.append(torch.where(top > 0, 1 - e, rest))
    for which in ("_value_mem", "_qvalue_mem"):
        if hasattr(layer, which) and algo != "RELAX":
            found.append(scores(layer, x, agents, which).expand(-1, K))
    if algo == "WPL" and formula == "intended":  # the policy's mean value
        mean = (weight * found[1]).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        found.append(mean.expand(-1, K))
    return found


#: Of a decision, the formula changes mu alone.
RECORDED = [(algo, formula) for algo in LEARNING for formula in FORMULAS if formula == "intended" or "EGreedy" in algo]


@each_backend
@pytest.mark.parametrize("algo, formula", RECORDED)
@each_storage
@pytest.mark.parametrize("A", [1, 3])
def test_what_is_recorded(algo: str, storage: str, A: int, formula: str, backend: str) -> None:
    x, agents = batch(A)
    mask = torch.arange(B) % 4 > 0
    for train in (True, False):
        layer = made(algo, storage, A, formula, train, exploration=0.4)
        for active in (None, mask):
            with use_backend(backend):
                y, meta, actions = layer(x, start(x), agents if A > 1 else None, active)
            here = torch.ones(B, dtype=torch.bool) if active is None else active
            assert torch.equal(y, x) if algo != "GumbelSoftmax" else torch.allclose(y, x, rtol=1e-15)
            assert actions.dtype == torch.int64 and actions.shape == (B,) and actions.is_contiguous()
            assert ((actions >= 0) & (actions < K)).all() and not actions[~here].any()
            (record,) = meta.records
            assert record.choices == K and torch.equal(meta.active[0], here)
            states = record.states()
            assert states.shape == (B, K, 5) and states.dtype == F64
            expected = columns_of(layer, algo, x, agents, formula, train)
            if algo != "RELAX":
                assert len(expected) == columns(algo, formula)
            for i, column in enumerate(expected):
                assert_same(states[here][:, :, i].detach(), column[here].detach(), f"column {i}")
            if algo != "RELAX" or not train:
                assert not states[:, :, columns(algo, formula) :].any()
            if not train:
                best = scores(layer, x, agents).argmax(1)
                assert torch.equal(actions[here], best[here])


@each_class
def test_dtypes(algo: str) -> None:
    """float32, float64, bfloat16, and autocast; the loss trains in each."""
    for dtype, autocast in ((torch.float32, False), (F64, False), (torch.bfloat16, False), (torch.float32, True)):
        seeds.manual_seed(0)
        layer = decision(algo, K, 2, approx_hidden_dims=(5,), detach=False, dtype=dtype)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        x = torch.randn(B, F, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y, meta, _ = layer(x, start(x), torch.arange(B) % 2)
            loss = Loss(nn.MSELoss(), NegLossReward())
            module_loss, routing_loss = loss(y, meta, torch.zeros_like(y))
        assert y.dtype == dtype
        (module_loss + routing_loss).float().backward()
        grads = gradients(layer)
        assert all(g is not None and g.dtype == dtype and g.isfinite().all() for g in grads.values())


# ------------------------------------------------------------------------------------------------------------- draws


def likelihoods(layer: Any, algo: str, z: Tensor) -> Tensor:
    """[K]: how often each action is taken in training, from the table of the classes."""
    greedy, e = torch.eye(K, dtype=F64)[int(z.argmax())], layer._exploration
    if algo in ("QLearning", "SARSA") or "AdvantageLearning" in algo or algo == "SurpriseLearning":
        return e / K + (1 - e) * greedy
    if "EGreedy" in algo:
        return e * z.softmax(0) + (1 - e) * greedy
    if algo == "WPL":
        weight = z - z.min() + SHIFT
        return weight / weight.sum()
    tempered = algo in ("REINFORCE", "ActorCritic")  # the draw of Gumbel and RELAX does not depend on it
    return (z / layer._temperature if tempered else z).softmax(0)


@each_class
@each_formula
def test_actions_have_their_frequencies(algo: str, formula: str) -> None:
    """A chi-square test of 20,000 draws; a right sampler fails it once in a million seeds."""
    N = 20_000
    layer = made(algo, "tabular" if algo != "RELAX" else "approx", 1, formula, exploration=0.4)
    x = torch.randn(1, F, dtype=F64).expand(N, F)
    _, _, actions = layer(x, start(x))
    z = layer._policy[0](x[:1])[0].detach()
    expected = N * likelihoods(layer, algo, z)
    counts = torch.bincount(actions, minlength=K).double()
    likely = expected > 5
    assert counts[~likely].sum() <= 8
    chi2 = float(((counts - expected).square() / expected)[likely].sum())
    assert stats.chi2.sf(chi2, max(int(likely.sum()) - 1, 1)) > 1e-6, (counts, expected)


@each_class
def test_reproducible(algo: str) -> None:
    """By torch.manual_seed, and by a generator of one's own, which leaves PyTorch's alone."""
    x, _ = batch()
    seen = []
    for way in range(4):
        layer = made(algo, "approx", 1, "intended", exploration=1.0)
        if way > 1:
            layer.generator = seeds.generator(7)
        seeds.manual_seed(3 if way < 2 else way)
        before = torch.get_rng_state()
        seen.append([layer(x, start(x))[2].tolist() for _ in range(3)])
        assert torch.equal(torch.get_rng_state(), before) == (way > 1)
    assert seen[0] == seen[1] and seen[2] == seen[3] and seen[0] != seen[2] and seen[0][0] != seen[0][1]


@each_class
@each_formula
def test_exploratory_flags(algo: str, formula: str) -> None:
    """Intended: the action is not the greedy one; of the value-based classes, the coin said so (never in eval)."""
    layer = made(algo, "approx", 1, formula, exploration=0.5)
    x, agents = batch()
    valued = algo in ("QLearning", "SARSA", "SurpriseLearning") or "AdvantageLearning" in algo
    for train in (True, False):
        layer.train(train)
        _, meta, actions = layer(x, start(x))
        flags, greedy = meta.exploratory[0], scores(layer, x, agents).argmax(1) == actions
        if valued:
            assert not flags[~greedy].logical_not().any()
            assert flags.any() == (train or formula == "upstream") and not flags.all()
        elif formula == "intended":
            assert torch.equal(flags, ~greedy)
        elif algo not in ("GumbelSoftmax", "RELAX") or train:  # upstream's flag says the opposite
            assert torch.equal(flags, greedy)
        assert flags.dtype == torch.bool and [int(s.steps[0]["is_exploratory"]) for s in meta] == flags.int().tolist()


@each_class
@each_formula
@pytest.mark.parametrize("masked", [False, True])
def test_replays(algo: str, formula: str, masked: bool) -> None:
    """The actions of a run, forced, give its losses and gradients again; those of a trajectory, too, with its -1."""
    layer = made(algo, "hidden", 3, formula, exploration=0.4)
    x, agents = batch(3)
    mask = torch.arange(B) % 5 > 1 if masked else None
    results: list[Any] = []
    recorded = None
    for way in range(3):
        seeds.manual_seed(0)  # Gumbel and RELAX also draw what is not the action
        forced = {} if way == 0 else {"forced_actions": results[0][0].int().tolist() if way == 1 else recorded}
        y, meta, actions = layer(x, start(x), agents, mask, **forced)
        recorded = meta.actions[0]
        loss = Loss(nn.MSELoss(), NegLossReward())(y, meta, torch.zeros_like(y), reduce=False)
        layer.zero_grad()
        total = sum(part.sum() for part in loss)
        total.backward()
        results.append((actions, *(t.detach() for t in loss), *[g for g in gradients(layer).values() if g is not None]))
    for again in results[1:]:
        for got, expected in zip(again, results[0], strict=True):
            assert torch.equal(got, expected)


# ---------------------------------------------------------------------------------------------- exploration


@each_formula
def test_set_exploration(formula: str) -> None:
    def told(algo: str, e: float, **options: Any) -> Any:
        layer: Any = decision(algo, K, formula=formula, **options)
        layer.set_exploration(e)
        return layer

    for algo in ("REINFORCE", "ActorCritic", "WPL"):  # a temperature, where it was asked for
        assert told(algo, 0.3)._temperature == 1.0
        assert told(algo, 0.3, set_pg_temp=True)._temperature == pytest.approx(0.1 + 9.9 * 0.3)
    for algo in ("QLearning", "SARSA", "AdvantageLearning", "EGreedyAAC", "AAC", "REINFORCEBl1"):
        assert told(algo, 0.3)._exploration == 0.3
    assert told("EGreedyREINFORCE", 0.3)._exploration == pytest.approx(0.9 if formula == "upstream" else 0.3)
    assert told("EGreedyREINFORCE", 0.5)._exploration == (1.0 if formula == "upstream" else 0.5)
    gumbel: Any = decision("GumbelSoftmax", exploration=0.2)
    assert gumbel._temperature == pytest.approx(0.1 + 9.9 * 0.2)
    assert told("GumbelSoftmax", 1.0)._temperature == pytest.approx(10.0)
    relax: Any = decision("RELAX", exploration=0.2)
    assert relax._temperature == 0.5 and told("RELAX", 0.0)._temperature == pytest.approx(0.1)


@each_class
@each_formula
def test_exploration_is_what_set_exploration_sets(algo: str, formula: str) -> None:
    """The attribute, too, which is no other one beside it."""
    called, assigned = (decision(algo, K, formula=formula, exploration=0.4, set_pg_temp=True) for _ in range(2))
    called.set_exploration(0.2)
    assigned.exploration = 0.2
    assert _explores(assigned) == _explores(called) != _explores(decision(algo, K, formula=formula, set_pg_temp=True))
    factor = 3 if (algo, formula) == ("EGreedyREINFORCE", "upstream") else 1
    assert assigned.exploration == pytest.approx(0.2 * factor)
    with pytest.raises(ValueError, match="exploration: expected a number from 0 to 1"):
        assigned.exploration = 1.5


def _explores(layer: Any) -> tuple[float, float | None]:
    return layer._exploration, getattr(layer, "_temperature", None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_gumbel_softmax_gives_the_batch_in_value(dtype: torch.dtype, masked: bool) -> None:
    seeds.manual_seed(0)
    x = (torch.randn(500, F) * 1000).to(dtype)
    layer = decision("GumbelSoftmax", K, policy_storage_type="tabular")
    mask = torch.arange(500) % 3 > 0 if masked else None
    y, _, _ = layer(x, start(x), None, mask)
    assert y.dtype == dtype and torch.equal(y, x) and y.requires_grad == dtype.is_floating_point


@each_class
@pytest.mark.parametrize("e", [-0.1, 1.5, float("nan")])
def test_exploration_has_a_range(algo: str, e: float) -> None:
    with pytest.raises(ValueError, match="exploration: expected a number from 0 to 1"):
        decision(algo, exploration=e)
    with pytest.raises(ValueError, match="exploration: expected a number from 0 to 1"):
        decision(algo).set_exploration(e)


# ------------------------------------------------------------------------------------------------ inputs of a kind


def test_inputs_of_any_rank() -> None:
    """An MLP sees a sample flattened; upstream's did so for Gumbel-softmax alone."""
    x = torch.randn(5, 2, 3)
    for algo in LEARNING:
        layer = decision(algo, 3, 2)
        y, _, actions = layer(x, start(x), torch.tensor([0, 1, 1, 0, 1]), torch.tensor([1, 1, 1, 0, 1]))
        assert y.shape == x.shape and actions.shape == (5,)
    product = networks.REINFORCE(3, (2, 3))
    assert product(x, start(x))[2].shape == (5,)


def test_detach() -> None:
    for algo in LEARNING:
        for detach in (True, False):
            x = torch.randn(6, F, requires_grad=True)
            layer = decision(algo, 3, 2, detach=detach)
            y, meta, _ = layer(x, start(x), torch.tensor([0, 1, 1, 0, 1, 0]))
            _, routing = Loss(nn.MSELoss(), NegLossReward())(y.detach(), meta, torch.zeros(6, F))
            reached = routing.requires_grad and torch.autograd.grad(routing, x, allow_unused=True)[0] is not None
            assert reached == (not detach and algo != "GumbelSoftmax"), algo


def test_gumbel_softmax_passes_gradients_through_the_batch() -> None:
    seeds.manual_seed(0)
    layer: Any = decision("GumbelSoftmax", 3, dtype=F64)
    x = torch.randn(5, F, dtype=F64)
    u = torch.rand(5, 3, dtype=F64)
    layer._uniform = lambda *shape, like: u
    y, _, actions = layer(x, start(x))
    cotangent = torch.randn(5, F, dtype=F64)
    z = layer._policy[0](x)
    soft = ((z - torch.log(-torch.log(u))) / layer._temperature).softmax(1)
    assert torch.equal(actions, soft.argmax(1))
    expected = (cotangent * x).sum(1) @ soft.gather(1, actions[:, None])[:, 0]
    weights = list(layer.parameters())
    for a, b in zip(torch.autograd.grad(y, weights, cotangent), torch.autograd.grad(expected, weights), strict=True):
        assert_same(a, b)


def test_update_target() -> None:
    x, other = torch.randn(4, F), torch.randn(4, F)
    mask = torch.tensor([1, 0, 1, 0])
    for algo in ("REINFORCE", "GumbelSoftmax"):
        y, _, _ = decision(algo).eval()(x, start(x), None, mask, other)
        assert torch.equal(y, torch.where(mask.bool()[:, None], x, other))
        assert torch.equal(decision(algo).eval()(x, start(x), None, mask)[0], x)


def test_agents_learn_apart() -> None:
    """Only those that were asked have gradients; their samples alone are in them."""
    for algo in LEARNING:
        layer = made(algo, "approx", 3, "intended")
        x, _ = batch()
        y, meta, _ = layer(x, start(x), torch.where(torch.arange(B) < 9, 0, 2))
        module_loss, routing_loss = Loss(nn.MSELoss(), NegLossReward())(y, meta, torch.zeros_like(y))
        (module_loss + routing_loss).backward()
        for name, grad in gradients(layer).items():
            assert (grad is None) == (name.split(".")[1] == "1"), (algo, name)


def test_networks_are_copied_per_agent() -> None:
    net = MLP(F, K, (3,))
    layer = networks.ActorCritic(K, F, 2, policy_net=net)
    stores = [*layer._policy, *layer._qvalue_mem]
    assert len({id(s._approx) for s in stores} | {id(net)}) == 5
    for s in stores:  # the critic's too, where no other is given
        assert all(map(torch.equal, s._approx.parameters(), net.parameters()))
    q = MLP(F, K)
    assert len(networks.WPL(K, F, policy_net=net, qvalue_net=q)._qvalue_mem[0]._approx._layers) == 1


def test_parameters_have_upstreams_names_and_first_values() -> None:
    names = [n for n, _ in decision("AAC", 4, 2, approx_hidden_dims=(5,)).named_parameters()]
    assert names == [
        f"{m}.{a}._approx._layers.{j}.{p}"
        for m in ("_policy", "_value_mem") for a in range(2) for j in range(2) for p in ("weight", "bias")
    ]  # fmt: skip
    table = decision("WPL", 4, 2, policy_storage_type=1)
    assert list(table.state_dict()) == [f"{m}.{a}._approx" for m in ("_policy", "_qvalue_mem") for a in range(2)]
    assert all(torch.equal(t, torch.full((1, 4), 0.25)) for t in table.state_dict().values())
    shapes = {k: tuple(v.shape) for k, v in decision("RELAX", 4).state_dict().items() if k.endswith("weight")}
    assert shapes == {"_policy.0._approx._layers.0.weight": (4, F), "_value_mem.0._approx._layers.0.weight": (1, F + 4)}


@each_class
def test_copies(algo: str) -> None:
    layer = made(algo, "hidden", 3, "intended").eval()
    x, agents = batch(3)
    expected = layer(x, start(x), agents)[2]
    copied, fresh = copy.deepcopy(layer), made(algo, "hidden", 3, "intended").eval()
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    for other in (copied, fresh):
        assert torch.equal(other(x, start(x), agents)[2], expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in layer.parameters()}


# --------------------------------------------------------------------------------------------- those that learn nothing


def test_per_task_assignment_and_pass_through() -> None:
    x, tasks = torch.randn(4, F), [2, 0, 1, 2]
    for given in (tasks, torch.tensor(tasks), torch.tensor(tasks)[:, None], torch.tensor(tasks, dtype=torch.int32)):
        y, meta, actions = PerTaskAssignment()(x, start(x, given), None)
        assert y is x and actions.tolist() == tasks and actions.dtype == torch.int64 and meta.records == []
    assert PassThrough(3, num_agents=2)(x, start(x))[2].tolist() == [0] * 4
    assert PerTaskAssignment()(x, start(x, tasks), None, torch.tensor([1, 0, 1, 0]))[2].tolist() == [2, 0, 1, 0]
    assert PassThrough()(x, start(x), forced_actions=[1, 2, 3, 0])[2].tolist() == [1, 2, 3, 0]
    PerTaskAssignment(7, anything=1).set_exploration(0.5)
    with pytest.raises(ValueError, match="tasks: expected task labels, got none"):
        PerTaskAssignment()(x, start(x))
    with pytest.raises(TypeError, match="tasks: expected integers to choose agents or modules by"):
        PerTaskAssignment()(x, start(x, list("abca")))


# ------------------------------------------------------------------------------------- what rewards have counted

REWARDS: dict[str, Callable[[], Any]] = {
    "history": lambda: networks.CollaborationReward(0.3, history_len=16),
    "average": lambda: networks.RunningAverageCollaborationReward(0.3),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_goes_on_where_a_checkpoint_ended(name: str) -> None:
    def net() -> Any:
        seeds.fixed_seed(0)
        reward = REWARDS[name]()  # one for both
        first, second = (networks.WPL(K, F, additional_reward_func=reward) for _ in range(2))
        return networks.Sequential(first, linears(K), second, linears(K)), reward

    def train(net: Any, seed: int) -> Any:
        seeds.fixed_seed(seed)
        y, meta = net(torch.randn(B, F))
        return networks.Loss(nn.MSELoss(), networks.NegLossReward())(y, meta, torch.zeros(B, F))[1].detach()

    (whole, reward), (resumed, other), (old, none) = net(), net(), net()
    train(whole, 1)
    state = copy.deepcopy(whole.state_dict())
    keys = [key for key in state if "_extra_state" in key]
    assert keys == [f"{i}._extra_state" for i in (1, 3)]
    resumed.load_state_dict(state, strict=True)
    assert torch.equal(getattr(other, name), getattr(reward, name))
    assert torch.equal(train(resumed, 2), train(whole, 2))
    assert torch.equal(getattr(other, name), getattr(reward, name))
    assert not torch.equal(state[keys[0]], getattr(reward, name))  # a copy
    assert state.keys() == net()[0].state_dict().keys()  # also before the first sample
    torch.func.functional_call(whole, dict(state), (torch.randn(B, F),))  # takes extra states, and no other names

    older = {key: t for key, t in state.items() if key not in keys}
    before = getattr(none, name).clone()
    old.load_state_dict(older, strict=True)
    assert torch.equal(getattr(none, name), before)


def test_states_of_other_rewards() -> None:
    saved = networks.WPL(K, F, additional_reward_func=REWARDS["history"]()).state_dict()
    networks.WPL(K, F).load_state_dict(saved, strict=True)
    other = networks.WPL(K, F, additional_reward_func=REWARDS["average"]())
    with pytest.raises(
        RuntimeError, match=r"_extra_state: average: expected shares of \d actions, got a tensor \[\d+\]"
    ):
        other.load_state_dict(saved)
    shorter = networks.CollaborationReward(0.3, history_len=4)
    saved["_extra_state"] = torch.arange(16)
    networks.WPL(K, F, additional_reward_func=shorter).load_state_dict(saved, strict=True)
    assert shorter.history.tolist() == [12, 13, 14, 15]
    longer = networks.CollaborationReward(0.3, history_len=18)
    networks.WPL(K, F, additional_reward_func=longer).load_state_dict(saved, strict=True)
    assert longer.history.tolist() == [-1, -1, *range(16)]
    wrong = networks.WPL(K + 1, F, additional_reward_func=REWARDS["average"]()).state_dict()
    own = networks.WPL(K, F, additional_reward_func=REWARDS["average"]())
    mine = {**own.state_dict(), "_extra_state": wrong["_extra_state"]}
    with pytest.raises(RuntimeError, match=r"_extra_state: average: expected shares of \d actions"):
        own.load_state_dict(mine)
