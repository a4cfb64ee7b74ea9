"""Upstream's ways to extend: what a user's class overrides is called as upstream calls it, or refused at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute import networks
from fastroute.compat.PytorchRouting.CoreLayers import Initialization, Loss, Selection
from fastroute.compat.PytorchRouting.DecisionLayers import (
    REINFORCE,
    WPL,
    Decision,
    EGreedyAAC,
    GumbelSoftmax,
    QLearning,
)
from fastroute.compat.PytorchRouting.Helpers.MLP import MLP
from fastroute.compat.PytorchRouting.RewardFunctions.Final import NegLossReward
from fastroute.compat.PytorchRouting.RewardFunctions.PerAction import CollaborationReward, ManualReward
from fastroute.compat.PytorchRouting.RewardFunctions.PerAction.PerActionBaseReward import PerActionBaseReward
from tests.helpers import seeds

B, K, W = 7, 3, 4


class Own(Decision):
    """REINFORCE, written by a user of Pytorch-Routing."""

    def _forward(self, xs: Tensor, agent: Any) -> Any:
        policy = self._policy[agent](xs)
        distribution = torch.distributions.Categorical(logits=policy / self._pg_temperature)
        actions = distribution.logits.max(dim=1)[1]
        return xs, actions, self._eval_stochastic_are_exp(actions, distribution.logits), distribution.logits

    def _loss(
        self, is_terminal: Any, state: Any, next_state: Any, action: Any, next_action: Any, reward: Any,
        cum_return: Any, final_reward: Any,
    ) -> Any:  # fmt: skip
        return -state[:, :, 0].gather(index=action.unsqueeze(1), dim=1).view(-1) * cum_return.detach()


def net(make: Any, layers: int = 2, mask: Tensor | None = None, formula: str = "upstream", **options: Any) -> Any:
    """Two routed layers on the same weights; their loss, gradients and trajectory."""
    seeds.manual_seed(3)
    x, y = torch.randn(B, W), torch.randint(W, (B,))
    decisions = [make(K, W, **options).eval() for _ in range(layers)]
    selections = [Selection(*[nn.Linear(W, W) for _ in range(K)]) for _ in range(layers)]
    agents = torch.arange(B) % decisions[0]._num_agents
    xs, mxs, _ = Initialization()(x)
    for decide, select in zip(decisions, selections, strict=True):
        xs, mxs, actions = decide(xs, mxs, agents, mask=mask)
        xs, mxs, _ = select(xs, mxs, actions)
    module, routing = Loss(nn.CrossEntropyLoss(), NegLossReward(), formula=formula)(xs, mxs, y, None, False)  # type: ignore[arg-type]
    (module.mean() + routing.mean()).backward()
    grads = [p.grad for layer in (*decisions, *selections) for p in layer.parameters()]
    return routing.detach(), grads, mxs


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a[0], b[0])
    assert len(a[1]) == len(b[1]) and any(g is not None for g in a[1])
    for x, y in zip(a[1], b[1], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y)


SOME = torch.tensor([1, 0, 1, 1, 0, 1, 1])


@pytest.mark.parametrize("mask", [None, SOME], ids=["all", "masked"])
@pytest.mark.parametrize("options", [{}, {"num_agents": 3}, {"policy_storage_type": "tabular", "num_agents": 2}])
def test_a_decision_of_ones_own(options: dict[str, Any], mask: Tensor | None) -> None:
    """A subclass of Decision itself is upstream's REINFORCE when it does what that does."""
    mine, theirs = net(Own, mask=mask, **options), net(REINFORCE, mask=mask, **options)
    assert torch.equal(mine[2].actions, theirs[2].actions)
    for a, b in zip(mine[2], theirs[2], strict=True):
        for mine_step, their_step in zip(a.steps, b.steps, strict=True):
            torch.testing.assert_close(mine_step["states"], their_step["states"])
    assert_same(mine, theirs)


