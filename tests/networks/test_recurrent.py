"""Recurrent cells with routed projections: upstream's numbers, and a sample-by-sample restatement of the equations."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastroute import networks
from fastroute.networks import (
    REINFORCE,
    CollaborationReward,
    Loss,
    NegLossReward,
    PerTaskAssignment,
    RoutingGRUCell,
    RoutingLSTMCell,
    Trajectory,
)
from tests.helpers import golden, seeds

B, IN, H, K = 7, 5, 4, 3
CELLS = [RoutingLSTMCell, RoutingGRUCell]
LEARNING = [
    name
    for name, cls in vars(networks).items()
    if isinstance(cls, type) and issubclass(cls, networks.Decision) and cls is not networks.Decision
]
SETTINGS = list(itertools.product([(False, False), (True, False), (False, True), (True, True)], [1, 3], [False, True]))

each_cell = pytest.mark.parametrize("cell_class", CELLS, ids=lambda c: c.__name__)
each_setting = pytest.mark.parametrize(("routed", "depth", "recurrent"), SETTINGS)


def build(cell_class: Any, routed: tuple[bool, bool], depth: int, recurrent: bool, **options: Any) -> Any:
    options = {"dtype": torch.float64, "routing_agent": REINFORCE, **options}
    seeds.manual_seed(3)
    agent = options.pop("routing_agent")
    return cell_class(IN, H, K, depth, agent, *routed, recurrent, **options)


def inputs(cell: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Any]:
    generator = seeds.generator(5)
    x, h, c = (torch.randn(B, n, dtype=dtype, generator=generator) for n in (IN, H, H))
    return x, (h, c) if isinstance(cell, RoutingLSTMCell) else h


def random_actions(cell: Any, seed: int = 0) -> Tensor:
    decisions = cell.depth_routing * (cell.route_i2h + cell.route_h2h)
    choices = K + 1 if cell.recurrent else K
    return torch.randint(choices, (decisions, B), generator=seeds.generator(seed))


def parts(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


# ------------------------------------------------------------------------------------- the equations, sample by sample


def literal_projection(cell: Any, name: str, y: Tensor, actions: list[int], upstream: bool) -> Tensor:
    """y [1, in] -> [1, G H]."""
    linear, selections = getattr(cell, f"linear_{name}", None), getattr(cell, f"selection_{name}", None)
    if selections is None:
        return linear(y)
    if cell.recurrent:
        y = linear(y)
        for a in actions:
            if a == 0:
                return y
            y = selections[0]._submodules[a - 1](cell.nonlin(y))
        return y
    for layer, a in enumerate(actions):
        if upstream and a == 0:
            return torch.zeros(1, cell._gates * H, dtype=y.dtype)
        y = selections[layer]._submodules[a](cell.nonlin(y) if layer else y)
    return y


def literal(cell: Any, x: Tensor, state: Any, actions: Tensor, upstream: bool = False) -> tuple[Tensor, ...]:
    rows = []
    for b in range(len(x)):
        mine = actions[:, b].tolist()
        depth = cell.depth_routing if cell.route_i2h else 0
        own = [s[b : b + 1] for s in parts(state)]
        i = literal_projection(cell, "i2h", x[b : b + 1], mine[:depth], upstream)
        s = literal_projection(cell, "h2h", own[0], mine[depth:], upstream)
        if cell._gates == 4:
            a, f, o, g = (i + s).chunk(4, 1)
            c = f.sigmoid() * own[1] + a.sigmoid() * g.tanh()
            rows.append((o.sigmoid() * c.tanh(), c))
        else:
            r, z = (i + s)[:, : 2 * H].sigmoid().chunk(2, 1)
            n = (i[:, 2 * H :] + r * s[:, 2 * H :]).tanh()
            rows.append(((1 - z) * n + z * own[0],))
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def close(found: Any, expected: Any) -> None:
    """The same sums in another order, in float64: 64 roundings of numbers below 1 or so."""
    for f, e in zip(parts(found), parts(expected), strict=True):
        assert f.shape == e.shape and float((f - e).detach().abs().max()) <= 64 * torch.finfo(torch.float64).eps


# ------------------------------------------------------------------------------------------------------------- upstream


@pytest.mark.parametrize("file", golden.names("networks", "lstm_*.pt"))
def test_upstreams_numbers(file: str) -> None:
    g = golden.load("networks", file)
    _, depth, routed = file.removesuffix(".pt").split("_")
    cell = RoutingLSTMCell(6, 6, 4, int(depth[1]), REINFORCE, "i" in routed, "h" in routed, formula="upstream").eval()
    assert list(cell.state_dict()) == list(g["state_dict"])
    cell.load_state_dict(g["state_dict"], strict=True)
    (h, c), meta = cell(g["x"], (g["h0"], g["c0"]))
    assert [[int(step["actions"]) for step in sample.steps] for sample in meta] == g["actions"]
    for found, expected in ((h, g["h1"]), (c, g["c1"])):
        assert found.dtype == expected.dtype == torch.float32
        # sums of 24 products in float32
        assert float((found - expected).detach().abs().max()) <= 24 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("routed", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("depth", [1, 3])
def test_upstreams_formula(routed: tuple[bool, bool], depth: int) -> None:
    """Action 0 stops with a zero row."""
    cell = build(RoutingLSTMCell, routed, depth, False, formula="upstream")
    x, state = inputs(cell)
    actions = random_actions(cell)
    found, meta = cell(x, state, forced_actions=actions)
    close(found, literal(cell, x, state, actions, upstream=True))
    recorded = torch.stack([r.active if r.active is not None else torch.ones(B).bool() for r in meta.records])
    alive = torch.ones(B, dtype=torch.bool)
    for t, acts in enumerate(actions):
        if t % depth == 0:
            alive = torch.ones(B, dtype=torch.bool)
        assert torch.equal(recorded[t], alive)
        alive = alive & (acts != 0)


def test_upstreams_formula_with_a_mask() -> None:
    """Samples left out go on from zero rows."""
    cell = build(RoutingLSTMCell, (True, True), 1, False, formula="upstream")
    x, state = inputs(cell)
    mask = torch.arange(B) % 2 == 0
    actions = random_actions(cell)
    found, _ = cell(x, state, mask=mask, forced_actions=actions)
    close(found, literal(cell, x, state, torch.where(mask, actions, 0), upstream=True))


# ----------------------------------------------------------------------------------------------------------- the cells


@each_cell
@each_setting
def test_equations(cell_class: Any, routed: tuple[bool, bool], depth: int, recurrent: bool) -> None:
    cell = build(cell_class, routed, depth, recurrent)
    x, state = inputs(cell)
    for seed in range(3):
        actions = random_actions(cell, seed)
        found, meta = cell(x, state, forced_actions=actions)
        close(found, literal(cell, x, state, actions))
        assert len(meta.records) == len(actions)


@each_cell
@each_setting
def test_gradients(cell_class: Any, routed: tuple[bool, bool], depth: int, recurrent: bool) -> None:
    """Finite differences of the state and the input, and of every module's parameters."""
    cell = build(cell_class, routed, depth, recurrent, nonlin=torch.tanh)
    x, state = inputs(cell)
    actions = random_actions(cell)
    mask = torch.arange(B) != 2
    trained = {k: p.detach().requires_grad_() for k, p in cell.named_parameters() if not k.startswith("router")}

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        n = cell._gates - 2 if cell._gates == 4 else 1
        hidden = rest[:n] if n > 1 else rest[0]
        parameters = dict(zip(trained, rest[n:], strict=True))
        made, _ = functional_call(cell, parameters, (x, hidden, None, None, mask), {"forced_actions": actions})
        return parts(made)

    leaves = [x.requires_grad_(), *(s.requires_grad_() for s in parts(state)), *trained.values()]
    torch.autograd.gradcheck(run, leaves, fast_mode=True)


