"""What upstream's programs do with what they are given: write into it, replace it, ask what it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import networks
from fastroute.compat.PytorchRouting.CoreLayers import Initialization, Loss, Selection
from fastroute.compat.PytorchRouting.DecisionLayers import REINFORCE, WPL, Decision, GumbelSoftmax, PerTaskAssignment
from fastroute.compat.PytorchRouting.DecisionLayers.Others.PassThrough import PassThrough
from fastroute.compat.PytorchRouting.Helpers.SampleMetaInformation import SampleMetaInformation
from fastroute.compat.PytorchRouting.PreFabs import RoutingLSTMCell
from fastroute.compat.PytorchRouting.RewardFunctions.Final import NegLossReward
from fastroute.compat.PytorchRouting.RewardFunctions.PerAction import ManualReward
from fastroute.compat.PytorchRouting.UtilLayers import Sequential
from tests.compat.test_overrides import Own
from tests.compat.test_pytorch_routing import COLUMNS, K, decision
from tests.helpers import seeds

B, W = 6, 6


def begin(tasks: Any = ()) -> tuple[Tensor, Any]:
    x = torch.randn(B, W, generator=seeds.generator(0))
    return x, Initialization()(x, tasks)[1]


# ----------------------------------------------------------------------------------------------- ys is the caller's own


@pytest.mark.parametrize("mask", [None, torch.tensor([1, 0, 1, 1, 0, 1])], ids=["all", "masked"])
@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("algo", [*COLUMNS, "PerTaskAssignment", "PassThrough"])
def test_what_is_passed_on_is_a_copy(algo: str, train: bool, target: bool, mask: Tensor | None) -> None:
    cls: Any = {"PerTaskAssignment": PerTaskAssignment, "PassThrough": PassThrough}.get(algo)
    decide = (decision(algo, K, W) if cls is None else cls()).train(train)
    x, mxs = begin(tasks=[0] * B)
    where = x + 1 if target else None
    kept = [t.clone() for t in (x, *([where] if target else []))]
    ys, _, _ = decide(x, mxs, None, mask, where) if target else decide(x, mxs, None, mask)
    rows = torch.ones(B, dtype=torch.bool) if mask is None or cls is not None else mask.bool()
    assert torch.equal(ys[rows], x[rows])
    ys.mul_(0)
    for t, before in zip((x, *([where] if target else [])), kept, strict=True):
        assert torch.equal(t, before)


@pytest.mark.parametrize("modules", [1, 2])
def test_operations_in_place_after_a_decision(modules: int) -> None:
    """They neither change the caller's input nor what backward needs; the gradient is that of other operations."""
    grads = []
    for inplace in (False, True):
        seeds.manual_seed(0)
        net = Sequential(
            nn.Linear(W, W), WPL(modules, W), nn.ReLU(inplace), WPL(modules, W, num_agents=modules),
            Selection(*[nn.Sequential(nn.ReLU(inplace), nn.Linear(W, 2)) for _ in range(modules)]),
        ).eval()  # fmt: skip
        x, _ = begin()
        before = x.clone()
        y, mxs = net(x)
        sum(Loss(nn.CrossEntropyLoss(), NegLossReward())(y, mxs, torch.arange(B) % 2)).backward()  # type: ignore[union-attr]
        assert torch.equal(x, before)
        grads.append([p.grad for p in net.parameters()])
    assert any(g is not None for g in grads[0])
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------------- steps


def routing(change: Any = None) -> Tensor:
    """[B] losses of two decisions, after a change to the trajectory between and after them."""
    seeds.manual_seed(0)
    xs, mxs = begin()
    for _ in range(2):
        xs, mxs, _ = REINFORCE(K, W, additional_reward_func=ManualReward([0.1] * K)).eval()(xs, mxs)
    if change is not None:
        change(mxs)
    return Loss(None, NegLossReward(), normalize_per_action_rewards=False)(
        xs, mxs, external_losses=torch.ones(B), reduce=False
    )[1].detach()


def set_item(mxs: Any) -> None:
    mxs[1].steps[0]["add_rewards"] = -5.0


def by_update(mxs: Any) -> None:
    mxs[1].steps[0].update(add_rewards=torch.tensor(-5.0), note="n")
    assert mxs[1].steps[0]["note"] == "n"


