"""Pytorch-Routing's module tree: every name in its place, its numbers, and where it is not fastroute.networks."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import networks
from fastroute.compat import PytorchRouting
from fastroute.compat.PytorchRouting._names import ModulesOwnNames
from fastroute.compat.PytorchRouting.CoreLayers import Initialization, Loss, Selection
from fastroute.compat.PytorchRouting.DecisionLayers import (
    REINFORCE,
    EGreedyREINFORCE,
    GumbelSoftmax,
    PerTaskAssignment,
    QLearning,
)
from fastroute.compat.PytorchRouting.DecisionLayers.Others.GumbelSoftmax import GumbelSoftmaxSampling
from fastroute.compat.PytorchRouting.DecisionLayers.Others.PassThrough import PassThrough
from fastroute.compat.PytorchRouting.Helpers.RLSample import RLSample
from fastroute.compat.PytorchRouting.Helpers.TorchHelpers import FakeFlatModuleList, Identity
from fastroute.compat.PytorchRouting.PreFabs import RoutingLSTMCell
from fastroute.compat.PytorchRouting.PreFabs.RNNcells import RoutingGRUCell
from fastroute.compat.PytorchRouting.RewardFunctions.Final import CorrectClassifiedReward, NegLossReward
from fastroute.compat.PytorchRouting.RewardFunctions.PerAction import (
    CollaborationReward,
    ManualReward,
    RunningAverageCollaborationReward,
)
from fastroute.compat.PytorchRouting.UtilLayers import Sequential
from tests.helpers import golden, seeds
from tests.helpers.budget import Yardstick
from tests.helpers.networks import COLUMNS, F, gradients

B, K = 8, 4

#: Where upstream has each name. A folder's own names are those that its package gives at once.
TREE = {
    "CoreLayers": "Initialization Loss Selection",
    "CoreLayers.Initialization": "Initialization",
    "CoreLayers.Loss": "Loss",
    "CoreLayers.Selection": "Selection",
    "DecisionLayers": "REINFORCE EGreedyREINFORCE REINFORCEBl1 REINFORCEBl2 QLearning AdvantageLearning SARSA "
    "ActorCritic AAC BootstrapAAC EGreedyAAC WPL GumbelSoftmax PerTaskAssignment RELAX Decision",
    "DecisionLayers.Decision": "Decision",
    "DecisionLayers.PolicyStorage": "ApproxPolicyStorage TabularPolicyStorage",
    "DecisionLayers.ReinforcementLearning.REINFORCE": "REINFORCE REINFORCEBl1 REINFORCEBl2 EGreedyREINFORCE",
    "DecisionLayers.ReinforcementLearning.QLearning": "QLearning",
    "DecisionLayers.ReinforcementLearning.SARSA": "SARSA",
    "DecisionLayers.ReinforcementLearning.ActorCritic": "ActorCritic",
    "DecisionLayers.ReinforcementLearning.AAC": "AAC BootstrapAAC EGreedyAAC",
    "DecisionLayers.ReinforcementLearning.AdvantageLearning": "AdvantageLearning BootstrapAdvantageLearning "
    "SurpriseLearning",
    "DecisionLayers.ReinforcementLearning.WPL": "WPL",
    "DecisionLayers.Others.GumbelSoftmax": "GumbelSoftmax GumbelSoftmaxSampling",
    "DecisionLayers.Others.PassThrough": "PassThrough",
    "DecisionLayers.Others.PerTaskAssignment": "PerTaskAssignment",
    "DecisionLayers.Others.RELAX": "RELAX",
    "RewardFunctions.Final": "NegLossReward CorrectClassifiedReward",
    "RewardFunctions.Final.NegLossReward": "NegLossReward",
    "RewardFunctions.Final.CorrectClassifiedReward": "CorrectClassifiedReward",
    "RewardFunctions.PerAction.CollaborationReward": "CollaborationReward RunningAverageCollaborationReward",
    "RewardFunctions.PerAction.ManualReward": "ManualReward",
    "UtilLayers.Sequential": "Sequential",
    "RewardFunctions.Final.BaseReward": "BaseReward",
    "RewardFunctions.PerAction": "CollaborationReward RunningAverageCollaborationReward ManualReward",
    "RewardFunctions.PerAction.PerActionBaseReward": "PerActionBaseReward",
    "UtilLayers": "Sequential",
    "PreFabs": "RoutingLSTMCell",
    "PreFabs.RNNcells": "RoutingRNNCellBase RoutingGRUCell RoutingLSTMCell",
    "Helpers.MLP": "MLP",
    "Helpers.RLSample": "RLSample",
    "Helpers.SampleMetaInformation": "SampleMetaInformation",
    "Helpers.TorchHelpers": "FakeFlatModuleList Identity",
}
NAMES = [(path, name) for path, names in TREE.items() for name in names.split()]
#: What fastroute.networks has no counterpart of.
OWN = {
    "GumbelSoftmaxSampling",
    "RLSample",
    "FakeFlatModuleList",
    "Identity",
    *TREE["DecisionLayers.PolicyStorage"].split(),
}
#: Upstream's subclasses, where they are not children of Decision.
PARENTS = {
    "EGreedyREINFORCE": "REINFORCE", "ActorCritic": "REINFORCE", "WPL": "ActorCritic", "REINFORCEBl2": "REINFORCEBl1",
    "SARSA": "QLearning", "BootstrapAdvantageLearning": "AdvantageLearning", "SurpriseLearning": "AdvantageLearning",
    "BootstrapAAC": "AAC", "EGreedyAAC": "AAC",
}  # fmt: skip


def at(path: str) -> Any:
    return importlib.import_module(f"fastroute.compat.PytorchRouting.{path}")


def found(name: str) -> Any:
    return next(getattr(at(path), name) for path, n in NAMES if n == name)


def decision(algo: str, *args: Any, **options: Any) -> Any:
    return found(algo)(*(args or (K, F)), **options)


def linears(count: int, inputs: int = F, outputs: int = F) -> Selection:
    return Selection(*[nn.Linear(inputs, outputs) for _ in range(count)])


def load(file: str) -> Any:
    return golden.load("networks", file)


def to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {k: to(v, dtype) for k, v in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def compare(theirs: dict[str, Tensor | None], run: Callable[[torch.dtype], dict[str, Any]]) -> None:
    """Upstream's float32 numbers, and ours, within budget of ours in float64; None where there is None."""
    yardstick = Yardstick(lambda: run(torch.float64), torch.float32)
    ours = run(torch.float32)
    assert all(t is None or t.dtype == ours[name].dtype for name, t in theirs.items())
    yardstick.check(theirs, "upstream's")
    yardstick.check(ours)