@each_cell
@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_in_eval(cell_class: Any, depth: int) -> None:
    """Greedy actions are constant around a point, so the outputs differ as much as the gradients say."""
    cell = build(cell_class, (True, True), depth, False, nonlin=torch.tanh).eval()
    x, state = inputs(cell)

    def run(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return parts(cell(x, state if len(state) > 1 else state[0])[0])

    torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, *parts(state))], fast_mode=True)


def test_gru_is_torchs() -> None:
    """With one module there is one choice, and then the cell is PyTorch's."""
    cell = build(RoutingGRUCell, (True, True), 1, False)
    cell = RoutingGRUCell(IN, H, 1, 1, REINFORCE, True, True, dtype=torch.float64)
    theirs = nn.GRUCell(IN, H, dtype=torch.float64)
    copy_weights(cell, theirs, torch.arange(3 * H))
    x, h = inputs(cell)
    close(cell(x, h)[0], theirs(x, h))
    close(cell(x)[0], theirs(x))


def test_lstm_is_torchs() -> None:
    """But for the order of gates: i f o g here, i f g o there."""
    cell = RoutingLSTMCell(IN, H, 1, 1, REINFORCE, True, True, dtype=torch.float64)
    theirs = nn.LSTMCell(IN, H, dtype=torch.float64)
    i, f, g, o = torch.arange(4 * H).chunk(4)
    copy_weights(cell, theirs, torch.cat([i, f, o, g]))
    x, state = inputs(cell)
    close(cell(x, state)[0], theirs(x, state))
    close(cell(x)[0], theirs(x))