def by_default(mxs: Any) -> None:
    step = mxs[1].steps[0]
    assert step.setdefault("add_rewards", -5.0) == step.setdefault("add_rewards", 3.0) == -5.0


def by_or(mxs: Any) -> None:
    step = mxs[1].steps[0]
    step |= {"add_rewards": -5.0}


def pop_another(mxs: Any) -> None:
    set_item(mxs)
    mxs[2].steps[1]["add_rewards"] = 7.0
    assert mxs[2].steps[1].pop("add_rewards") == 7.0 and "add_rewards" not in mxs[2].steps[1]


@pytest.mark.parametrize("write", [set_item, by_update, by_default, by_or, pop_another])
def test_what_is_written_into_a_step_counts(write: Any) -> None:
    """As if it were appended: sample 1's first reward has -5 / 2 more, and nobody else's."""
    plain, changed = routing(), routing(write)
    assert torch.equal(plain[[0, *range(2, B)]], changed[[0, *range(2, B)]])
    seeds.manual_seed(0)
    z = REINFORCE(K, W)._policy[0](begin()[0]).detach().log_softmax(1)[1].max()
    assert float(changed[1] - plain[1]) == pytest.approx(2.5 * float(z), rel=1e-5)


@pytest.mark.parametrize("name", ["actions", "states", "is_exploratory", "loss_funcs", "reward_func"])
def test_what_a_decision_recorded_stays(name: str) -> None:
    """A change would have no effect, so there is none, in whatever way it is tried."""
    _, mxs, _ = REINFORCE(K, W)(*begin())
    step = mxs[0].steps[0]
    before = dict(step)
    tries = [
        lambda: mxs[0].append(name, 1), lambda: step.__setitem__(name, 1), lambda: step.update({name: 1}),
        lambda: step.pop(name), lambda: step.__delitem__(name), lambda: step.__ior__({name: 1}),
    ]  # fmt: skip
    for attempt in tries:
        with pytest.raises(TypeError, match=rf"{name}: expected no change to what a decision recorded.*; [gsm]"):
            attempt()
    assert mxs[0].steps[0].keys() == before.keys()
    mxs[0].append(name, 1, new_step=True)  # a step of the user's own
    mxs[0].steps[-1][name] = 2
    assert mxs[0].steps[-1] == {name: 2}


def test_the_list_of_steps_stays() -> None:
    _, mxs, _ = REINFORCE(K, W)(*begin())
    steps = mxs[0].steps
    tries = [
        lambda: steps.append({}), lambda: steps.pop(), lambda: steps.insert(0, {}), lambda: steps.clear(),
        lambda: steps.extend([{}]), lambda: steps.__setitem__(0, {}), lambda: steps.__delitem__(0),
        lambda: steps.__iadd__([{}]), lambda: steps.remove(steps[0]), lambda: steps.reverse(),
        lambda: setattr(mxs[0], "steps", []),
    ]  # fmt: skip
    for attempt in tries:
        with pytest.raises(TypeError, match=r"steps: expected no change to this list.*new_step=True"):
            attempt()
    assert len(mxs[0].steps) == 1 and isinstance(steps, list) and isinstance(steps[0], dict)
    with torch.no_grad():
        _, mxs, _ = REINFORCE(K, W)(*begin())
    twin = copy.deepcopy([{k: v for k, v in s.items() if isinstance(v, Tensor)} for s in mxs[0].steps])
    twin.append({})
    assert type(copy.copy(steps)) is list and type(copy.copy(steps[0])) is dict


@pytest.mark.parametrize("value", ["much", None, object()])
def test_rewards_that_are_none(value: Any) -> None:
    _, mxs, _ = REINFORCE(K, W)(*begin())
    for attempt in (lambda: mxs[0].append("add_rewards", value), lambda: mxs[0].steps[0].update(add_rewards=value)):
        with pytest.raises(TypeError, match="add_rewards: expected a number or a tensor"):
            attempt()