# ------------------------------------------------------------------------------------------------------------- the tree


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_names(path: str, name: str) -> None:
    cls = getattr(at(path), name)
    assert cls.__name__ == name and cls.__doc__
    assert cls is found(name)
    if name not in OWN:
        assert issubclass(cls, getattr(networks, name))


@pytest.mark.parametrize(
    "folder", ["CoreLayers", "DecisionLayers", "RewardFunctions", "UtilLayers", "PreFabs", "Helpers"]
)
def test_folders(folder: str) -> None:
    assert getattr(PytorchRouting, folder) is at(folder)


@pytest.mark.parametrize("name", COLUMNS)
def test_classes_inherit_as_upstreams(name: str) -> None:
    cls, base = found(name), found(PARENTS.get(name, "Decision"))
    assert issubclass(cls, base) and issubclass(cls, getattr(networks, name))
    for attribute in set(dir(getattr(networks, name))) - {"forward", *vars(ModulesOwnNames)}:
        if not attribute.startswith(("__", "_abc")):
            assert getattr(cls, attribute) == getattr(getattr(networks, name), attribute), attribute


def takes_a_formula(name: str) -> bool:
    cls = getattr(networks, name, None)
    if cls is None or name in ("PerTaskAssignment", "PassThrough"):
        return False
    return any("formula" in inspect.signature(c.__init__).parameters for c in cls.__mro__ if c is not object)


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "Loss": (nn.MSELoss(), NegLossReward()), "RoutingLSTMCell": (F, F, K, 1, REINFORCE),
    "RoutingGRUCell": (F, F, K, 1, REINFORCE), "RoutingRNNCellBase": (), "Decision": (K, F),
    "NegLossReward": (), "CorrectClassifiedReward": (), "BaseReward": (), "CollaborationReward": (),
    "RunningAverageCollaborationReward": (), **dict.fromkeys(COLUMNS, (K, F)),
}  # fmt: skip


