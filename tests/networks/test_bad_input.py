"""Every wrong argument raises before any work, and the message names it, what was expected and what came."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastroute
from fastroute import networks, use_backend
from fastroute.networks import (
    MLP,
    CollaborationReward,
    CorrectClassifiedReward,
    Initialization,
    Loss,
    ManualReward,
    NegLossReward,
    PassThrough,
    PerActionBaseReward,
    PerTaskAssignment,
    RoutingGRUCell,
    RoutingLSTMCell,
    RunningAverageCollaborationReward,
    Selection,
    Sequential,
    Trajectory,
)
from fastroute.ops.trajectory_loss.op import Entry
from tests.helpers.backends import each_backend
from tests.helpers.networks import LEARNING, F, decision, linears, start

each_class = pytest.mark.parametrize("algo", LEARNING)


def raises(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------------------ decisions

CONSTRUCTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_selection": 3}, TypeError, r"unexpected keyword 'num_selection'; did you mean 'num_selections'\?"),
    ({"agents": 3}, TypeError, "unexpected keyword 'agents'"),
    ({"num_selections": 0}, ValueError, "num_selections: expected at least 1, got 0"),
    ({"num_selections": 2.0}, TypeError, "num_selections: expected an int, got 2.0"),
    ({"num_selections": True}, TypeError, "num_selections: expected an int, got True"),
    ({"num_agents": 0}, ValueError, "num_agents: expected at least 1, got 0"),
    ({"num_agents": "3"}, TypeError, "num_agents: expected an int, got '3'"),
    ({"in_features": None}, ValueError, "in_features: "),
    ({"in_features": 0}, ValueError, "widths of at least 1, got input 0"),
    ({"exploration": 2}, ValueError, "exploration: expected a number from 0 to 1, got 2"),
    ({"policy_storage_type": "table"}, ValueError, r"policy_storage_type: expected 'approx' \(0\) .*'table'"),
    ({"policy_storage_type": 2}, ValueError, "policy_storage_type: expected .*got 2"),
    ({"approx_hidden_dims": (4, 0)}, ValueError, r"widths of at least 1, got .*\(4, 0\)"),
    ({"formula": "Upstream"}, ValueError, "formula: expected 'intended' or 'upstream', got 'Upstream'"),
    ({"additional_reward_func": CollaborationReward}, TypeError, "additional_reward_func: expected an object"),
    ({"additional_reward_func": 3.0}, TypeError, "additional_reward_func: expected register, .*3.0 lacks"),
    ({"additional_reward_func": CollaborationReward(0.1, 2)}, ValueError, "num_actions: expected at least .*4"),
    ({"additional_reward_func": ManualReward([0.1])}, ValueError, "rewards: expected one per choice, 4, got 1"),
    ({"additional_reward_args": {"reward_ratio": 1}}, TypeError, "additional_reward_args: expected"),
    ({"policy_net": MLP(F, 4), "approx_module": MLP(F, 4)}, TypeError, "policy_net or approx_module, got both"),
    (
        {"additional_reward_func": PerActionBaseReward(), "additional_reward_class": PerActionBaseReward}, TypeError,
        "expected additional_reward_func or additional_reward_class, got both",
    ),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", CONSTRUCTION, ids=[str(c[0])[:40] for c in CONSTRUCTION])
def test_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for algo in LEARNING:
        given = {"num_selections": 4, "in_features": F, **options}
        cls = getattr(networks, algo)
        raises(error, message, lambda cls=cls, given=given: cls(**given))


def test_the_readmes_spellings() -> None:
    made = networks.WPL(4, F, additional_reward_class=CollaborationReward, additional_reward_args={"num_actions": 4})
    assert type(made.additional_reward_func) is CollaborationReward
    made = networks.WPL(4, F, additional_reward_class=CollaborationReward, additional_reward_args=(0.2, 4))
    assert made.additional_reward_func.reward_ratio == 0.2
    net = MLP(F, 4, (3,))
    assert len(networks.WPL(4, F, approx_module=net)._policy[0]._approx._layers) == 2


ZEROS = torch.zeros(5, dtype=torch.int64)
CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"meta": start(torch.zeros(4, F))}, ValueError, "meta: expected one entry per sample, 5, got 4"),
    ({"meta": [1] * 5}, TypeError, "meta: expected a Trajectory or a list of its samples, got list"),
    ({"meta": None}, TypeError, "meta: expected a Trajectory or a list of its samples, got NoneType"),
    ({"agents": None}, ValueError, r"agents: expected the agent of each sample, \[5\] below 3, got none"),
    ({"agents": []}, ValueError, r"agents: expected the agent of each sample, \[5\] below 3, got none"),
    ({"agents": ZEROS[:4]}, ValueError, r"agents: expected one per sample, shape \[5\] or \[5, 1\], got \[4\]"),
    ({"agents": torch.zeros(5, 2, dtype=torch.int64)}, ValueError, r"agents: .*got \[5, 2\]"),
    ({"agents": torch.zeros(5)}, TypeError, r"agents: expected an integer tensor \[B\], got torch.float32"),
    ({"agents": torch.zeros(5, dtype=torch.bool)}, TypeError, "agents: .*got torch.bool"),
    ({"agents": ZEROS + 3}, IndexError, "agents: expected indices below 3, got 5 of 5 out of range"),
    ({"agents": [0, 1, 2, 9, 9]}, IndexError, "agents: expected indices below 3, got 2 of 5 out of range"),
    ({"agents": ZEROS - 1}, IndexError, "agents: expected indices of 0 or more, got 5 that are negative"),
    ({"mask": torch.ones(4)}, TypeError, r"mask: expected bool \(or 0 and 1\), got torch.float32"),
    ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask: expected one per sample, shape \[5\], got \[4\]"),
    ({"forced_actions": ZEROS[:3]}, ValueError, r"forced_actions: expected one per sample.*got \[3\]"),
    ({"forced_actions": torch.zeros(5)}, TypeError, "forced_actions: .*got torch.float32"),
    ({"forced_actions": [0, 1, 2, 3, 4]}, IndexError, "forced_actions: expected indices from 0 to 3, got 0 to 4"),
    ({"forced_actions": [0, 1, -1, 3, 2]}, IndexError, "forced_actions: expected indices from 0 to 3, got -1 to 3"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", CALLS, ids=[c[2][:40] for c in CALLS])
def test_calls(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """And after it nothing is recorded."""
    for algo in LEARNING:
        layer, x = decision(algo, 4, 3), torch.randn(5, F)
        meta = start(x)
        given = {"meta": meta, "agents": ZEROS, **options}
        raises(error, message, lambda layer=layer, x=x, given=given: layer(x, **given))
        assert meta.records == []


@each_backend
@each_class
def test_shapes_that_are_understood(algo: str, backend: str) -> None:
    layer, x = decision(algo, 4, 3).eval(), torch.randn(5, F)
    agents = torch.tensor([0, 2, 2, 1, 0])
    with use_backend(backend):
        expected = layer(x, start(x), agents)[2]
        for given in (agents[:, None], agents.int(), agents.byte(), agents.tolist(), agents.double().short()):
            assert torch.equal(layer(x, start(x), given)[2], expected)
            assert torch.equal(layer(x, start(x), prior_actions=given)[2], expected)
        for mask in ([1, 0, 1, 1, 1], torch.tensor([[1], [0], [1], [1], [1]]), torch.tensor([1, 0, 1, 1, 1]).byte()):
            made = layer(x, start(x), agents, mask)[2]
            assert torch.equal(made, expected * torch.tensor([1, 0, 1, 1, 1]))
        forced = torch.tensor([[3], [0], [1], [2], [0]], dtype=torch.int32)
        assert layer(x, start(x), agents, forced_actions=forced)[2].tolist() == [3, 0, 1, 2, 0]


@each_class
def test_one_agent_looks_at_no_agents(algo: str) -> None:
    """Upstream's second decision of a Sequential fails on the first one's actions."""
    layer, x = decision(algo, 4), torch.randn(5, F)
    for agents in (ZEROS + 7, [], None, "anything"):
        assert layer(x, start(x), agents)[2].shape == (5,)


@each_backend
@each_class
@pytest.mark.parametrize("agents", [[0], [2] * 5, [0, 0, 0, 2], []], ids=str)
def test_agents_with_a_sample_or_none(algo: str, agents: list[int], backend: str) -> None:
    """A batch in which some agent or module has one row or none trains, every time."""
    B = len(agents)
    with use_backend(backend):
        layer, select, x = decision(algo, 4, 3), linears(4), torch.randn(B, F)
        for mask in (None, torch.arange(B) < 1, torch.zeros(B, dtype=torch.bool)):
            y, meta, actions = layer(x, start(x), torch.tensor(agents, dtype=torch.int64), mask)
            y, meta, _ = select(y, meta, actions, mask)
            module_loss, routing_loss = Loss(nn.MSELoss(), NegLossReward())(y, meta, torch.zeros(B, F))
            assert module_loss.isfinite() and routing_loss.isfinite()
            if (module_loss + routing_loss).requires_grad:
                (module_loss + routing_loss).backward()


def test_negative_agents_where_counts_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: such samples are dropped, unless ``strict`` looks."""
    monkeypatch.setattr("fastroute.ops.dispatch.op.on_host", lambda offsets: None)
    layer, x = decision("REINFORCE", 3, 2), torch.randn(5, F)
    agents = torch.tensor([0, -1, 1, -1, 0])
    assert layer(x, start(x), agents)[2][[1, 3]].tolist() == [0, 0]
    with fastroute.strict(True):
        raises(IndexError, "agents: expected indices of 0 or more, got 2 that", lambda: layer(x, start(x), agents))