def copy_weights(cell: Any, theirs: Any, order: Tensor) -> None:
    with torch.no_grad():
        for mine, name in ((cell.selection_i2h, "ih"), (cell.selection_h2h, "hh")):
            mine[0]._submodules[0].weight.copy_(getattr(theirs, f"weight_{name}")[order])
            mine[0]._submodules[0].bias.copy_(getattr(theirs, f"bias_{name}")[order])


@each_cell
@each_setting
def test_masking_is_deleting(cell_class: Any, routed: tuple[bool, bool], depth: int, recurrent: bool) -> None:
    cell = build(cell_class, routed, depth, recurrent)
    x, state = inputs(cell)
    mask = torch.tensor([True, False, True, True, False, True, False])
    actions = random_actions(cell)
    found, meta = cell(x, state, mask=mask, forced_actions=torch.where(mask, actions, -1))
    few = tuple(s[mask] for s in parts(state))
    deleted, _ = cell(x[mask], few if len(few) > 1 else few[0], forced_actions=actions[:, mask])
    for new, old, alone in zip(parts(found), parts(state), parts(deleted), strict=True):
        assert torch.equal(new[~mask], old[~mask])
        close(new[mask], alone)
    assert not meta.active[:, ~mask].any()
    nobody, meta = cell(x, state, mask=torch.zeros(B, dtype=torch.uint8))
    assert all(torch.equal(new, old) for new, old in zip(parts(nobody), parts(state), strict=True))
    assert not meta.active.any()


@each_cell
def test_stopping_keeps_the_row(cell_class: Any) -> None:
    """Samples that stop at once have the plain projection, whatever depth the others reach; none decides again."""
    cell = build(cell_class, (True, True), 3, True)
    plain = build(cell_class, (False, False), 3, True)
    plain.load_state_dict({k: v for k, v in cell.state_dict().items() if k.startswith("linear")}, strict=True)
    x, state = inputs(cell)
    actions = random_actions(cell)
    actions[[0, 3], :3] = 0
    found, meta = cell(x, state, forced_actions=actions)
    expected, _ = plain(x, state)
    for new, old in zip(parts(found), parts(expected), strict=True):
        close(new[:3], old[:3])
        assert (new[3:] != old[3:]).any()
    alive = torch.ones(B, dtype=torch.bool)
    for t, active in enumerate(meta.active):
        alive = torch.ones(B, dtype=torch.bool) if t == 3 else alive
        assert torch.equal(active, alive)
        alive = alive & (actions[t] != 0)