@pytest.mark.parametrize("name", ["append", "finalize", "steps"])
def test_methods_of_samples_that_nobody_calls(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine\.{name}: expected no override of what decisions and Loss do not call"):
        type("Mine", (SampleMetaInformation,), {name: lambda self, *args: None})

    class Mine(SampleMetaInformation):
        def note(self) -> Any:
            return self.task

    x, _ = begin()
    assert REINFORCE(K, W)(x, [Mine(b) for b in range(B)])[1][2].note() == 2  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------ what is what


@pytest.mark.parametrize("cls", [PerTaskAssignment, PassThrough])
def test_fixed_decisions_are_decisions(cls: Any) -> None:
    made = cls(K, W, 3, 0.2)
    assert isinstance(made, Decision) and issubclass(cls, Decision) and not isinstance(nn.Linear(1, 1), Decision)
    for name in ("_num_selections", "_num_agents", "_exploration", "_policy", "_detach", "additional_reward_func"):
        assert hasattr(made, name) and hasattr(REINFORCE(K, W), name)
    assert (made._num_selections, made._num_agents, made._exploration) == (K, 3, 0.2)
    assert not made.state_dict() and not isinstance(made, networks.Decision)


class Square(nn.Module):
    """A storage of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(W, K))

    def forward(self, xs: Tensor) -> Tensor:
        return xs.detach().square() @ self.W


@pytest.mark.parametrize("agents", [1, 2])
@pytest.mark.parametrize("cls", [REINFORCE, WPL, networks.WPL, Own])
def test_storages_that_are_replaced(cls: Any, agents: int) -> None:
    decide, own = cls(K, W, agents).eval(), [Square() for _ in range(agents)]
    decide._policy = nn.ModuleList(own)
    x, mxs = begin()
    whose = torch.arange(B) % agents
    actions = decide(x, mxs, whose)[2]
    z = torch.stack([x.square() @ s.W for s in own])[whose, torch.arange(B)]
    assert torch.equal(actions, z.argmax(1))
    assert [k for k in decide.state_dict() if k.startswith("_policy")] == [f"_policy.{a}.W" for a in range(agents)]
    for given in (nn.ModuleList([*own, Square()]), Square(), None):
        with pytest.raises(TypeError, match=rf"_policy: expected an nn\.ModuleList of {agents}, a storage per agent"):
            decide._policy = given


# ------------------------------------------------------------------------------------------------------------- losses


class Centred(Own):
    """A static loss, which looks at all the entries that it is given."""

    calls: list[int] = []  # noqa: RUF012

    @staticmethod
    def _loss(a: Any, state: Any, c: Any, action: Any, e: Any, f: Any, cum_return: Any, h: Any) -> Any:  # type: ignore[override]
        Centred.calls.append(len(action))
        return -state[:, :, 0].gather(1, action[:, None])[:, 0] * (cum_return - cum_return.mean())


@pytest.mark.parametrize("widths", [(K, K), (K, K + 1), (K, K, K)])
def test_a_loss_that_layers_share_is_called_once(widths: tuple[int, ...]) -> None:
    """Of layers with as many choices; as upstream, which groups the entries by their loss functions."""
    seeds.manual_seed(0)
    xs, mxs = begin()
    for choices in widths:
        xs, mxs, _ = Centred(choices, W)(xs, mxs)
    Centred.calls.clear()
    losses = torch.arange(B).float()
    made = Loss(None, NegLossReward())(xs, mxs, external_losses=losses, reduce=False)[1].detach()
    assert sorted(Centred.calls) == sorted(B * widths.count(width) for width in set(widths))
    z = [torch.stack([s.steps[t]["states"][0, :, 0] for s in mxs])[torch.arange(B), mxs.actions[t]]
         for t in range(len(widths))]  # fmt: skip
    torch.testing.assert_close(made, -sum(z) * (losses.mean() - losses))


def test_losses_of_layers_of_their_own() -> None:
    """Bound methods are each layer's, a function given to two objects is one."""
    seen: list[int] = []

    def given(*args: Any) -> Any:
        seen.append(len(args[3]))
        return args[6]

    class Bound(Own):
        def _loss(self, *args: Any) -> Any:
            return given(*args)

    two = [REINFORCE(K, W), WPL(K, W)]
    for one in two:
        one._loss = given  # type: ignore[method-assign,assignment]
    for layers, calls in (([Bound(K, W), Bound(K, W)], [B, B]), (two, [2 * B])):
        seen.clear()
        xs, mxs = begin()
        for decide in layers:
            xs, mxs, _ = decide(xs, mxs)
        Loss(None, NegLossReward())(xs, mxs, external_losses=torch.ones(B))
        assert seen == calls


@pytest.mark.parametrize("shape", [(B,), (B, 2), (2 * B,), (B, 2, 3), (2, B), (1, B), (3, 2, B)])
def test_external_losses_of_any_shape(shape: tuple[int, ...]) -> None:
    external = torch.rand(shape, generator=seeds.generator(1))
    xs, mxs, _ = GumbelSoftmax(K, W)(*begin())
    losses, _ = Loss(None, NegLossReward())(xs, mxs, external_losses=external, reduce=False)
    assert torch.equal(losses, external.view(B, -1).sum(1))
    with pytest.raises(ValueError, match="external_losses: expected one row per sample, 6, got"):
        Loss(None, NegLossReward())(xs, mxs, external_losses=torch.rand(B + 1))
    with pytest.raises(TypeError, match=r"external_losses: expected a floating-point tensor, got torch\.int64"):
        Loss(None, NegLossReward())(xs, mxs, external_losses=torch.ones(shape, dtype=torch.int64))


# -------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("mask", [torch.zeros(B, dtype=torch.bool), torch.zeros(B, dtype=torch.uint8), [0] * B])
@pytest.mark.parametrize("cls", [REINFORCE, Own])
def test_a_mask_of_nobody(cls: Any, mask: Any) -> None:
    x, mxs = begin()
    with pytest.raises(ValueError, match=f"mask: expected a sample that is decided for, got none of {B}"):
        cls(K, W)(x, mxs, None, mask)
    assert not len(mxs[0].steps)
    some = torch.tensor([*[0] * (B - 1), 1])
    assert [len(s.steps) for s in cls(K, W)(x, mxs, None, some)[1]] == some.tolist()


def test_cells_whose_samples_have_all_stopped() -> None:
    cell = RoutingLSTMCell(W, W, K, 3, REINFORCE)
    x = torch.randn(B, W)
    (h, _), mxs = cell(x, None, metas=None, mask=torch.zeros(B, dtype=torch.bool))
    assert h.shape == (B, W) and not len(mxs[0].steps)


# -------------------------------------------------------------------------------------------------- errors with a name


@pytest.mark.parametrize("options", [{}, {"approx_hidden_dims": (5,)}])
@pytest.mark.parametrize("family", ["compat", "networks"])
@pytest.mark.parametrize("algo", COLUMNS)
def test_another_dtype_than_the_policies(algo: str, family: str, options: dict[str, Any]) -> None:
    decide = decision(algo, K, W, **options) if family == "compat" else getattr(networks, algo)(K, W, **options)
    x, mxs = begin()
    with pytest.raises(TypeError, match=r"(batch|xs|x): expected .*torch\.float32.*, got .*torch\.float64"):
        decide(x.double(), mxs)


def test_rewards_that_return_nothing() -> None:
    class Silent:
        def register(self, dist: Any, action: Any) -> None: ...
        def clear(self) -> None: ...
        def get_reward(self, dist: Any, action: Any) -> None: ...

    x, mxs = begin()
    ones = torch.ones(B)
    REINFORCE(K, W)(x, mxs)
    with pytest.raises(TypeError, match=r"routing_reward_func: expected a number or a tensor .*, got None"):
        Loss(None, lambda loss, yest, ytrue: None)(x, mxs, external_losses=ones)
    x, mxs = begin()
    REINFORCE(K, W, additional_reward_func=Silent())(x, mxs)
    with pytest.raises(TypeError, match=r"additional_reward_func: expected a number or a tensor .*, got None"):
        Loss(None, NegLossReward())(x, mxs, external_losses=ones)


@pytest.mark.parametrize(
    ("rewards", "error"), [(1.0, ValueError), (None, TypeError), (["a"] * B, TypeError), ([1.0], ValueError)]
)
def test_rewards_for_all_samples(rewards: Any, error: Any) -> None:
    _, mxs, _ = REINFORCE(K, W)(*begin())
    with pytest.raises(error, match="rewards: expected"):
        mxs.add_rewards(rewards)
    mxs.add_rewards([1.0] * B)
    assert float(mxs[3].steps[0]["add_rewards"]) == 1