def test_strict() -> None:
    """On a CPU looking costs nothing: errors do not depend on ``strict``."""
    x = torch.randn(5, F)
    for enabled in (True, False):
        with fastroute.strict(enabled):
            raises(
                IndexError,
                "actions: expected indices below 3, got 1 of 5",
                lambda: linears(3)(x, start(x), ZEROS + torch.tensor([0, 3, 1, 0, -1])),
            )


# ----------------------------------------------------------------------------------------------------- selections

SELECTIONS: list[tuple[Any, type[Exception], str]] = [
    (lambda x: linears(3)(x, start(x), None), ValueError, "actions: .*among 3 modules by, got None"),
    (lambda x: linears(3)(x, start(x), [0.5] * 5), TypeError, r"actions: expected an integer tensor \[B\], got torch"),
    (lambda x: linears(3)(x, start(x), "12345"), TypeError, "actions: expected a tensor or a list of numbers, got"),
    (lambda x: linears(3)(x, start(x), torch.zeros(5)), TypeError, "actions: .*got torch.float32"),
    (lambda x: linears(3)(x, start(x), ZEROS.bool()), TypeError, "actions: .*got torch.bool"),
    (lambda x: linears(3)(x, start(x), ZEROS[:4]), ValueError, r"actions: expected one per sample, .*got \[4\]"),
    (lambda x: linears(3)(x, start(x), torch.zeros(1, 5).long()), ValueError, r"actions: .*got \[1, 5\]"),
    (lambda x: linears(3)(x, start(x), ZEROS + 3), IndexError, "actions: .*below 3, got 5 of 5 out of range"),
    (lambda x: linears(3)(x, start(x[:4]), ZEROS), ValueError, "meta: expected one entry per sample, 5, got 4"),
    (lambda x: linears(3)(x, start(x), ZEROS, torch.ones(5)), TypeError, "mask: .*got torch.float32"),
    (lambda x: linears(3)(x, start(x), ZEROS, torch.ones(6).bool()), ValueError, r"mask: .*\[5\], got \[6\]"),
    (lambda x: linears(3, 4)(x, start(x), ZEROS), ValueError, r"x: expected \[N, 4\], .*got \[5, 6\]"),
    (lambda x: linears(3)(x.double(), start(x), ZEROS), TypeError, "x: expected .* torch.float32, got torch.float64"),
    (lambda x: Selection(), TypeError, r"Selection: expected one or more modules, got \[\]"),
    (lambda x: Selection([]), TypeError, r"Selection: expected one or more modules, got \[\]"),
    (lambda x: Selection(nn.ReLU(), 3), TypeError, r"Selection: expected one or more modules, got \['ReLU', 'int'\]"),
    (lambda x: Selection(nn.ReLU), TypeError, r"Selection: expected one or more modules"),
    (lambda x: linears(3, dropped="zeros"), ValueError, "dropped: expected 'zero' or 'identity', got 'zeros'"),
    (lambda x: linears(3, unused_grad=None), ValueError, "unused_grad: expected 'none' or 'zeros', got None"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", SELECTIONS, ids=[c[2][:40] for c in SELECTIONS])
def test_selections(call: Any, error: Any, message: str) -> None:
    raises(error, message, lambda: call(torch.randn(5, F)))


def test_a_column_of_actions_is_understood() -> None:
    x, actions, layer = torch.randn(5, F), torch.tensor([0, 2, 1, 1, 2]), linears(3)
    expected = layer(x, start(x), actions)[0]
    for given in (actions[:, None], actions.int(), actions[:, None].byte()):
        assert torch.equal(layer(x, start(x), given)[0], expected)


# ------------------------------------------------------------------------------- initialization, sequential, the loss


def test_task_labels_of_another_length() -> None:
    x = torch.randn(5, F)
    for tasks in ([0, 1], torch.zeros(6), torch.zeros(4, 1)):
        raises(
            ValueError,
            r"tasks: expected one label per sample, 5, got \d",
            lambda tasks=tasks: Initialization()(x, tasks),
        )
        raises(
            ValueError, r"tasks: expected one label per sample, 5, got \d", lambda tasks=tasks: Sequential()(x, tasks)
        )
    raises(ValueError, "tasks: expected one label per sample, 5, got 2", lambda: Trajectory(5, [0, 1]))
    for tasks in ((), [], None):
        assert Initialization()(x, tasks)[1].tasks is None


def test_sequential() -> None:
    raises(TypeError, "Sequential: expected modules, got int as number 2", lambda: Sequential(nn.ReLU(), 3))
    raises(TypeError, "Sequential: expected modules, got type as number 1", lambda: Sequential(nn.ReLU))
    net = Sequential(decision("REINFORCE", 3, 2), linears(3))
    raises(ValueError, "agents: expected the agent of each sample", lambda: net(torch.randn(5, F)))
    raises(TypeError, "tasks: expected integers to choose agents", lambda: net(torch.randn(5, F), list("abcde")))
    raises(IndexError, "agents: expected indices below 2", lambda: net(torch.randn(5, F), [0, 1, 2, 0, 1]))
    assert net(torch.randn(5, F), [0, 1, 1, 0, 1])[0].shape == (5, F)


@pytest.mark.parametrize("cls", [PerTaskAssignment, PassThrough])
def test_decisions_that_learn_nothing(cls: Any) -> None:
    x = torch.randn(5, F)
    raises(ValueError, "meta: expected one entry per sample, 5, got 4", lambda: cls()(x, start(x[:4])))
    raises(TypeError, "mask: ", lambda: cls()(x, start(x, [0] * 5), None, torch.ones(5)))
    raises(TypeError, "forced_actions: ", lambda: cls()(x, start(x, [0] * 5), forced_actions=torch.ones(5)))


LOSSES: list[tuple[Any, Any, str]] = [
    (lambda x, m: Loss(nn.MSELoss, NegLossReward()), TypeError, "expected objects, got a class"),
    (lambda x, m: Loss(nn.MSELoss(), NegLossReward), TypeError, "expected objects, got a class"),
    (lambda x, m: Loss(3, NegLossReward()), TypeError, "pytorch_loss_func: expected .*, got 3"),
    (lambda x, m: Loss(nn.MSELoss(), "neg"), TypeError, "routing_reward_func: expected .*, got 'neg'"),
    (lambda x, m: Loss(nn.MSELoss(), NegLossReward(), 1.5), ValueError, "discounting: expected .*, got 1.5"),
    (lambda x, m: Loss(nn.MSELoss(), NegLossReward(), formula="x"), ValueError, "formula: "),
    (lambda x, m: LOSS(x, m), ValueError, r"ystrue: expected the targets \(or external_losses\), got None"),
    (lambda x, m: LOSS(x, m, x[:4]), ValueError, r"ystrue: expected one row per sample, 5, got \[4, 6\]"),
    (lambda x, m: LOSS(x[:4], m, x), ValueError, r"ysest: expected one row per sample .*5, got \[4, 6\]"),
    (lambda x, m: LOSS(x, m, None, torch.ones(4)), ValueError, r"external_losses: .*5, got \[4\]"),
    (lambda x, m: LOSS(x, m, None, torch.ones(())), ValueError, r"external_losses: .*got \[\]"),
    (lambda x, m: LOSS(x, "meta", x), TypeError, "mys: expected a Trajectory or a list of its samples, got"),
    (lambda x, m: Loss(nn.MSELoss(), lambda *a: torch.ones(2))(x, m, x), ValueError, r"routing_reward.*shape \[2\]"),
]  # fmt: skip
LOSS = Loss(nn.MSELoss(), NegLossReward())


@pytest.mark.parametrize("call, error, message", LOSSES, ids=[c[2][:40] for c in LOSSES])
def test_losses(call: Any, error: Any, message: str) -> None:
    x = torch.randn(5, F)
    _, meta, _ = decision("REINFORCE", 3)(x, start(x))
    raises(error, message, lambda: call(x, meta))


def test_rewards() -> None:
    for cls in (CollaborationReward, RunningAverageCollaborationReward):
        raises(ValueError, "num_actions: expected at least 1, got 0", lambda cls=cls: cls(0.1, 0))
        raises(ValueError, "history_window: expected at least 1, got 0", lambda cls=cls: cls(0.1, 3, 0))
        raises(ValueError, "formula: ", lambda cls=cls: cls(formula="literal"))
        unknown = cls(0.1)
        raises(
            ValueError,
            "num_actions: expected the number of actions, got None",
            lambda r=unknown: r.register_all(list, ZEROS) or r.rewards(list, ZEROS, torch.zeros(5)),
        )
        decision("REINFORCE", 7, additional_reward_func=unknown)  # which tells it
        assert unknown.num_actions == 7
    raises(ValueError, "rewards: expected num_actions = 3 of them, got 2", lambda: ManualReward([0.1, 0.2], 3))
    raises(ValueError, "formula: ", lambda: CorrectClassifiedReward(formula="x"))


# ---------------------------------------------------------------------------------------------------- other classes


def test_mlp() -> None:
    for args in ((0, 3), (3, 0), (3, 3, (2, 0)), (3, 2.5), ((3, 0), 2), (True, 2)):
        with pytest.raises((ValueError, TypeError), match="MLP: expected"):
            MLP(*args)
    assert MLP((2, 3), 4)(torch.zeros(1, 6)).shape == (1, 4)


@pytest.mark.parametrize("cls", [RoutingLSTMCell, RoutingGRUCell])
def test_cells(cls: Any) -> None:
    agent = networks.REINFORCE
    raises(TypeError, "routing_agent: expected a decision class", lambda: cls(6, 6, 3, 1, agent(3, 6)))
    raises(ValueError, "depth_routing: expected at least 1, got 0", lambda: cls(6, 6, 3, 0, agent))
    raises(
        TypeError,
        "unexpected keyword 'num_agent'; did you mean 'num_agents'",
        lambda: cls(6, 6, 3, 1, agent, num_agent=2),
    )


@each_class
def test_unknown_arguments_of_forward(algo: str) -> None:
    x = torch.randn(5, F)
    raises(TypeError, "unexpected keyword argument 'agent'", lambda: decision(algo)(x, start(x), agent=ZEROS))


def test_a_decision_of_ones_own() -> None:
    class Half(networks.Decision):
        pass

    x = torch.randn(3, F)
    raises(NotImplementedError, "Half decides nothing: it defines no decide", lambda: Half(3, F)(x, start(x)))
    entry = Entry("", 3, x[0], None, None, x[0], x[0])
    raises(NotImplementedError, "Half defines no loss_of", lambda: Half(3, F).loss_of(entry))
    raises(
        TypeError,
        "Old._decide: expected no override of a method that nobody calls here; override decide",
        lambda: type("Old", (Half,), {"_decide": None}),
    )


def test_state_of_another_shape() -> None:
    layer = decision("AAC", 4)
    state = copy.deepcopy(layer.state_dict())
    raises(RuntimeError, "size mismatch", lambda: decision("AAC", 5).load_state_dict(state))
    state.pop("_value_mem.0._approx._layers.0.bias")
    raises(RuntimeError, r"Missing key\(s\)", lambda: layer.load_state_dict(state))


def test_a_policy_net_of_the_wrong_width() -> None:
    """Its outputs are not as many as there are choices."""
    x = torch.randn(5, F)
    nets = [(algo, "policy_net", 4) for algo in LEARNING]
    nets += [("AAC", "value_net", 1), ("REINFORCEBl1", "value_net", 4), ("WPL", "qvalue_net", 4)]
    for algo, name, outputs in nets:
        for A in (1, 3):
            layer = getattr(networks, algo)(4, F, A, **{name: nn.Linear(F, 2 * outputs)})
            wanted = rf"{name}: expected outputs \[5, {outputs}\], got \[5, {2 * outputs}\]"
            raises(ValueError, wanted, lambda layer=layer: layer(x, start(x), ZEROS))


def test_an_empty_list_is_one_of_whole_numbers() -> None:
    """Torch takes it for float32."""
    x, made = torch.randn(0, F), [torch.zeros(0, dtype=torch.int64), []]
    meta = start(x)
    for one in made:
        select = linears(3)
        assert select(x, meta, one)[0].shape == select(x, meta, one, [])[0].shape == select(x, meta, made[0])[0].shape
        assert networks.REINFORCE(3, F, num_agents=2)(x, meta, one)[2].shape == (0,)
        assert decision("REINFORCE")(x, meta, forced_actions=one)[2].shape == (0,)
        meta.add_rewards(one)
        assert fastroute.EfficientVectorRouting(-1, 3, 8, 4)(torch.randn(0, 5, 8), lengths=one).shape == (0, 3, 4)
        net = networks.Sequential(networks.WPL(3, F, num_agents=2), linears(3))
        assert net(x, tasks=one)[0].shape[0] == 0 and net(x, tasks=one)[1].tasks is not None
    assert start(torch.randn(2, F), tasks=[]).tasks is None  # upstream's "none"
    with pytest.raises((TypeError, ValueError), match=r"^actions: "):
        linears(3)(torch.randn(2, F), start(torch.randn(2, F)), [])