@each_cell
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_trajectory_replays(cell_class: Any, recurrent: bool) -> None:
    """A run's recorded actions, -1 where there was no decision, give the run again."""
    cell = build(cell_class, (True, True), 3, recurrent)
    x, state = inputs(cell)
    mask = torch.arange(B) != 4
    seeds.manual_seed(0)
    found, meta = cell(x, state, mask=mask)
    again, replayed = cell(x, state, mask=mask, forced_actions=meta.actions)
    assert all(torch.equal(a, b) for a, b in zip(parts(found), parts(again), strict=True))
    assert torch.equal(meta.actions, replayed.actions)


@each_cell
@pytest.mark.parametrize("recurrent", [False, True])
def test_samples_do_not_mix(cell_class: Any, recurrent: bool) -> None:
    """A permutation of the samples permutes the results, and a NaN stays in its sample."""
    cell = build(cell_class, (True, True), 2, recurrent).eval()
    x, state = inputs(cell)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    found, meta = cell(x, state)
    shuffled = tuple(s[order] for s in parts(state))
    permuted, other = cell(x[order], shuffled if len(shuffled) > 1 else shuffled[0])
    assert torch.equal(meta.actions[:, order], other.actions)
    close(tuple(s[order] for s in parts(found)), permuted)
    x[1] = torch.nan
    spoilt, _ = cell(x, state)
    for new, old in zip(parts(spoilt), parts(found), strict=True):
        assert new[1].isnan().any()
        rest = torch.arange(B) != 1
        close(new[rest], old[rest])


# ------------------------------------------------------------------------------------------------------------- learning


class Last(nn.Module):
    """Reads a sequence and classifies its last state."""

    def __init__(self, cell: Any, classes: int) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, classes)

    def forward(self, xs: Tensor, agents: Any = None, tasks: Any = None) -> tuple[Tensor, Trajectory]:
        state, meta = None, Trajectory(len(xs), tasks)
        for x in xs.unbind(1):
            state, meta = self.cell(x, state, meta, agents)
        return self.head(parts(state)[0]), meta


@each_cell
@pytest.mark.parametrize("recurrent", [False, True])
def test_sequences_train(cell_class: Any, recurrent: bool) -> None:
    """Which half of a sequence has the larger sum: learned with the decisions of all time steps in one trajectory."""
    seeds.manual_seed(0)
    xs = torch.randn(128, 4, 2)
    ys = (xs[:, :2, 0].sum(1) > xs[:, 2:, 0].sum(1)).long()
    model = Last(cell_class(2, 12, 2, 2, REINFORCE, True, True, recurrent), 2)
    loss = Loss(nn.CrossEntropyLoss(), NegLossReward())
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    seen = []
    for _ in range(50):
        out, meta = model(xs)
        module_loss, routing_loss = loss(out, meta, ys)
        optimizer.zero_grad()
        (module_loss + 0.1 * routing_loss).backward()
        optimizer.step()
        seen.append(float(module_loss.detach()))
    assert len(meta.records) == 4 * 4
    assert sum(seen[-10:]) / 10 < 0.6 * seen[0]


def test_loss_sums_over_time() -> None:
    """REINFORCE's loss of a sequence, written out: one decision object, an entry per time step."""
    cell = build(RoutingLSTMCell, (False, True), 1, False)
    xs = torch.randn(B, 4, IN, dtype=torch.float64)
    model = Last(cell, 3).double()
    out, meta = model(xs)
    ys = torch.arange(B) % 3
    module_loss, routing_loss = Loss(nn.CrossEntropyLoss(), NegLossReward())(out, meta, ys, reduce=False)
    log_p = sum(r.columns[0].at(r.actions) for r in meta.records)
    assert isinstance(log_p, Tensor)
    close(routing_loss, log_p * module_loss.detach())  # -log p R, R minus the loss
    routing_loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cell.router_h2h.parameters())