def test_all_that_have_a_formula_are_known() -> None:
    assert {name for _, name in NAMES if takes_a_formula(name)} == set(ARGUMENTS)


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name != "RoutingRNNCellBase"])
def test_upstreams_formula_is_the_default(name: str) -> None:
    arguments = ARGUMENTS[name]
    assert found(name)(*arguments).formula == "upstream"
    assert found(name)(*arguments, formula="intended").formula == "intended"
    assert getattr(networks, name)(*arguments).formula == "intended"


@pytest.mark.parametrize("name", [*COLUMNS, "RoutingLSTMCell", "RoutingGRUCell"])
def test_state_dicts_load_both_ways(name: str) -> None:
    here, there = (get(*ARGUMENTS[name]) for get in (found(name), getattr(networks, name)))
    assert list(here.state_dict()) == list(there.state_dict())
    here.load_state_dict(there.state_dict(), strict=True)
    there.load_state_dict(here.state_dict(), strict=True)


def test_the_walk_throughs() -> None:
    """Both generations of names, as the docstring has them, learn."""
    assert PytorchRouting.__doc__ is not None
    for name in (
        "prior_actions",
        "additional_reward_func",
        "additional_reward_class",
        "approx_module",
        "loss(yest, y, meta)",
    ):
        assert name in PytorchRouting.__doc__
    failed, attempted = doctest.testmod(PytorchRouting)
    assert attempted > 20 and not failed


# --------------------------------------------------------------------------------------------------- upstream's numbers


@pytest.mark.parametrize("file", golden.names("networks", "eval_*.pt"))
def test_decisions_in_eval(file: str) -> None:
    def run(dtype: torch.dtype) -> dict[str, Any]:
        g = to(load(file), dtype)
        made = decision(
            g["algo"], K, F, 3, policy_storage_type=g["storage"], approx_hidden_dims=tuple(g["hidden"]), dtype=dtype
        )
        made.load_state_dict(g["state_dict"], strict=True)
        made.eval()
        xs, mxs, _ = Initialization()(g["x"])
        ys, mxs, actions = made(xs=xs, mxs=mxs, prior_actions=g["prior_actions"], mask=None, update_target=None)
        states = torch.cat([sample.steps[0]["states"] for sample in mxs]).detach()
        assert states.shape == (B, K, 5)
        columns = 1 if g["algo"] == "RELAX" else COLUMNS[g["algo"]]  # RELAX has z alone in eval
        return {"ys": ys, "actions": actions, "states": states[:, :, :columns]}

    g = load(file)
    g["states"] = g["states"][:, :, : 1 if g["algo"] == "RELAX" else COLUMNS[g["algo"]]]
    compare({k: g[k] for k in ("ys", "actions", "states")}, run)


