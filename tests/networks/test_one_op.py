"""A trajectory's routing loss as one op: the same as the classes' own losses, and only where it is known to be theirs.

Axes: B samples, T decisions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import networks, use_backend
from fastroute.networks import Loss, NegLossReward
from fastroute.networks import loss as module
from fastroute.networks.decision_record import Column, Record
from fastroute.networks.decisions.base import Decided
from fastroute.networks.loss_entries import Entries
from fastroute.ops.trajectory_loss.op import Entry
from tests.helpers import seeds
from tests.helpers.backends import each_backend, needs_native
from tests.helpers.networks import LEARNING, F, decision, start
from tests.helpers.opcheck import assert_same

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
B = 7
KNOWN = tuple(algo for algo in LEARNING if algo not in ("RELAX", "GumbelSoftmax"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The kinds of every call of the op."""
    made: list[list[str]] = []
    real = module.trajectory_loss

    def spy(kinds: list[str], *args: Any, **kwargs: Any) -> Tensor:
        made.append(kinds)
        return real(kinds, *args, **kwargs)

    monkeypatch.setattr(module, "trajectory_loss", spy)
    yield made


def records(layers: list[Any], mask: bool = False, added: bool = False) -> Any:
    seeds.manual_seed(0)
    x = torch.randn(B, F, dtype=next(layers[0].parameters()).dtype)
    meta = start(x)
    for t, layer in enumerate(layers):
        active = torch.rand(B) < 0.7
        layer(x, meta, None, active if mask and t % 2 == 0 else None)
        if added and t % 2:
            meta.add_rewards(torch.randn(B, dtype=x.dtype))
    return meta


def routing(meta: Any, dtype: torch.dtype = F64, gamma: float = 0.7, **options: Any) -> Tensor:
    losses = torch.randn(B, generator=seeds.generator(3), dtype=F64).to(dtype)
    made: Tensor = Loss(nn.MSELoss(), NegLossReward(), gamma, **options)(
        torch.zeros(B, 1), meta, None, external_losses=losses, reduce=False
    )[1]
    return made


def both_ways(layers: list[Any], meta: Any, calls: list[list[str]], **options: Any) -> list[tuple[Tensor, ...]]:
    """The loss and the parameters' gradients by the op, and by every layer's own ``loss``."""
    weights = [w for layer in layers for w in layer.parameters()]
    found = []
    for generic in (False, True):
        before = len(calls)
        known = [layer.algorithm for layer in layers]
        for layer in layers:
            layer.algorithm = None if generic else layer.algorithm
        made = routing(meta, **options)
        for layer, algorithm in zip(layers, known, strict=True):
            layer.algorithm = algorithm
        assert len(calls) - before == (not generic)
        cotangent = torch.linspace(-1, 2, B, dtype=made.dtype)
        grads = torch.autograd.grad(made, weights, cotangent, retain_graph=True, allow_unused=True)
        found.append((made.detach(), *(torch.zeros(()) if g is None else g for g in grads)))
    return found


@each_backend
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "full"])
@pytest.mark.parametrize("algo", KNOWN)
def test_the_same_numbers(algo: str, masked: bool, backend: str, calls: list[list[str]]) -> None:
    layers = [decision(algo, 4, dtype=F64) for _ in range(3)]
    meta = records(layers, mask=masked, added=True)
    with use_backend(backend):
        for ours, theirs in zip(*both_ways(layers, meta, calls, normalize_per_action_rewards=masked), strict=True):
            if ours.dtype == F64:
                assert_same(ours, theirs)
    assert calls[0] == [algo] * 3


@each_backend
def test_a_mixture(backend: str, calls: list[list[str]]) -> None:
    classes = ("QLearning", "GumbelSoftmax", "ActorCritic", "SARSA", "SurpriseLearning", "WPL", "BootstrapAAC", "AAC")
    layers = [decision(algo, 4 - t % 2, dtype=F64) for t, algo in enumerate(classes)]
    meta = records(layers, added=True)
    with use_backend(backend):
        for ours, theirs in zip(*both_ways(layers, meta, calls), strict=True):
            if ours.dtype == F64:
                assert_same(ours, theirs)