#: Whose loss is a sum over entries: in some of upstream's formulas the entries of one object mix.
MIXED = ("AAC", "BootstrapAAC", "EGreedyREINFORCE", "EGreedyAAC")
SUMS = [
    (name, formula)
    for name in LEARNING
    for formula in ("intended", "upstream")
    if name not in ("GumbelSoftmax", "RELAX") and not (formula == "upstream" and name in MIXED)
]


@pytest.mark.parametrize(("algo", "formula"), SUMS)
def test_a_decision_taken_again_is_two_alike(algo: str, formula: str) -> None:
    """One decision object at every step learns what as many copies of it learn together."""
    seeds.manual_seed(1)
    decide = getattr(networks, algo)(K, IN, formula=formula, exploration=0.5, dtype=torch.float64)
    xs = torch.randn(3, B, IN, dtype=torch.float64)
    actions = torch.randint(K, (3, B))
    masks = torch.rand(3, B) < 0.7
    for active in (None, masks):
        losses, grads = [], []
        for layers in ([decide] * 3, [copy.deepcopy(decide) for _ in range(3)]):
            meta = Trajectory(B)
            for t, layer in enumerate(layers):
                layer(xs[t], meta, mask=None if active is None else active[t], forced_actions=actions[t])
            external = xs[0, :, 0].square()
            _, loss = Loss(nn.CrossEntropyLoss(), NegLossReward(), discounting=0.9)(
                external, meta, external_losses=external, reduce=False
            )
            made = [
                torch.autograd.grad(loss.sum(), list(x.parameters()), retain_graph=True) for x in dict.fromkeys(layers)
            ]
            losses.append(loss)
            grads.append(torch.cat([sum(column).flatten() for column in zip(*made, strict=True)]))  # type: ignore[union-attr]
        close(losses[0], losses[1])
        assert float((grads[0] - grads[1]).abs().max()) <= 1e-12 * float(grads[1].abs().max())


@each_cell
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("formula", ["intended", "upstream"])
@pytest.mark.parametrize("algo", LEARNING)
def test_every_decision_class(algo: str, formula: str, recurrent: bool, cell_class: Any) -> None:
    agent = getattr(networks, algo)
    cell = build(cell_class, (True, True), 2, recurrent, routing_agent=agent, num_agents=2, formula=formula)
    assert all(d.formula == formula for d in cell.modules() if isinstance(d, networks.Decision))
    model = Last(cell, 3).double()
    agents = torch.arange(B) % 2
    out, meta = model(torch.randn(B, 3, IN, dtype=torch.float64), agents)
    module_loss, routing_loss = Loss(nn.CrossEntropyLoss(), NegLossReward(), formula=formula)(
        out, meta, torch.arange(B) % 3
    )
    (module_loss + routing_loss).backward()
    grads = [p.grad for p in cell.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)
    cell.eval()
    assert Last(cell, 3).double()(torch.randn(B, 2, IN, dtype=torch.float64), agents)[0].isfinite().all()


@each_cell
def test_tasks_choose_modules(cell_class: Any) -> None:
    """A decision that learns nothing: the module of the task."""
    cell = build(cell_class, (True, True), 1, False, routing_agent=PerTaskAssignment)
    x, state = inputs(cell)
    tasks = [2, 0, 1, 1, 0, 2, 2]
    found, meta = cell(x, state, Trajectory(B, tasks))
    close(found, literal(cell, x, state, torch.tensor([tasks, tasks])))
    assert not meta.records


@each_cell
def test_agents_and_rewards(cell_class: Any) -> None:
    reward = CollaborationReward(0.3, K, 16)
    cell = build(
        cell_class, (True, True), 2, False, num_agents=3, policy_storage_type="tabular", additional_reward_func=reward,
        exploration=0.2, approx_hidden_dims=(8,), detach=False, set_pg_temp=True,
    )  # fmt: skip
    decisions = [d for d in cell.modules() if isinstance(d, networks.Decision)]
    assert len(decisions) == 4
    for d in decisions:
        assert d.additional_reward_func is reward
        assert (d._num_agents, d._exploration, d._storage_type, d._detach) == (3, 0.2, "tabular", False)
    x, state = inputs(cell)
    agents = torch.arange(B) % 3
    _, meta = cell(x, state, None, agents)
    assert torch.equal(meta.agents, agents.expand(4, B))
    assert int((reward.history >= 0).sum()) == min(16, 4 * B)