@pytest.mark.parametrize("file", golden.names("networks", "selection_*.pt"))
def test_selections(file: str) -> None:
    def run(dtype: torch.dtype) -> dict[str, Any]:
        g = to(load(file), dtype)
        state = g["state_dict"]
        count = 1 + max(int(k.split(".")[1]) for k in state)
        module = linears(count, 6, 5)
        if "_submodules.0.0.weight" in state:
            module = Selection(*[nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten()) for _ in range(count)])
        module.to(dtype).load_state_dict(state, strict=True)
        mask = g.get("mask")
        if mask is not None:
            mask = mask.to(torch.uint8)
        x = g["x"].clone().requires_grad_()
        y, _, _ = module(xs=x, mxs=Initialization()(x)[1], actions=g["actions"], mask=mask)
        y.backward(g["grad_y"])
        assert x.grad is not None
        return {"y": y.detach(), "grad_x": x.grad, **gradients(module)}

    g = load(file)
    compare({"y": g["y"], "grad_x": g["grad_x"], **g["grads"]}, run)


def test_per_action_rewards() -> None:
    g = load("per_action_rewards.pt")
    rewards: dict[str, Any] = {
        "collab": CollaborationReward(g["ratio"], 4, g["history"]),
        "running": RunningAverageCollaborationReward(g["ratio"], 4, g["history"]),
        "manual": ManualReward(g["manual"], 4),
    }
    for name, table in g["reward_of_each_action_after_each_register"].items():
        for action, expected in zip(g["actions"], table, strict=True):
            rewards[name].register(torch.zeros(1, 4, 5), action)
            gained = torch.cat([rewards[name].get_reward(torch.zeros(1, 4, 5), torch.tensor(a)) for a in range(4)])
            # at most ``history`` additions in float32 by upstream, of numbers below one
            error = float((gained - expected).abs().max())
            assert error <= math.sqrt(g["history"]) * torch.finfo(torch.float32).eps * float(expected.abs().max()), name


def test_final_rewards() -> None:
    g = load("final_rewards.pt")
    for name, reward in (("neg", NegLossReward(2.0)), ("correct", CorrectClassifiedReward(2.0))):
        samples = zip(g["loss"][:, None], g["yest"][:, None], g["ytrue"][:, None], strict=True)
        assert torch.equal(torch.cat([reward(*sample) for sample in samples]), g[name])


def test_sequential_action_dispatch() -> None:
    g = load("sequential_action_dispatch.pt")

    def run(dtype: torch.dtype) -> dict[str, Any]:
        net = Sequential(REINFORCE(4, 6), linears(4), nn.ReLU(), REINFORCE(4, 6, num_agents=4), linears(4))
        net.to(dtype).eval().load_state_dict(to(g["state_dict"], dtype), strict=True)
        y, meta = net(to(g["x"], dtype))
        assert [[int(step["actions"]) for step in sample.steps] for sample in meta] == g["actions"]
        return {"y": y.detach()}

    compare({"y": g["y"]}, run)


@pytest.mark.parametrize("file", golden.names("networks", "lstm_*.pt"))
def test_lstm_cells(file: str) -> None:
    g = load(file)
    _, depth, routed = file.removesuffix(".pt").split("_")

    def run(dtype: torch.dtype) -> dict[str, Any]:
        cell = RoutingLSTMCell(6, 6, 4, int(depth[1]), REINFORCE, "i" in routed, "h" in routed).to(dtype).eval()
        cell.load_state_dict(to(g["state_dict"], dtype), strict=True)
        x, h, c = (to(g[k], dtype) for k in ("x", "h0", "c0"))
        (h, c), metas = cell(x, (h, c), metas=Initialization()(x)[1], task_actions=None, mask=None)
        assert [[int(step["actions"]) for step in sample.steps] for sample in metas] == g["actions"]
        return {"h1": h.detach(), "c1": c.detach()}

    compare({"h1": g["h1"], "c1": g["c1"]}, run)


# ---------------------------------------------------------------------------------------------------- upstream's quirks


def begin(tasks: Any = ()) -> tuple[Tensor, Any]:
    x = torch.randn(B, F, generator=seeds.generator(0))
    return x, Initialization()(x, tasks)[1]