@pytest.mark.parametrize("weights", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("losses", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
def test_dtypes(weights: torch.dtype, losses: torch.dtype, calls: list[list[str]]) -> None:
    for algo in KNOWN:
        layers = [decision(algo, 3, dtype=weights)]
        (ours, *grads), (theirs, *their_grads) = both_ways(layers, records(layers), calls, dtype=losses)
        assert ours.dtype == theirs.dtype, algo
        assert [g.dtype for g in grads] == [g.dtype for g in their_grads]


def test_views(calls: list[list[str]]) -> None:
    """Some of a batch's samples, in any order, and a list of samples."""
    layers = [decision("ActorCritic", 3, dtype=F64) for _ in range(2)]
    meta = records(layers, mask=True)
    whole, rows = routing(meta), [4, 0, 5]
    losses = torch.randn(B, generator=seeds.generator(3), dtype=F64)[rows]
    for part in (meta[rows], [meta[i] for i in rows]):
        loss = Loss(nn.MSELoss(), NegLossReward(), 0.7)
        made = loss(torch.zeros(3, 1), part, None, external_losses=losses, reduce=False)[1]
        assert_same(made.detach(), whole.detach()[rows])
    assert len(calls) == 3


# ------------------------------------------------------------------------------------------- whose loss is known


class SameLoss(networks.AAC):
    pass


class OwnLoss(networks.AAC):
    def loss(self, e: Entries) -> Tensor:
        return super().loss(e) * 2


class OwnFormula(networks.AAC):
    def loss_of(self, e: Entry) -> Tensor | None:
        return super().loss_of(e) * 2  # type: ignore[operator]


class OwnAdvantage(networks.AAC):
    def entry(self, e: Entries) -> Entry:
        made = super().entry(e)
        return made._replace(R=made.R + made.R - made.s1.detach())  # type: ignore[union-attr]


class OwnBaseline(networks.REINFORCEBl1):
    def auxiliary(self, record: Record) -> Tensor:
        return super().auxiliary(record) * 0


class OwnNeeds(networks.QLearning):
    needs = (("at", 0),)


class Mixin:
    def loss(self, e: Entries) -> Tensor:
        return -e.at(0)


class Mixed(Mixin, networks.REINFORCE):
    pass


class Below(OwnLoss):
    pass


@pytest.mark.parametrize(
    "cls, algorithm",
    [
        *((getattr(networks, algo), algo) for algo in KNOWN),
        (networks.GumbelSoftmax, "GumbelSoftmax"),
        (networks.RELAX, None),
        (networks.Decision, None),
        (SameLoss, "AAC"),
        (OwnBaseline, "REINFORCEBl1"),
        (OwnLoss, None),
        (OwnFormula, None),
        (OwnAdvantage, None),
        (OwnNeeds, None),
        (Mixed, None),
        (Below, None),
    ],
)
def test_algorithms(cls: type[networks.Decision], algorithm: str | None) -> None:
    assert cls.algorithm == algorithm


def test_a_users_subclass(calls: list[list[str]]) -> None:
    for cls in (SameLoss, OwnLoss, OwnFormula, OwnAdvantage):
        seeds.manual_seed(0)
        meta = records([cls(3, F, dtype=F64)])
        column = meta.records[0].columns
        made = routing(meta)
        D = meta.final_reward - column[1].full[:, 0]
        factor = 1 if cls is SameLoss else 2
        critic = D.square() * (4 if cls is OwnAdvantage else factor)
        expected = -column[0].at(meta.actions[0]) * D * factor + critic
        assert_same(made.detach(), expected.detach())
    assert calls == [["AAC"]]


class Toy(networks.Decision):
    """An algorithm of one's own: what it decides, and its loss by entry."""

    needs, critic = (("first", 1),), 1

    def decide(self, x: Tensor, plan: Any, forced: Tensor | None) -> Decided:
        z = self._ask(self._policy, x, plan)
        actions = z.argmax(1) if forced is None else forced
        return Decided(actions, [Column(z.log_softmax(1)), Column(z[:, :1])])

    def loss_of(self, e: Entry) -> Tensor:
        assert e.s1 is not None and e.aux is None and e.choices == 3
        return -e.s0 * (e.R - e.s1.detach()) + (e.s1 - e.y).square()


def test_an_algorithm_of_ones_own(calls: list[list[str]]) -> None:
    meta = records([Toy(3, F, dtype=F64) for _ in range(2)])
    f = -torch.randn(B, generator=seeds.generator(3), dtype=F64)
    expected = torch.zeros(B, dtype=F64)
    (s0, v0), (s1, v1) = ([c.at(r.actions).detach() for c in r.columns] for r in meta.records)
    for log_p, v, R, y in ((s0, v0, 0.7 * f, 0.7 * v1), (s1, v1, f, f)):
        expected += -log_p * (R - v) + (v - y).square()
    made = routing(meta)
    assert_same(made.detach(), expected)
    made.sum().backward()
    assert all(w.grad is not None and w.grad.any() for w in meta.records[0].decision.parameters())
    assert calls == []


@pytest.mark.parametrize("algo", KNOWN)
def test_a_formula_stands_once(algo: str) -> None:
    """The op's definition; a class adds what only upstream's formula needs."""
    assert getattr(networks, algo).loss_of is networks.Decision.loss_of


def test_who_does_not_go_through_the_op(calls: list[list[str]]) -> None:
    plain = decision("REINFORCE", 3)
    routing(records([plain]), F32, formula="upstream")
    routing(records([plain, decision("REINFORCE", 3, formula="upstream")]), F32)
    routing(records([plain, decision("RELAX", 3)]), F32)
    routing(records([decision("GumbelSoftmax", 3)]), F32)  # nothing to compute
    # masks, and two kinds of targets: the next decision is not the same for all, nor what is read of it
    routing(records([decision("QLearning", 3), decision("ActorCritic", 3)], mask=True), F32)
    for hook in ("loss", "loss_of"):
        told = decision("REINFORCE", 3)
        setattr(told, hook, lambda e: e.R)
        assert torch.equal(routing(records([told]), F32), told_reward())
    assert calls == []
    routing(records([decision("QLearning", 3), decision("ActorCritic", 3)]), F32)
    routing(records([decision("QLearning", 3), decision("AAC", 3), decision("QLearning", 3)], mask=True), F32)
    assert calls == [["QLearning", "ActorCritic"], ["QLearning", "AAC", "QLearning"]]


def told_reward() -> Tensor:
    return -torch.randn(B, generator=seeds.generator(3), dtype=F64).float()


# ----------------------------------------------------------------------------------------------------- what it takes


@needs_native
def test_operators() -> None:
    """However many decisions there are, the same few operators, forward and backward."""
    counts = []
    for T in (2, 6):
        layers = [decision("REINFORCE", 3) for _ in range(T)]
        meta = records(layers)
        columns = [r.columns[0].at(r.actions) for r in meta.records]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as forward:
            made = routing(meta, F32)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as backward:
            torch.autograd.grad(made, columns, torch.ones(B))
        names = [
            Counter(e.name for e in p.events() if e.name.startswith(("aten::", "fastroute::")))
            for p in (forward, backward)
        ]
        assert names[0]["fastroute::_trajectory_loss_native"] == 1
        assert names[1]["fastroute::_trajectory_loss_native_backward"] == 1
        counts.append(names)
    assert counts[0] == counts[1]