def test_the_recurrent_decision_has_one_choice_more() -> None:
    with pytest.raises(ValueError, match="num_actions: expected at least the decision's 4 choices, got 3"):
        build(RoutingLSTMCell, (False, True), 2, True, additional_reward_func=CollaborationReward(0.3, K))
    cell = build(RoutingLSTMCell, (True, True), 3, True, additional_reward_func=CollaborationReward(0.3, K + 1))
    assert sorted({k.rpartition("._")[0] for k in cell.state_dict() if "selection" in k}) == [
        "selection_h2h.0", "selection_i2h.0",
    ]  # fmt: skip
    assert cell.state_dict()["router_i2h.0._policy.0._approx._layers.0.weight"].shape == (K + 1, 4 * H)


# ---------------------------------------------------------------------------------------------- dtypes, initial values


@each_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("recurrent", [False, True])
def test_dtypes(cell_class: Any, dtype: torch.dtype, recurrent: bool) -> None:
    cell = build(cell_class, (True, True), 2, recurrent, dtype=dtype)
    assert all(p.dtype == dtype for p in cell.parameters())
    x, state = inputs(cell, dtype)
    for given in (state, None):
        found, _ = cell(x, given)
        assert all(s.dtype == dtype and s.shape == (B, H) and s.isfinite().all() for s in parts(found))


