"""A user's class of Pytorch-Routing has every name to itself that upstream's class does not have."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import networks
from fastroute.compat.PytorchRouting.CoreLayers import Initialization, Loss, Selection
from fastroute.compat.PytorchRouting.DecisionLayers import REINFORCE, RELAX, WPL, Decision, EGreedyAAC, QLearning
from fastroute.compat.PytorchRouting.RewardFunctions.Final import CorrectClassifiedReward, NegLossReward
from fastroute.compat.PytorchRouting.RewardFunctions.Final.BaseReward import BaseReward
from fastroute.compat.PytorchRouting.RewardFunctions.PerAction import (
    CollaborationReward,
    ManualReward,
    RunningAverageCollaborationReward,
)
from fastroute.compat.PytorchRouting.RewardFunctions.PerAction.PerActionBaseReward import PerActionBaseReward
from tests.compat.test_overrides import Own
from tests.helpers import seeds

B, K, W = 7, 3, 4
DECISIONS = [Own, REINFORCE, QLearning, WPL, EGreedyAAC, RELAX]
PER_ACTION = [PerActionBaseReward, CollaborationReward, RunningAverageCollaborationReward, ManualReward]
FINAL = [NegLossReward, CorrectClassifiedReward]
ARGUMENTS: dict[Any, Any] = {
    **dict.fromkeys(DECISIONS, (K, W)), CollaborationReward: (0.5, K), RunningAverageCollaborationReward: (0.5, K),
    ManualReward: ([0.1, 0.2, 0.3],),
}  # fmt: skip


def step(decide: Any = None, final: Any = None) -> list[Tensor]:
    """Two batches through a decision, and what its parameters learn."""
    seeds.manual_seed(1)
    select = Selection(*[nn.Linear(W, W) for _ in range(K)])
    found: list[Tensor] = []
    for _ in range(2):
        xs, mxs, _ = Initialization()(torch.randn(B, W))
        ys, mxs, actions = select(*decide(xs, mxs))
        module, routing = Loss(nn.CrossEntropyLoss(), final or NegLossReward())(ys, mxs, torch.arange(B) % W)
        decide.zero_grad()
        (module + routing).backward()
        found += [actions, module.detach(), routing.detach(), mxs[0].steps[0]["states"].detach(), mxs.final_reward]
    return found + [p.grad for p in decide._policy.parameters() if p.grad is not None]


def made(cls: Any, name: str | None = None, of: str = "", value: Any = None) -> Any:
    """An object of a subclass that has ``name`` for something of its own: in the class, a mixin, or the object."""
    seeds.manual_seed(0)
    mixin: Any = type("Mixin", (), {name: value} if of in ("mixin", "last") else {})
    bases = (cls, mixin) if of == "last" else (mixin, cls)
    one = type("Mine", bases, {name: value} if of == "class" else {})(*ARGUMENTS.get(cls, ()))
    if of == "object":
        setattr(one, name, value)
    return one


def run(one: Any) -> list[Tensor]:
    if isinstance(one, Decision):
        return step(one)
    seeds.manual_seed(0)
    if isinstance(one, BaseReward):
        return step(REINFORCE(K, W), one)
    return step(REINFORCE(K, W, additional_reward_func=one))


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "of", ["class", "object", *(pytest.param(way, marks=pytest.mark.long) for way in ("mixin", "last"))]
)
@pytest.mark.parametrize("cls", [*DECISIONS, *PER_ACTION, *FINAL], ids=lambda cls: cls.__name__)
def test_every_name(cls: Any, of: str) -> None:
    """With any of fastroute's names for something else, a class learns as it does without."""
    expected = run(made(cls))
    names = sorted(cls._fastroute_names - set(cls._fastroute_taken))
    assert {"by_action", "loss", "scaled"} & set(names)
    for name in names:
        one = made(cls, name, of, "mine")
        assert_same(run(one), expected)
        assert getattr(one, name) == "mine", name


@pytest.mark.long
@pytest.mark.parametrize("name", ["by_action", "loss"])
def test_a_compiled_step(name: str) -> None:
    """It is right, with breaks in the graph."""
    torch._dynamo.reset()
    decide, select = made(REINFORCE, name, "object", "mine").eval(), Selection(*[nn.Linear(W, W) for _ in range(K)])
    loss = Loss(nn.CrossEntropyLoss(), NegLossReward())

    def step(x: Tensor, y: Tensor) -> Tensor:
        xs, mxs, _ = select(*decide(*Initialization()(x)[:2]))
        return sum(loss(xs, mxs, y))  # type: ignore[return-value]

    x, y = torch.randn(B, W), torch.arange(B) % W
    torch.testing.assert_close(torch.compile(step, backend="eager")(x, y), step(x, y))
    assert getattr(decide, name) == "mine"


@pytest.mark.parametrize("name", sorted(Own._fastroute_names - set(Own._fastroute_taken)))
def test_modules_parameters_and_buffers(name: str) -> None:
    expected = run(made(Own))
    for value in (nn.Linear(2, 2), nn.Parameter(torch.ones(2))):
        one = made(Own, name, "object", value)
        assert getattr(one, name) is value
        assert_same(run(one), expected)
        assert f"{name}.weight" in one.state_dict() or name in one.state_dict()
    one = made(Own)
    one.register_buffer(name, torch.ones(2))
    assert torch.equal(getattr(one, name), torch.ones(2))