@pytest.mark.parametrize("nobody", [[], (), torch.tensor([], dtype=torch.int64)], ids=["list", "tuple", "tensor"])
def test_no_prior_actions_mean_agent_0(nobody: Any) -> None:
    decide = REINFORCE(K, F, num_agents=3).eval()
    x, mxs = begin()
    _, mxs, actions = decide(x, mxs, nobody)
    assert not mxs.agents.any()
    assert torch.equal(actions, decide(x, begin()[1], [0] * B)[2])
    with pytest.raises(ValueError, match="prior_actions: expected the agent of each sample"):
        decide(x, begin()[1], None)
    with pytest.raises(ValueError, match="agents: expected the agent of each sample"):
        networks.REINFORCE(K, F, num_agents=3)(x, begin()[1], [])


@pytest.mark.parametrize("algo", COLUMNS)
def test_masks_of_bytes(algo: str) -> None:
    decide = decision(algo, K, F, num_agents=2)
    x, mxs = begin()
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0], dtype=torch.uint8)
    ys, mxs, actions = decide(xs=x, mxs=mxs, prior_actions=torch.arange(B) % 2, mask=mask, update_target=x + 1)
    assert [len(sample.steps) for sample in mxs] == mask.tolist()
    assert not actions[mask == 0].any() and torch.equal(ys[mask == 0], (x + 1)[mask == 0])
    z, _, _ = linears(K)(ys, mxs, actions, mask)
    assert not z[mask == 0].any()


def decided(tasks: list[int]) -> tuple[Tensor, Any]:
    xs, mxs, actions = Initialization()(torch.randn(len(tasks), F, generator=seeds.generator(0)), tasks)
    ys, mxs, _ = REINFORCE(K, F)(xs, mxs, actions)
    return ys, mxs


def test_mxs_is_a_list() -> None:
    """What upstream's users do to it, against a list of the same samples."""
    _, mxs = decided([0, 1, 2, 3])
    assert isinstance(mxs, list)
    _, other = decided([4, 5])

    def label(samples: Any) -> list[Any]:
        return [s.task for s in samples]

    changes: list[Callable[[Any], Any]] = [
        lambda m: m.append(other[0]),
        lambda m: m.extend(other),
        lambda m: m.__iadd__(other),
        lambda m: m.insert(1, other[1]),
        lambda m: m.pop(),
        lambda m: m.pop(0),
        lambda m: m.remove(m[2]),
        lambda m: m.reverse(),
        lambda m: m.sort(key=lambda s: -s.task),
        lambda m: m.__setitem__(0, other[1]),
        lambda m: m.__setitem__(slice(1, 3), list(other)),
        lambda m: m.__delitem__(slice(0, 2)),
        lambda m: m.__imul__(2),
        lambda m: m.clear(),
    ]
    for change in changes:
        _, mxs = decided([0, 1, 2, 3])
        _, other = decided([4, 5])
        samples, expected = list(mxs), label(mxs)
        assert mxs == samples and mxs.copy() == mxs and mxs.copy() is not mxs
        mirror = list(samples)
        change(mirror)
        expected = label(mirror)
        change(mxs)
        assert label(mxs) == expected and len(mxs) == len(expected)
        if expected:
            assert mxs.actions.shape == (mxs.records and (len(mxs.records), len(expected)))
            assert all(len(s.steps) == 1 for s in mxs)
    _, mxs = decided([0, 1, 2, 3])
    for made, tasks in ((mxs[1:3], [1, 2]), (mxs + mxs[:1], [0, 1, 2, 3, 0]), (list(mxs)[2:] + mxs, [2, 3, 0, 1, 2, 3]),
                        (mxs * 2, [0, 1, 2, 3] * 2), (2 * mxs[:1], [0, 0])):  # fmt: skip
        assert isinstance(made, list) and label(made) == tasks
    begun = Initialization()(torch.zeros(2, 1), [3, 1])[1]
    assert label(pickle.loads(pickle.dumps(begun))) == label(copy.deepcopy(begun)) == [3, 1]
    assert mxs.index(mxs[2]) == 2 and mxs[2] in mxs and mxs.count(mxs[1]) == 1 and label(reversed(mxs)) == [3, 2, 1, 0]