@each_cell
@pytest.mark.parametrize("recurrent", [False, True])
def test_autocast(cell_class: Any, recurrent: bool) -> None:
    cell = build(cell_class, (True, True), 2, recurrent, dtype=torch.float32)
    x, state = inputs(cell, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = cell(x, state)
    sum(s.float().sum() for s in parts(found)).backward()  # type: ignore[union-attr]
    assert all(s.isfinite().all() for s in parts(found))


@each_cell
def test_initial_values(cell_class: Any) -> None:
    """Uniform in +-1 / sqrt(H), the decisions' tables as well."""
    cell = cell_class(30, 25, 4, 2, REINFORCE, True, True, policy_storage_type="tabular", num_agents=20)
    for name, p in cell.named_parameters():
        assert float(p.detach().abs().max()) <= 0.2, name
    numbers = torch.cat([p.detach().flatten() for p in cell.parameters()])
    assert float(numbers.mean().abs()) < 0.01 and float(numbers.std()) == pytest.approx(0.4 / 12**0.5, rel=0.02)
    tables = torch.cat([p.detach().flatten() for k, p in cell.named_parameters() if "_policy" in k])
    assert float(tables.std()) == pytest.approx(0.4 / 12**0.5, rel=0.2)


@each_cell
def test_on_the_meta_device(cell_class: Any) -> None:
    cell = build(cell_class, (True, True), 2, True, device="meta")
    assert all(p.device.type == "meta" for p in cell.parameters())


@each_cell
def test_empty_batch(cell_class: Any) -> None:
    for recurrent in (False, True):
        cell = build(cell_class, (True, True), 2, recurrent)
        found, meta = cell(torch.empty(0, IN, dtype=torch.float64))
        assert all(s.shape == (0, H) for s in parts(found)) and len(meta) == 0


def test_it_prints() -> None:
    assert "routed=i2h+h2h, recurrent=True" in repr(build(RoutingGRUCell, (True, True), 2, True))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features: expected at least 1, got 0"),
        ({"hidden_size": 2.5}, TypeError, "hidden_size: expected an int, got 2.5"),
        ({"num_selections": 0}, ValueError, "num_selections: expected at least 1"),
        ({"depth_routing": 0}, ValueError, "depth_routing: expected at least 1"),
        ({"routing_agent": REINFORCE(2, 3)}, TypeError, "routing_agent: expected a decision class"),
        ({"routing_agent": "REINFORCE"}, TypeError, "routing_agent: expected a decision class"),
        ({"formula": "other"}, ValueError, "formula: expected 'intended' or 'upstream'"),
        ({"explorations": 0.1}, TypeError, "unexpected keyword 'explorations'; did you mean 'exploration'"),
        ({"explorations": 0.1, "route_h2h": False}, TypeError, "unexpected keyword 'explorations'"),
        ({"policy_storage_type": "table"}, ValueError, "policy_storage_type"),
        ({"num_agents": 0}, ValueError, "num_agents: expected at least 1"),
    ],
)
@each_cell
def test_wrong_arguments(cell_class: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"in_features": IN, "hidden_size": H, "num_selections": K, "depth_routing": 2, "routing_agent": REINFORCE}
    with pytest.raises(error, match=message):
        cell_class(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(B, 3, IN)}, ValueError, r"x: expected one time step, shape \[B, 5\], got \[7, 3, 5\]"),
        ({"x": torch.zeros(IN)}, ValueError, r"x: expected one time step, shape \[B, 5\], got \[5\]"),
        ({"x": torch.zeros(B, IN + 1)}, ValueError, r"x: .* got \[7, 6\]"),
        ({"x": torch.zeros(B, IN).long()}, TypeError, "x: expected a floating-point tensor"),
        ({"x": [[1.0] * IN]}, TypeError, r"x: expected a tensor \[B, 5\], got list"),
        ({"meta": Trajectory(B + 1)}, ValueError, "meta: expected one entry per sample, 7, got 8"),
        ({"meta": [1] * B}, TypeError, "meta: expected a Trajectory"),
        ({"mask": torch.ones(B + 1)}, TypeError, "mask: expected bool"),
        ({"mask": torch.ones(B + 1, dtype=torch.bool)}, ValueError, r"mask: expected one per sample, shape \[7\]"),
        ({"forced_actions": torch.zeros(1, B).long()}, ValueError, r"forced_actions: .* shape \[4, 7\], got \[1, 7\]"),
        ({"forced_actions": torch.full((4, B), K)}, IndexError, "forced_actions: expected indices from 0 to 2"),
        ({"forced_actions": torch.zeros(4, B)}, TypeError, "forced_actions: expected an integer tensor"),
    ],
)
@each_cell
def test_wrong_inputs(cell_class: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    cell = build(cell_class, (True, True), 2, False, dtype=torch.float32)
    with pytest.raises(error, match=message):
        cell(**{"x": torch.zeros(B, IN), **changed})


def test_wrong_states() -> None:
    lstm, gru = (build(c, (True, True), 2, False, dtype=torch.float32) for c in CELLS)
    x, h = torch.zeros(B, IN), torch.zeros(B, H)
    with pytest.raises(TypeError, match=r"hidden: expected the pair \(h, c\), got a tensor \[7, 4\]"):
        lstm(x, h)
    with pytest.raises(ValueError, match=r"c: expected shape \[7, 4\], got \[7, 5\]"):
        lstm(x, (h, torch.zeros(B, H + 1)))
    with pytest.raises(TypeError, match=r"hidden: expected a tensor \[B, 4\], got tuple"):
        gru(x, (h, h))
    with pytest.raises(ValueError, match=r"hidden: expected shape \[7, 4\], got \[3, 4\]"):
        gru(x, h[:3])
    with pytest.raises(ValueError, match="c: expected a tensor on cpu like x, got one on meta"):
        lstm(x, (h, h.to("meta")))
    for routed, name, given in (((False, True), "x", (x.double(), h)), ((True, False), "h", (x, h.double()))):
        with pytest.raises(
            TypeError, match=f"^{name}: expected torch.float32 on cpu like the parameters, got a tensor"
        ):
            build(RoutingGRUCell, routed, 2, False, dtype=torch.float32)(*given)
    with pytest.raises(ValueError, match="agents: expected the agent of each sample"):
        build(RoutingGRUCell, (True, True), 2, False, num_agents=2, dtype=torch.float32)(x, h)