class Critical(Own):
    """As a user writes it, whose names happen to be fastroute's too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.critic = nn.Linear(W, 1)
        self.target = copy.deepcopy(self._policy)
        self.loss = nn.SmoothL1Loss(reduction="none")
        self.lookahead, self.exploration = [], 7.0

    def _loss(self, *args: Any) -> Any:
        state, action, cum_return = args[1], args[3], args[6]
        return self.loss(state[:, :, 0].gather(1, action[:, None])[:, 0], cum_return)


def test_the_right_values() -> None:
    seeds.manual_seed(0)
    decide = Critical(K, W).eval()
    x = torch.randn(B, W)
    assert decide.critic(x).shape == (B, 1) and decide.target[0](x).shape == (B, K) and decide.exploration == 7.0
    _, mxs, actions = decide(*Initialization()(x))
    routing = Loss(None, NegLossReward())(x, mxs, external_losses=torch.arange(B).float(), reduce=False)[1]
    log_p = decide._policy[0](x).log_softmax(1)[torch.arange(B), actions]
    torch.testing.assert_close(routing, nn.functional.smooth_l1_loss(log_p, -torch.arange(B).float(), reduction="none"))
    for other in (copy.deepcopy(decide), pickle.loads(pickle.dumps(decide))):
        assert isinstance(other.critic, nn.Linear) and other.critic is not decide.critic
        assert torch.equal(other(*Initialization()(x))[2], actions)
        assert list(other.state_dict()) == list(decide.state_dict())


def test_a_helper_is_no_loss() -> None:
    """That of a subclass does not replace the loss that it inherits, and upstream's own is called beside it."""

    class Helped(Own):
        def loss(self, e: Any) -> Any:
            raise AssertionError("nobody calls a user's helper")

    class Tripled(WPL):
        def loss(self, e: Any) -> Any:
            raise AssertionError("nobody calls a user's helper")

        def _loss(self, *args: Any) -> Any:
            return 3 * super()._loss(*args)

        def _forward(self, xs: Tensor, agent: Any) -> Any:
            return super()._forward(xs, agent)

    seeds.manual_seed(0)
    helped = run(Helped(K, W))
    assert_same(helped, run(made(Own)))
    assert float(helped[2]) != 0
    seeds.manual_seed(0)
    tripled, once = run(Tripled(K, W)), run(made(WPL))
    assert torch.equal(tripled[0], once[0])
    torch.testing.assert_close(tripled[2], 3 * once[2])


def test_rewards_of_ones_own() -> None:
    class Mine(PerActionBaseReward):
        def __init__(self) -> None:
            super().__init__()
            self.history: list[int] = []
            self.table = {0: 0.1, 1: 0.2, 2: 0.3}

        def rewards(self) -> float:
            return sum(self.table.values())

        def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
            self.history.append(int(action))
            return torch.tensor([self.table[int(action)]])

    reward = Mine()
    assert_same(run(reward), run(made(ManualReward)))
    assert len(reward.history) == 2 * B and len(reward._actions) == 2 * B and reward.rewards() == pytest.approx(0.6)

    class Counting(CollaborationReward):
        def check(self) -> str:
            return "mine"

    counting = Counting(0.5)
    run(counting)
    assert counting.num_actions == K and (counting.history >= 0).sum() == 2 * B == len(counting._actions)
    counting.clear()
    assert not (counting.history >= 0).any() and not counting._actions


def test_who_is_noted() -> None:
    """What a record is of, and what names the layer elsewhere, is the user's object."""
    decide = Critical(K, W)
    _, mxs, _ = decide(*Initialization()(torch.randn(B, W)))
    assert mxs.records[0].decision is decide and mxs[:2].records[0].law is mxs.records[0].law
    assert type(decide)._fastroute_house is Decision and mxs.summary().layers[0].name


def test_names_that_are_refused() -> None:
    for name in Own._fastroute_names & {*Own._fastroute_taken}:
        with pytest.raises(TypeError, match=rf"Mine\.{name}: expected another name.*_check_exploration"):
            type("Mine", (Own,), {name: 1})
        with pytest.raises(AttributeError, match=rf"Own\.{name}: expected another name.*_check_exploration"):
            setattr(Own(K, W), name, 1)
    decide = Own(K, W)
    with pytest.raises(ValueError, match=r"_factory: expected .*, which the layer was made with, got 3"):
        decide._factory = 3


def test_hooks_of_networks_stay_hooks_there() -> None:
    class Mine(networks.REINFORCE):
        def loss_of(self, e: Any) -> Tensor:
            return -2 * e.s0 * e.R

    seeds.manual_seed(0)
    doubled = step(Mine(K, W))
    seeds.manual_seed(0)
    once = step(networks.REINFORCE(K, W))
    torch.testing.assert_close(doubled[2], 2 * once[2])