def test_a_batch_that_grows_between_decisions() -> None:
    """Samples that are held follow the batch that they were added to; the loss is that of two batches."""
    (x, mxs), (z, other), select = decided([0, 1, 2]), decided([3, 4]), linears(K)
    held = mxs[0], other[1]
    mxs.extend(other)
    ys, mxs, actions = QLearning(K, F)(torch.cat([x, z]), mxs)
    ys, mxs, _ = select(ys, mxs, actions)
    assert [len(s.steps) for s in held] == [2, 2] and held[1] is mxs[4]
    assert [len(s.steps) for s in mxs] == [2] * 5
    loss, routing = Loss(nn.CrossEntropyLoss(), NegLossReward())(ys, mxs, torch.arange(5) % F)
    (loss + routing).backward()
    assert any(p.grad is not None for p in select.parameters()) and routing.isfinite()


def routed(gamma: float, reward: Any = None, final: Any = None) -> tuple[float, float]:
    seeds.manual_seed(0)
    x, mxs = begin()
    ys: Any = x
    for _ in range(3):
        ys, mxs, actions = REINFORCE(K, F, additional_reward_func=reward)(ys, mxs)
        ys, mxs, actions = linears(K)(ys, mxs, actions)
    made = Loss(nn.CrossEntropyLoss(), final or NegLossReward(), gamma)(ys, mxs, torch.arange(B) % F)
    return float(made[0].detach()), float(made[1].detach())


def test_discounting_is_not_looked_at() -> None:
    assert routed(0.5) == routed(1.0)


def test_scale_is_not_looked_at() -> None:
    assert routed(1.0, final=NegLossReward(scale=3.0)) == routed(1.0)
    assert NegLossReward(scale=3.0, formula="intended")(*torch.ones(3, 1)) == -3


def test_the_collaboration_ratio_counts_twice() -> None:
    for formula, expected in (({}, 0.09), ({"formula": "intended"}, 0.3)):
        reward = CollaborationReward(0.3, K, **formula)
        reward.register(torch.zeros(1, K, 5), torch.tensor(2))
        assert float(reward.get_reward(torch.zeros(1, K, 5), torch.tensor(2))) == pytest.approx(expected)


def test_exploration_of_egreedy_triples() -> None:
    decide = EGreedyREINFORCE(K, F, exploration=0.2)
    assert decide._exploration == 0.2
    for given, expected in ((0.2, 0.6), (0.5, 1.0)):
        decide.set_exploration(given)
        assert decide._exploration == pytest.approx(expected)


def test_exploration_is_flagged_upside_down() -> None:
    decide = REINFORCE(K, F).eval()
    _, mxs, _ = decide(*begin())
    assert mxs.exploratory.all()


@pytest.mark.parametrize("cls", [PerTaskAssignment, PassThrough])
def test_fixed_decisions(cls: Any) -> None:
    decide = cls(K, F, 3, anything=1)  # upstream's do not look either
    tasks = [b % 3 for b in range(B)]
    x, mxs = begin(tasks)
    ys, after, actions = decide(x, mxs, None, None)
    assert ys is not x and torch.equal(ys, x) and after is mxs
    assert actions.tolist() == (tasks if cls is PerTaskAssignment else [0] * B)
    assert torch.equal(decide(xs=x, mxs=mxs)[2], actions)
    assert Loss(nn.CrossEntropyLoss(), NegLossReward())(ys, mxs, torch.arange(B) % F)[1] == 0