def test_agents_are_asked_one_by_one() -> None:
    calls: list[tuple[int, int]] = []

    class Watched(REINFORCE):
        def _forward(self, xs: Tensor, agent: Any) -> Any:
            calls.append((int(agent), len(xs)))
            return super()._forward(xs, agent)

    assert_same(net(Watched, num_agents=3, layers=1), net(REINFORCE, num_agents=3, layers=1))
    assert calls == [(0, 3), (1, 2), (2, 2)]
    calls.clear()
    net(Watched, num_agents=3, layers=1, mask=torch.tensor([1, 0, 0, 1, 0, 0, 1]))
    assert calls == [(0, 3)]


@pytest.mark.parametrize("algo", [REINFORCE, QLearning, WPL, EGreedyAAC])
@pytest.mark.parametrize("formula", ["upstream", "intended"])
def test_a_loss_of_ones_own(algo: Any, formula: str) -> None:
    """Whether the decisions' formulas are upstream's or not."""

    class Tripled(algo):
        def _loss(self, *args: Any) -> Any:
            return 3 * super()._loss(*args)

    class Static(Tripled):  # a mixin's, an object's and a static one are called as well
        @staticmethod
        def _loss(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:  # type: ignore[override]
            return torch.zeros_like(h)

    if algo is not WPL and not (algo is EGreedyAAC and formula == "intended"):
        one, three = net(algo, formula=formula), net(Tripled, formula=formula)
        torch.testing.assert_close(3 * one[0], three[0])
        assert one[0].abs().sum() > 0
    assert not net(Static, formula=formula)[0].any()


def test_what_is_called_is_looked_up_when_it_is_called() -> None:
    class Mixin:
        def _loss(self, *args: Any) -> Any:
            return args[-1] * 0 + 5

    class Mixed(Mixin, WPL):  # type: ignore[misc]
        pass

    def given(*args: Any, **options: Any) -> Any:
        made = WPL(*args, formula="intended", **options)
        made._loss = lambda *args: args[-1] * 0 + 5
        return made

    for make in (Mixed, given):
        for formula in ("upstream", "intended"):
            assert net(make, layers=2, formula=formula)[0].tolist() == [10.0] * B


def test_the_arguments_are_upstreams() -> None:
    """Entries of a sample side by side, those of samples that were masked out left out; what is next; the end."""
    seen: list[tuple[Tensor, ...]] = []

    class Looking(Own):
        def _loss(self, *args: Any) -> Any:
            seen.append(args)
            return super()._loss(*args)

    seeds.manual_seed(0)
    decide = Looking(K, W, num_agents=1, additional_reward_func=ManualReward([0.1, 0.2, 0.3])).eval()
    x = torch.randn(3, W)
    xs, mxs, _ = Initialization()(x)
    masks = [torch.tensor(m) for m in ([1, 1, 1], [1, 0, 1], [0, 1, 1])]
    for mask in masks:
        xs, mxs, _ = decide(xs, mxs, mask=mask)
    f = torch.tensor([-1.0, -2.0, -4.0])
    Loss(None, NegLossReward(), normalize_per_action_rewards=False)(xs, mxs, external_losses=-f)
    ((terminal, state, following, action, next_action, reward, cum_return, final),) = seen
    steps = [(b, t) for b in range(3) for t in range(3) if masks[t][b]]
    assert len(state) == len(steps) == 7
    z = decide._policy[0](x).log_softmax(1)
    best = z.argmax(1)
    own = torch.tensor([0.1, 0.2, 0.3])[best]
    for i, (b, t) in enumerate(steps):
        last = t == max(s for c, s in steps if c == b)
        count, left = (sum(c == b for c, _ in steps), sum(c == b and s >= t for c, s in steps))
        assert bool(terminal[i]) == last and action[i] == best[b] and final[i] == f[b]
        torch.testing.assert_close(state[i, :, 0], z[b])
        assert not state[i, :, 1:].any() and torch.equal(following[i], state[i])  # the same state at every step
        assert next_action[i] == (0 if last else best[b])
        torch.testing.assert_close(reward[i], own[b] / count + (f[b] if last else 0))
        torch.testing.assert_close(cum_return[i], left * own[b] / count + f[b])
    assert following.requires_grad and not final.requires_grad


def test_a_change_of_k_ends_it() -> None:
    seen: list[tuple[Tensor, ...]] = []

    class Looking(Own):
        def _loss(self, *args: Any) -> Any:
            seen.append(args)
            return args[-1]

    xs, mxs, _ = Initialization()(torch.randn(3, W))
    for choices, mask in ((2, None), (3, SOME[:3]), (3, None)):
        xs, mxs, _ = Looking(choices, W)(xs, mxs, mask=mask)
    Loss(None, NegLossReward())(xs, mxs, external_losses=torch.ones(3))
    assert [args[0].tolist() for args in seen] == [[True] * 3, [False, False], [True] * 3]
    assert [args[2].shape[1] for args in seen] == [2, 3, 3]


def test_other_batches_than_the_given_one() -> None:
    """``_forward`` may change what passes on, and states may have any number of columns."""

    class Scaling(REINFORCE):
        def _forward(self, xs: Tensor, agent: Any) -> Any:
            _, actions, explored, state = super()._forward(xs, agent)
            return xs * (int(agent) + 2), actions, explored, torch.cat([state, state[:, :, :1].expand(-1, -1, 6)], 2)

    decide = Scaling(K, W, num_agents=2)
    x = torch.randn(B, W)
    agents = torch.arange(B) % 2
    y, meta, _ = decide(x, Initialization()(x)[1], agents)
    assert torch.equal(y, x * (agents + 2)[:, None]) and meta[0].steps[0]["states"].shape == (1, K, 7)
    forced = torch.zeros(B, dtype=torch.int64)
    assert torch.equal(decide(x, Initialization()(x)[1], agents, forced_actions=forced)[2], forced)


def test_further_networks() -> None:
    class WithCritic(REINFORCE):
        def __init__(self, *args: Any, value_net: Any = None, **kwargs: Any) -> None:
            Decision.__init__(self, *args, **kwargs)
            self._temperature = 1.0
            self._value_mem = self._construct_policy_storage(1, self._pol_type, value_net, self._pol_hidden_dims)

        def _forward(self, xs: Tensor, agent: Any) -> Any:
            ys, actions, explored, state = super()._forward(xs, agent)
            value = self._value_mem[agent](xs).expand(-1, K)
            return ys, actions, explored, torch.cat([state, value.unsqueeze(2)], 2)

        def _loss(self, *args: Any) -> Any:
            return F.mse_loss(args[1][:, 0, 1], args[6], reduction="none")

    assert list(WithCritic(K, W, num_agents=2, approx_hidden_dims=(5,)).state_dict())[4:6] == [
        "_policy.1._approx._layers.0.weight",
        "_policy.1._approx._layers.0.bias",
    ]
    routing, grads, _ = net(WithCritic, num_agents=2)
    assert routing.abs().sum() > 0 and sum(g is not None for g in grads) >= 4


class Square(nn.Module):
    """A storage of the user's own."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(width, out))

    def forward(self, xs: Tensor) -> Tensor:
        return xs.detach().square() @ self.W


def test_storages_of_ones_own() -> None:
    """What makes them is asked for the policies and for the critics; a flag of one's own goes with a _forward."""

    class Squared(WPL):
        def _construct_policy_storage(
            self,
            out_dim: int,
            policy_storage_type: Any,
            approx_module: Any,
            approx_hidden_dims: Any,
            in_dim: Any = None,
        ) -> Any:
            return nn.ModuleList(Square(self._in_features, out_dim) for _ in range(self._num_agents))

    decide = Squared(K, W, num_agents=2).eval()
    assert list(decide.state_dict()) == ["_policy.0.W", "_policy.1.W", "_qvalue_mem.0.W", "_qvalue_mem.1.W"]
    x, agents = torch.randn(B, W), torch.arange(B) % 2
    actions = decide(x, Initialization()(x)[1], agents)[2]
    z = torch.stack([x.square() @ decide._policy[b].W for b in (0, 1)])[agents, torch.arange(B)]
    assert torch.equal(actions, z.argmax(1))

    class Flagged(Own):
        @staticmethod
        def _eval_stochastic_are_exp(actions: Tensor, dist: Tensor) -> Tensor:
            return torch.zeros_like(actions)

    _, meta, _ = Flagged(K, W)(x, Initialization()(x)[1])
    assert not meta.exploratory.any()


# ------------------------------------------------------------------------------------------------ refused when made


def define(base: Any, **methods: Any) -> None:
    type("Mine", (base,), methods)


def of(self: Any, *args: Any) -> None: ...


@pytest.mark.parametrize(
    ("base", "methods", "message"),
    [
        (REINFORCE, {"_eval_stochastic_are_exp": of}, r"Mine\._eval_stochastic_are_exp: .*_forward is not overridden"),
        (
            networks.REINFORCE,
            {"_loss": of},
            r"Mine\._loss: .*nobody calls here; override loss_of, or make the class from f",
        ),
        (networks.Decision, {"_forward": of}, r"Mine\._forward: expected no override of a method that nobody calls"),
        (networks.WPL, {"loss_func": of}, r"Mine\.loss_func: expected no override of a method that nobody calls"),
        (Loss, {"_get_rl_loss_tuple_map": of}, r"Mine\._get_rl_loss_tuple_map: .*would change nothing"),
        (REINFORCE, {"_storages": of}, r"Mine\._storages: expected another name, fastroute needs this one itself"),
        (NegLossReward, {"_options": of}, r"Mine\._options: expected another name, .*; so it does _option"),
        (REINFORCE, {"_loss": lambda self, sample: 0}, r"Mine\._loss: expected to be called with \(self, is_terminal"),
        (REINFORCE, {"_loss": staticmethod(lambda sample: 0)}, r"Mine\._loss: expected to be called with \(is_term"),
        (WPL, {"_forward": lambda self, xs, mxs, agent: 0}, r"Mine\._forward: expected to be called with \(self, xs"),
    ],
)
def test_overrides_that_nobody_would_call(base: Any, methods: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        define(base, **methods)


def test_results_of_a_wrong_kind() -> None:
    x = torch.randn(B, W)
    for result, error, message in (
        (lambda xs: (xs, xs), TypeError, r"_forward: expected \(ys, actions, are_exploratory, states\), got 2 results"),
        (lambda xs: (xs, xs.argmax(1), None, xs), ValueError, rf"states: expected \[{B}, {K}\] or .*got \[{B}, {W}\]"),
    ):
        made = REINFORCE(K, W)
        made._forward = lambda xs, agent, result=result: result(xs)  # type: ignore[method-assign]
        with pytest.raises(error, match=message):
            made(x, Initialization()(x)[1])
    with pytest.raises(ValueError, match=rf"_loss: expected one loss per entry, \[{B}\], got \[\]"):
        made = REINFORCE(K, W)
        made._loss = lambda *args: torch.zeros(())  # type: ignore[method-assign]
        xs, mxs, _ = made(x, Initialization()(x)[1])
        Loss(None, NegLossReward())(xs, mxs, external_losses=torch.ones(B))
    for hook, make in (("_forward", Decision), ("_loss", type("Half", (Decision,), {"_forward": Own._forward}))):
        with pytest.raises(NotImplementedError, match=rf"expected it to define {hook}\(self|defines no loss"):
            xs, mxs, _ = make(K, W)(x, Initialization()(x)[1])
            Loss(None, NegLossReward())(xs, mxs, external_losses=torch.ones(B))


# ---------------------------------------------------------------------------------------------------------- rewards


def rewarded(reward: Any, batches: int = 1) -> Tensor:
    seeds.manual_seed(1)
    decide = REINFORCE(K, W, additional_reward_func=reward)
    for _ in range(batches):
        x = torch.randn(B, W)
        xs, mxs, _ = decide(x, Initialization()(x)[1], mask=SOME)
    Loss(None, NegLossReward(), normalize_per_action_rewards=False)(xs, mxs, external_losses=torch.zeros(B))
    return mxs


def test_histories_of_rewards() -> None:
    """As upstream's own rewards read them: the last so many actions and states, before any reward is asked for."""
    asked: list[Any] = []

    class Often(PerActionBaseReward):
        def __init__(self, *args: Any) -> None:
            PerActionBaseReward.__init__(self, *args)

        def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
            count = torch.zeros(len(self._actions), K)
            count = count.scatter(1, torch.stack(list(self._actions), 0).unsqueeze(1), 1.0)
            self._precomp = torch.sum(count, dim=0) / len(self._actions)
            asked.append((dist.shape, len(self._actions), len(self._dists), torch.cat(list(self._dists)).shape))
            return self._precomp[action]

    mxs = rewarded(Often(), 2)
    assert asked == [((1, K, 5), 10, 10, (10, K, 5))] * 5
    asked.clear()
    reward = Often(8)
    rewarded(reward, 2)
    assert [found[1] for found in asked] == [8] * 5 and reward._hist_len == 8
    assert [int(a) for a in list(reward._actions)[-5:]] == mxs.actions[0][SOME.bool()].tolist()
    assert not reward._dists[0].requires_grad
    reward.clear()
    assert not reward._actions and not reward._dists and reward._precomp is None


class Halved(CollaborationReward):
    calls = 0

    def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
        Halved.calls += 1
        share = sum(int(a) == int(action) for a in self._actions) / len(self._actions)
        assert self._num_actions == K and self._reward_ratio == 0.5
        return torch.tensor([share / 2])


class Deaf(CollaborationReward):
    def register(self, dist: Tensor, action: Tensor) -> None:
        if int(action) == 0:
            super().register(dist, action)


def test_subclasses_of_upstreams_rewards() -> None:
    """Whatever they override is called, and what it calls of the base is there."""
    for formula in ("upstream", "intended"):
        reward = Halved(0.5, K, formula=formula)  # type: ignore[arg-type]
        Halved.calls = 0
        rewarded(reward)
        assert Halved.calls == 5 and len(reward._actions) == 5
    deaf = Deaf(0.5, K)
    rewarded(deaf, 3)
    assert set(map(int, deaf._actions)) <= {0} and set(deaf.history.tolist()) <= {0, -1}
    assert not CollaborationReward(0.5, K)._actions


@pytest.mark.parametrize("family", [networks.NegLossReward, NegLossReward])
def test_final_rewards_of_ones_own(family: Any) -> None:
    class Doubled(family):  # type: ignore[misc]
        def forward(self, loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
            return -2 * loss

    x = torch.randn(B, W)
    xs, mxs, _ = REINFORCE(K, W)(x, Initialization()(x)[1])
    Loss(None, Doubled())(xs, mxs, external_losses=torch.ones(B))
    assert mxs.final_reward.tolist() == [-2.0] * B


# ------------------------------------------------------------------------------------------------------ small things


def test_no_loss_function() -> None:
    x = torch.randn(B, W)
    xs, mxs, _ = GumbelSoftmax(K, W)(x, Initialization()(x)[1])
    losses = torch.rand(B, 2)
    assert torch.equal(Loss(None, NegLossReward())(xs, mxs, external_losses=losses, reduce=False)[0], losses.sum(1))
    with pytest.raises(ValueError, match="pytorch_loss_func: expected a loss, got None; with None every call needs"):
        Loss(None, NegLossReward())(xs, mxs, torch.zeros(B, W))


def test_the_readmes_mlp() -> None:
    seeds.manual_seed(0)
    a = MLP(W, K, hidden=(6, 5))
    seeds.manual_seed(0)
    b = MLP(W, K, (6, 5))
    x = torch.randn(2, W)
    assert torch.equal(a(x), b(x)) and len(a._layers) == 3
    with pytest.raises(TypeError, match="MLP: expected layers or hidden, got both"):
        MLP(W, K, (6,), hidden=(6,))


@pytest.mark.parametrize("formula", ["upstream", "intended"])
@pytest.mark.long_after(1)
def test_a_step_without_overrides_is_one_graph(formula: Any) -> None:
    """The hooks cost a compiled step nothing."""
    seeds.manual_seed(0)
    decide = REINFORCE(K, W, formula=formula).eval()
    select = Selection(*[nn.Linear(W, W) for _ in range(K)], unused_grad="zeros")
    loss = Loss(nn.CrossEntropyLoss(), NegLossReward(), formula=formula)

    def step(x: Tensor, y: Tensor) -> Tensor:
        xs, mxs, actions = decide(*Initialization()(x)[:2])
        xs, mxs, _ = select(xs, mxs, actions)
        return sum(loss(xs, mxs, y))  # type: ignore[return-value]

    x, y = torch.randn(B, W), torch.arange(B) % W
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(x, y), step(x, y))
