"""Every class's loss, both formulas, against the formulas written out sample by sample (``tests/helpers/losses.py``).

Random networks in float64: several layers of one or of different classes, several K, masks, shared layers, per-action
rewards, discounting, rewards added by hand. Values and all gradients.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fastroute import networks
from fastroute.networks import Loss, Trajectory
from tests.helpers import seeds
from tests.helpers.losses import routing_losses
from tests.helpers.networks import COLUMNS, FORMULAS, F, columns, decision, linears, scatter_tables, start
from tests.helpers.opcheck import assert_same

F64 = torch.float64
CLASSES = tuple(name for name in COLUMNS if name != "RELAX")


class Told:
    """A reward as users wrote them for upstream: one sample at a time, and of the state too."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def register(self, dist: Tensor, action: Tensor) -> None:
        assert dist.dim() == 3 and dist.shape[0] == 1
        self.seen.append(int(action))

    def clear(self) -> None:
        self.seen = []

    def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
        return 0.1 * len(self.seen) + dist[0, int(action), 0] + action.detach()


class Naive:
    """What each of the rewards is, from the list of all actions registered so far."""

    def __init__(self, kind: str, K: int, formula: str) -> None:
        self.kind, self.K, self.formula, self.seen = kind, K, formula, list[int]()

    def made(self) -> Any:
        if self.kind == "none":
            return None
        if self.kind == "told":
            return Told()
        if self.kind == "manual":
            return networks.ManualReward([0.5, -0.25, 0.125, 1.0, 2.0][: self.K])
        cls = networks.CollaborationReward if self.kind == "collab" else networks.RunningAverageCollaborationReward
        return cls(0.5, self.K, 7, formula=self.formula)

    def of(self, state: Tensor, a: int) -> float:
        if self.kind == "told":
            return 0.1 * len(self.seen) + float(state.detach()[a, 0]) + a
        if self.kind == "manual":
            return [0.5, -0.25, 0.125, 1.0, 2.0][a]
        if self.kind == "collab":
            last = self.seen[-7:] or [-1]
            return last.count(a) / len(last) * (0.25 if self.formula == "upstream" else 0.5)
        if self.kind == "running":
            k, e = 10 ** (-1 / 7), [0.0] * self.K
            for action in self.seen:
                e = [k * x + (1 - k) * (i == action) for i, x in enumerate(e)]
                e = [x / sum(e) for x in e]
            return e[a] * 0.5
        return 0.0


def tell(cls: str, K: int, A: int, formula: str, naive: Naive, tabular: bool) -> networks.Decision:
    made = decision(
        cls, K, A, formula=formula, exploration=0.4, dtype=F64, policy_storage_type="tabular" if tabular else "approx",
        additional_reward_func=naive.made(),
    )  # fmt: skip
    scatter_tables(made, K)
    return made