def test_positional_arguments() -> None:
    """In upstream's order."""
    net = nn.Linear(F, K)
    reward = ManualReward([0.1] * K, K)
    decide = QLearning(K, F, 2, 0.3, "approx", False, (5,), net, reward, True)
    assert decide._num_agents == 2 and decide._exploration == 0.3 and not decide._detach
    assert torch.equal(decide._policy[1]._approx.weight, net.weight) and decide._policy[1]._approx is not net
    assert decide.additional_reward_func is reward
    assert decide(*begin(), [0, 1] * 4)[2].shape == (B,)
    xs, mxs = begin()
    ys, mxs, _ = linears(K)(*decide(xs, mxs, torch.arange(B) % 2, None, None))
    losses = Loss(nn.CrossEntropyLoss(), CorrectClassifiedReward(), 1.0, True, False)(
        ys, mxs, torch.arange(B) % F, None, False
    )
    assert all(part.shape == (B,) for part in losses)


def test_the_readmes_spellings() -> None:
    net = nn.Linear(F, K)
    decide = REINFORCE(
        K, F, approx_module=net, additional_reward_class=CollaborationReward,
        additional_reward_args={"reward_ratio": 0.5, "num_actions": K},
    )  # fmt: skip
    assert torch.equal(decide._policy[0]._approx.weight, net.weight)
    assert decide.additional_reward_func.formula == "upstream"
    loss = Loss(nn.CrossEntropyLoss(), NegLossReward())
    x, mxs = begin()
    ys, mxs, _ = decide(x, mxs, [])
    truth = torch.arange(B) % F
    assert loss(ys, truth, mxs) == loss(ys, mxs, truth) == loss(ys, list(mxs), truth)


def test_unknown_keywords() -> None:
    """Upstream swallows them."""
    with pytest.raises(TypeError, match="REINFORCE: unexpected keyword 'num_agent'; did you mean 'num_agents'"):
        REINFORCE(K, F, num_agent=2)


def test_two_single_agents_in_a_row() -> None:
    """Upstream takes the first one's actions for agents, and crashes."""
    net = Sequential(GumbelSoftmax(K, F), linears(K), nn.ReLU(), GumbelSoftmax(K, F), linears(K))
    y, meta = net(begin()[0])
    assert y.shape == (B, F) and len(meta[0].steps) == 2


def test_gru_cells_run() -> None:
    cell = RoutingGRUCell(F, F, K, 2, REINFORCE, True, True)
    h, metas = cell(torch.randn(B, F), None, metas=None, task_actions=None, mask=torch.ones(B, dtype=torch.uint8))
    assert h.shape == (B, F) and len(metas[0].steps) == 4
    assert all(d.formula == "upstream" for d in cell.modules() if isinstance(d, networks.Decision))


# -------------------------------------------------------------------------------------------------------- small helpers


def test_gumbel_softmax_sampling() -> None:
    seeds.manual_seed(0)
    sampling = GumbelSoftmaxSampling(0.5)
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(4000, 3).clone().requires_grad_()
    drawn = sampling(logits)
    # the share of each choice is within four standard errors of its probability
    p = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    assert ((drawn.detach().mean(0) - p).abs() < 4 * (p * (1 - p) / 4000).sqrt()).all()
    drawn[:, 0].sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    assert sampling.eval()(logits)[:, 2].eq(1).all()
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0"):
        GumbelSoftmaxSampling(0)


def test_a_list_of_one_module() -> None:
    shared = nn.Linear(2, 2)
    many = FakeFlatModuleList(shared)
    assert many[0] is many[7] is shared and list(many) == [shared] and len(many) == 1
    assert len(list(many.parameters())) == 2


def test_identity() -> None:
    x, mxs = begin()
    y, _, _ = Selection(Identity(), nn.Linear(F, F))(x, mxs, torch.tensor([0, 1] * 4))
    assert torch.equal(y[::2], x[::2])


def test_rl_samples() -> None:
    sample = RLSample(True, action=torch.tensor(1), reward=0.5)
    assert sample.is_terminal and sample.reward == 0.5 and sample.next_state is None
