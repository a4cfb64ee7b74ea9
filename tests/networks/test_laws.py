"""Laws: permuting samples, relabelling modules and agents, joining batches, masking; and a cost that no batch changes.

Axes: B samples, K modules, A agents.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastroute import use_backend
from fastroute.networks import CollaborationReward, Loss, NegLossReward
from tests.helpers import seeds
from tests.helpers.backends import HERE
from tests.helpers.networks import FORMULAS, LEARNING, F, decision, linears, play, scatter_tables
from tests.helpers.opcheck import assert_same

F64 = torch.float64
#: In upstream's formulas these classes' samples see each other; and so do RELAX's there.
MIXING = {"AAC", "BootstrapAAC", "EGreedyREINFORCE", "EGreedyAAC", "RELAX"}


class Net:
    """Two or three routed layers of one class, in float64, and what came of a batch."""

    def __init__(self, algo: str, formula: str, seed: int, A: int = 3) -> None:
        seeds.manual_seed(seed)
        self.algo, self.formula, self.A = algo, formula, A
        self.K = (4, 3, 4)[: 2 + seed % 2]
        options: dict[str, Any] = {"formula": formula, "dtype": F64, "exploration": 0.4}
        if algo != "RELAX" and seed % 3 == 0:
            options["policy_storage_type"] = "tabular"
        self.decisions = [decision(algo, K, A, **options) for K in self.K]
        for layer in self.decisions:
            scatter_tables(layer, seed)
            layer._uniform = self.uniform  # type: ignore[assignment,method-assign]
        self.selections = [linears(K).double() for K in self.K]

    rows: Tensor

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """Every sample's own draws, whatever batch it is in."""
        axis = len(shape) - 2 if len(shape) > 1 else 0
        whole = list(shape)
        whole[axis] = 100
        made = torch.rand(whole, dtype=F64, generator=seeds.generator(7))
        return made.index_select(axis, self.rows)

    def batch(self, B: int, seed: int) -> dict[str, Any]:
        generator = seeds.generator(seed)
        return {
            "x": torch.randn(B, F, generator=generator, dtype=F64),
            "agents": torch.randint(self.A, (B,), generator=generator),
            "forced": [torch.randint(K, (B,), generator=generator) for K in self.K],
            "masks": [torch.rand(B, generator=generator) < 0.7 for _ in self.K],
            "rows": torch.arange(B),
        }

    def run(self, b: dict[str, Any], masked: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(y, module losses, routing losses), a row each per sample."""
        self.rows = b["rows"]
        y, meta, _ = play(
            self.decisions, self.selections, b["x"], agents=b["agents"], forced=b["forced"],
            masks=b["masks"] if masked else None,
        )  # fmt: skip
        loss = Loss(nn.MSELoss(), NegLossReward(), 0.9, formula=self.formula)  # type: ignore[arg-type]
        return y, *loss(y, meta, torch.zeros_like(y), reduce=False)

    def gradients(self, b: dict[str, Any], **options: Any) -> list[Tensor]:
        weights = [p for m in (*self.decisions, *self.selections) for p in m.parameters()]
        _, module, routing = self.run(b, **options)
        made = torch.autograd.grad((module + routing).sum(), weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(made, weights, strict=True)]


def pick(b: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    return {k: [t[rows] for t in v] if isinstance(v, list) else v[rows] for k, v in b.items()}


def equal(a: Any, b: Any, what: str) -> None:
    for s, t in zip(a, b, strict=True):
        assert_same(s.detach(), t.detach(), what)


each_class = pytest.mark.parametrize("algo", LEARNING)
each_formula = pytest.mark.parametrize("formula", FORMULAS)
few = hypothesis.settings(max_examples=3)
nets = {"seed": st.integers(0, 30), "B": st.integers(2, 9)}


@each_class
@each_formula
@few
@hypothesis.given(**nets)
def test_permuting_samples(algo: str, formula: str, seed: int, B: int) -> None:
    """Permutes outputs and losses, and leaves gradients."""
    net = Net(algo, formula, seed)
    b, order = net.batch(B, seed), torch.randperm(B, generator=seeds.generator(seed))
    equal([t[order] for t in net.run(b)], net.run(pick(b, order)), "permuted")
    equal(net.gradients(b), net.gradients(pick(b, order)), "gradients")


@each_class
@few
@hypothesis.given(**nets)
def test_joining_batches(algo: str, seed: int, B: int) -> None:
    """A batch's losses are those of its parts, and its gradient is their sum."""
    net = Net(algo, "upstream" if algo not in MIXING and seed % 2 else "intended", seed)
    b = net.batch(B, seed)
    parts = [pick(b, rows) for rows in torch.arange(B).split([B // 2, B - B // 2])]
    made = [net.run(part) for part in parts]
    equal(net.run(b), [torch.cat(t) for t in zip(*made, strict=True)], "joined")
    apart = [net.gradients(part) for part in parts]
    equal(net.gradients(b), [s + t for s, t in zip(*apart, strict=True)], "gradients")


@each_class
@each_formula
@few
@hypothesis.given(**nets)
def test_deciding_in_parts(algo: str, formula: str, seed: int, B: int) -> None:
    """A layer that decides for parts of a batch, one after the other, comes to what it comes to at once."""
    net = Net(algo, formula, seed)
    b = net.batch(B, seed)
    expected, gradients = net.run(b, masked=False), net.gradients(b, masked=False)
    parts = torch.randperm(B, generator=seeds.generator(seed)).split([B // 2, B - B // 2])

    def in_parts(layer: Any) -> Any:
        def call(x: Tensor, meta: Any, agents: Tensor, mask: None, forced_actions: Tensor) -> Any:
            y = x
            for rows in parts:
                net.rows = rows
                made, *_ = layer(x[rows], meta[rows], agents[rows], forced_actions=forced_actions[rows])
                y = y.index_copy(0, rows, made)
            return y, meta, forced_actions

        return call

    weights = [p for m in (*net.decisions, *net.selections) for p in m.parameters()]
    net.decisions = [in_parts(layer) for layer in net.decisions]
    found = net.run(b, masked=False)
    equal(expected, found, "in parts")
    made = torch.autograd.grad((found[1] + found[2]).sum(), weights, allow_unused=True)
    equal(gradients, [torch.zeros_like(w) if g is None else g for g, w in zip(made, weights, strict=True)], "gradients")


@each_class
@each_formula
@few
@hypothesis.given(**nets)
def test_masked_is_removed(algo: str, formula: str, seed: int, B: int) -> None:
    """Samples masked out of every layer have no part in what becomes of the others."""
    net = Net(algo, formula, seed)
    b = net.batch(B, seed)
    stays = torch.rand(B, generator=seeds.generator(seed)) < 0.6
    stays[0] = True
    b["masks"] = [stays] * len(net.K)
    kept = pick(b, stays.nonzero()[:, 0])
    y, module, routing = net.run(b)
    alone = net.run(kept, masked=False)
    if (
        algo == "RELAX" and formula == "upstream"
    ):  # a sum over entries: its mean over a larger batch is the same, spread
        routing = routing * 0
        alone = (*alone[:2], alone[2] * 0)
    equal([y[stays], module[stays], routing[stays]], alone, "kept")
    assert not y[~stays].any() and not routing[~stays].any()


#: Upstream's baseline of these two is that of module 0, whichever that is.
NAMELESS = [(a, f) for a in LEARNING for f in FORMULAS if f == "intended" or not a.startswith("REINFORCEBl")]


@pytest.mark.parametrize("algo, formula", NAMELESS)
@few
@hypothesis.given(**nets)
def test_relabelling_modules(algo: str, formula: str, seed: int, B: int) -> None:
    """With the modules in another order, policies and actions renamed alike, all comes out the same."""
    net = Net(algo, formula, seed)
    b = net.batch(B, seed)
    expected, gradients = net.run(b), net.gradients(b)
    for K, layer, select, t in zip(net.K, net.decisions, net.selections, range(9), strict=False):
        order = torch.randperm(K, generator=seeds.generator(seed))
        select._submodules = nn.ModuleList(select._submodules[i] for i in order)
        with torch.no_grad():
            for name, p in layer.named_parameters():
                last = "_approx" if name.endswith("_approx") else name.rpartition(".")[2]
                if K in (p.shape[-1] if last == "_approx" else p.shape[0],):
                    p.copy_(p[:, order] if last == "_approx" else p[order])
                if algo == "RELAX" and name.startswith("_value_mem") and last == "weight":
                    p[:, F:] = p[:, F:][:, order]
        b["forced"][t] = order.argsort()[b["forced"][t]]
        before = layer._uniform
        layer._uniform = lambda *s, like, u=before, o=order: (
            u(*s, like=like)[..., o] if len(s) > 1 else u(*s, like=like)
        )  # type: ignore[assignment,method-assign]
    equal(expected, net.run(b), "relabelled")
    total = sum(float(g.square().sum()) for g in gradients)
    again = sum(float(g.square().sum()) for g in net.gradients(b))
    assert again == pytest.approx(total, rel=1e-7)


@each_class
@few
@hypothesis.given(**nets)
def test_relabelling_agents(algo: str, seed: int, B: int) -> None:
    net = Net(algo, "intended", seed)
    b = net.batch(B, seed)
    expected = net.run(b)
    order = torch.randperm(3, generator=seeds.generator(seed))
    for layer in net.decisions:
        for name in ("_policy", "_value_mem", "_qvalue_mem"):
            stores = getattr(layer, name, None)
            if stores is not None:
                for i, store in enumerate([stores[i] for i in order]):
                    stores[i] = store
    b["agents"] = order.argsort()[b["agents"]]
    equal(expected, net.run(b), "relabelled")


# -------------------------------------------------------------------------------------------------------------- cost


def operators(algo: str, B: int, everywhere: bool, **options: Any) -> int:
    """How many aten operators a training step takes: forward, loss and backward of three layers, K = A = 20."""
    seeds.manual_seed(0)
    K = 20
    decisions = [decision(algo, K, K, **options) for _ in range(3)]
    for layer in decisions:
        if options.get("additional_reward_func") is not None:
            layer.additional_reward_func = CollaborationReward(0.3, K, 32)  # a batch fills its memory
    selections = [linears(K, outputs=o) for o in (F, F, 5)]
    x, y = torch.randn(B, F), torch.randint(5, (B,))
    loss = Loss(nn.CrossEntropyLoss(), NegLossReward())
    agents = torch.arange(B) % K
    # a module that nobody takes has no gradient to accumulate: let every one have a sample
    forced = [agents] * 3 if everywhere else None
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            ys, meta, _ = play(decisions, selections, x, agents=agents, forced=forced)
            sum(loss(ys, meta, y)).backward()  # type: ignore[union-attr]
    return sum(e.count for e in seen.key_averages() if e.key.startswith("aten::"))


TABLES = {"policy_storage_type": "tabular", "additional_reward_func": CollaborationReward(0.3, 20, 32)}


@pytest.mark.parametrize(
    "algo, options, backend",
    [
        ("REINFORCE", {}, "reference"),
        *((algo, options, HERE[-1]) for algo, options in (
            ("REINFORCE", {}), ("WPL", TABLES), ("QLearning", {}), ("AAC", {}), ("GumbelSoftmax", {}))),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_cost_does_not_grow_with_the_batch(algo: str, options: dict[str, Any], backend: str) -> None:
    with use_backend(backend):
        counts = {B: operators(algo, B, True, **options) for B in (64, 256)}
        sampled = operators(algo, 256, False, **options)
    print(algo, backend, counts, sampled)
    assert counts[64] == counts[256]
    if backend != "reference":  # which goes module by module
        assert counts[256] <= 600 and sampled <= 600