@st.composite
def set_ups(draw: st.DrawFn, first: str) -> dict[str, Any]:
    T = draw(st.integers(1, 4))
    classes = [first] + [draw(st.sampled_from((first, *CLASSES))) for _ in range(T - 1)]
    return {
        "classes": classes,
        "K": [draw(st.sampled_from([2, 3, 3, 5])) for _ in range(T)],
        "again": draw(st.booleans()),  # the first layer is used a second time
        "kinds": [draw(st.sampled_from(["none", "none", "collab", "running", "manual", "told"])) for _ in range(T)],
        "B": draw(st.integers(1, 6)),
        "A": draw(st.sampled_from([1, 3])),
        "tabular": draw(st.booleans()),
        "masked": draw(st.booleans()),
        "added": draw(st.booleans()),
        "gamma": draw(st.sampled_from([1.0, 0.7, 0.0])),
        "normalize": draw(st.booleans()),
        "train": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def run(p: dict[str, Any], formula: str) -> tuple[Tensor, Tensor, list[Tensor], Trajectory]:
    """The library's losses and the oracle's, and the parameters."""
    seeds.manual_seed(p["seed"])
    B, A = p["B"], p["A"]
    naives = [Naive(kind, K, formula) for kind, K in zip(p["kinds"], p["K"], strict=True)]
    layers: list[Any] = [
        tell(cls, K, A, formula, naive, p["tabular"])
        for cls, K, naive in zip(p["classes"], p["K"], naives, strict=True)
    ]
    if p["again"]:
        layers.append(layers[0])
        naives.append(naives[0])
    x = torch.randn(B, F, dtype=F64)
    meta, agents = start(x), torch.randint(A, (B,))
    for t, (layer, naive) in enumerate(zip(layers, naives, strict=True)):
        layer.train(p["train"])
        mask = torch.rand(B) < 0.6 if p["masked"] else None
        x, meta, actions = layer(x, meta, agents, mask)
        if p["train"] or formula == "upstream":
            naive.seen += [int(a) for b, a in enumerate(actions) if mask is None or mask[b]]
        if p["added"] and t % 2 == 0:
            for b in range(0, B, 2):
                if meta[b].steps:
                    meta[b].append("add_rewards", 0.3 * b + t)
        x, meta, _ = linears(layer._num_selections).double()(x, meta, actions, mask)
    losses = torch.randn(B, dtype=F64)
    loss = Loss(
        nn.MSELoss(), networks.NegLossReward(), p["gamma"], normalize_per_action_rewards=p["normalize"], formula=formula
    )
    _, ours = loss(x, meta, None, external_losses=losses, reduce=False)

    known = {layer.loss_func: (layer, naive) for layer, naive in zip(layers, naives, strict=True)}
    histories = []
    for b in range(B):
        history = []
        for step in meta[b].steps:
            layer, naive = known[step["loss_funcs"]]
            state, a = step["states"][0], int(step["actions"])
            reward = naive.of(state, a) + step.get("add_rewards", 0.0)
            width = columns(type(layer).__name__, formula)
            assert not state[:, width:].any()
            history.append({
                "algo": type(layer).__name__, "id": id(layer), "a": a, "own": torch.tensor(reward, dtype=F64),
                "state": [state[:, i] for i in range(width)],
            })  # fmt: skip
        histories.append(history)
    gamma = 1.0 if formula == "upstream" else p["gamma"]
    truth = routing_losses(histories, -losses, gamma=gamma, normalize=p["normalize"], formula=formula)
    return ours, truth, [w for layer in dict.fromkeys(layers) for w in layer.parameters()], meta


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("cls", CLASSES)
@hypothesis.settings(max_examples=8)
@hypothesis.given(data=st.data())
def test_losses(cls: str, formula: str, data: st.DataObject) -> None:
    p = data.draw(set_ups(cls))
    ours, truth, weights, _ = run(p, formula)
    assert_same(ours.detach(), truth.detach())
    cotangent = torch.randn(len(ours), dtype=F64)
    if not (truth.requires_grad or ours.requires_grad):
        return
    both = []
    for made in (ours, truth):
        if made.requires_grad:
            both.append(torch.autograd.grad(made, weights, cotangent, retain_graph=True, allow_unused=True))
        else:
            both.append((None,) * len(weights))
    for got, expected in zip(*both, strict=True):
        if got is None or expected is None:
            rest = expected if got is None else got
            assert rest is None or not rest.any()
        else:
            assert_same(got, expected)


def test_several_seeds_have_several_losses() -> None:
    """The test above compares something: losses differ between samples, classes and formulas."""
    p = {
        "classes": ["ActorCritic", "WPL", "QLearning"], "K": [3, 3, 5], "kinds": ["collab", "told", "manual"],
        "again": False,
        "B": 5, "A": 3, "tabular": False, "masked": True, "added": True, "gamma": 0.7, "normalize": True, "train": True,
        "seed": 0,
    }  # fmt: skip
    vectors = [run(p, "intended")[0], run(p, "upstream")[0], run(p | {"gamma": 1.0}, "intended")[0]]
    vectors.append(run(p | {"normalize": False}, "intended")[0])
    assert all(not torch.equal(a, b) for i, a in enumerate(vectors) for b in vectors[:i])
    assert len(set(vectors[0].tolist())) > 1


# ----------------------------------------------------------------------------------------------------------- RELAX


def relaxed(made: Any, x: Tensor, u: Tensor, b: int, a: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one sample: z (with the policy's graph), p, c~, and d(c - c~)/dz with V's graph, from the definitions."""
    z = made._policy[0](x[b : b + 1])[0]
    leaf = z.detach().requires_grad_()
    logp = leaf - leaf.exp().sum().log()
    gumbel = [-torch.log(-torch.log(u[i, b] + 1e-8) + 1e-8) for i in range(2)]
    h = logp + gumbel[0]
    top = gumbel[1][a]  # the highest of all is a standard Gumbel
    conditional = torch.stack(
        [
            top if k == a else logp[k] - torch.log(torch.exp(logp[k] - top) - torch.log(u[1, b, k] + 1e-8))
            for k in range(4)
        ]
    )
    net = made._value_mem[0]._approx
    c, c2 = (net(torch.cat([x[b], (s / made._temperature).softmax(0)])) for s in (h, conditional))
    (control,) = torch.autograd.grad((c - c2).sum(), leaf, create_graph=True)
    return z, logp.exp().detach(), c2, control


def test_relax() -> None:
    seeds.manual_seed(0)
    B = 5
    made: Any = decision("RELAX", 4, dtype=F64, approx_hidden_dims=(7,))
    x, u = torch.randn(B, F, dtype=F64), torch.rand(2, B, 4, dtype=F64)
    made._uniform = lambda *shape, like: u
    y, meta, actions = made(x, start(x))
    losses = torch.randn(B, dtype=F64)
    loss = Loss(nn.MSELoss(), networks.NegLossReward())
    _, routing = loss(y, meta, None, external_losses=losses, reduce=False)
    expected = torch.zeros((), dtype=F64)
    for b in range(B):
        a, R = int(actions[b]), -losses[b]
        z, p, c2, control = relaxed(made, x, u, b, a)
        H = torch.eye(4, dtype=F64)[a]
        g = (R - c2) * (H - p) + control
        entropy = -(z.softmax(0) * z.log_softmax(0)).sum()
        value = -0.01 * entropy + (g**2).sum()
        assert_same(routing[b].detach(), value.detach())
        expected = expected + value - (g.detach() * z).sum()
    weights = list(made.parameters())
    for got, exact in zip(
        torch.autograd.grad(routing.sum(), weights), torch.autograd.grad(expected, weights), strict=True
    ):
        assert_same(got, exact)


def test_relax_has_no_bias() -> None:
    """The mean of many estimates is the gradient of the expected reward, within five standard errors."""
    seeds.manual_seed(0)
    N, reward = 40_000, torch.tensor([1.0, -0.5, 0.2, 0.7], dtype=F64)
    made: Any = decision("RELAX", 4, dtype=F64, approx_hidden_dims=(8,))
    x = torch.randn(1, F, dtype=F64).expand(N, F)
    _, meta, actions = made(x, start(x))
    record = meta.records[0]
    z = record.columns[0].full
    p = z[0].softmax(0).detach()
    H = torch.eye(4, dtype=F64)[actions]
    estimates = ((reward[actions][:, None] - record.columns[2].full) * (H - p) + record.columns[3].full).detach()
    exact = p * (reward - (p * reward).sum())
    error = estimates.mean(0) - exact
    assert (error.abs() <= 5 * estimates.std(0) / N**0.5).all()
    counts = torch.bincount(actions, minlength=4) / N
    assert ((counts - p).abs() <= 5 * (p * (1 - p) / N).sqrt()).all()
    assert float(estimates.std(0).max()) > 0


def test_relax_in_eval_learns_nothing() -> None:
    made = decision("RELAX", 4).eval()
    x = torch.randn(3, F)
    y, meta, _ = made(x, start(x))
    _, routing = Loss(nn.MSELoss(), networks.NegLossReward())(y, meta, x)
    assert not routing.requires_grad and not routing.any()


def test_a_wpl_agent_may_value_all_modules_alike_and_highly() -> None:
    """Scores of 100 are 8e-6 apart, so the 1e-6 that every choice is given has to be added to their differences."""
    decide = networks.WPL(4, num_agents=2, policy_storage_type="tabular")
    torch.nn.init.constant_(decide._policy[0]._approx, 100.0)
    x, meta, _ = networks.Initialization()(torch.randn(6, 3), tasks=[0, 1, 0, 1, 0, 1])
    y, meta, _ = decide(x, meta, meta.task_indices(x.device))
    _, routing = Loss(nn.MSELoss(), networks.NegLossReward())(y, meta, torch.zeros(6, 3), reduce=False)
    assert routing.isfinite().all()
