"""TopKGating: choices, weights, losses, capacity and balance, against loops; and what its record is to a trajectory.

Axes: B samples, k modules that each takes, K modules, F features.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastroute import use_backend
from fastroute.networks import (
    REINFORCE,
    Initialization,
    Loss,
    NegLossReward,
    Selection,
    Sequential,
    TopKGating,
    rebalance,
)
from tests.helpers import seeds, strategies
from tests.helpers.backends import each_backend
from tests.helpers.networks import F, linears, start
from tests.helpers.opcheck import assert_same, check_compiled

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64 = torch.float32, torch.float64
K, B = 5, 14
each_way = pytest.mark.parametrize("scores, normalize", [(s, n) for s in ("softmax", "sigmoid") for n in (True, False)])


def gating(k: int = 2, *, seed: int = 0, dtype: torch.dtype = F64, **options: Any) -> TopKGating:
    seeds.manual_seed(seed)
    made = TopKGating(K, F, k, dtype=dtype, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
    return made


def batch(B: int = B, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(B, F, generator=seeds.generator(seed), dtype=F64).to(dtype)


def by_loop(gate: TopKGating, x: Tensor, rows: list[int] | None = None) -> dict[str, Any]:
    """A sample after the other, over ``rows`` alone."""
    rows = list(range(len(x))) if rows is None else rows
    actions, weights, z_losses, shares = [], [], [], []
    load: Counter[int] = Counter()
    for b in rows:
        z = [gate.router.weight[a] @ x[b] + (0 if gate.router.bias is None else gate.router.bias[a]) for a in range(K)]
        exps = [torch.exp(v) for v in z]
        s = [e / sum(exps) for e in exps] if gate.scores == "softmax" else [1 / (1 + torch.exp(-v)) for v in z]
        bias = [0.0] * K if gate.selection_bias is None else gate.selection_bias.tolist()
        best = sorted(range(K), key=lambda a, s=s, bias=bias: -(float(s[a].detach()) + bias[a]))[: gate.k]
        w = [s[a] for a in best]
        actions.append(best)
        weights.append([v / sum(w) for v in w] if gate.normalize else w)
        load.update(best)
        z_losses.append(gate.z_loss * torch.log(sum(exps)) ** 2)
        shares.append([v / sum(s) for v in s])
    n = max(len(rows), 1)
    balance = sum(load[a] / (n * gate.k) * sum(p[a] for p in shares) / n for a in range(K))
    return {
        "actions": torch.tensor(actions), "weights": torch.stack([torch.stack(w) for w in weights]),
        "balance": gate.balance_loss * K * balance, "z": sum(z_losses) / n, "load": [load[a] for a in range(K)],
    }  # fmt: skip


@each_way
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"bias_balancing": 0.1}], ids=str)
def test_the_definition(scores: str, normalize: bool, k: int, options: dict[str, Any]) -> None:
    gate = gating(k, scores=scores, normalize=normalize, z_loss=0.3, balance_loss=0.7, **options)
    if gate.selection_bias is not None:
        gate.selection_bias.copy_(torch.linspace(-0.3, 0.3, K))
    x = batch().requires_grad_()
    expected, found = by_loop(gate, x), gate.route(x)
    assert torch.equal(found.actions, expected["actions"]) and found.counts.tolist() == expected["load"]
    assert_same(found.weights.detach(), expected["weights"].detach())
    for name in ("balance", "z"):
        assert_same(found.losses[name].mean().detach(), expected[name].detach(), name)
    assert_same(found.loss.detach(), (expected["balance"] + expected["z"]).detach())
    cotangent, leaves = torch.randn(B, k, dtype=F64), [x, *gate.parameters()]
    made = [
        torch.autograd.grad((w * cotangent).sum() + loss, leaves)
        for w, loss in ((found.weights, found.loss), (expected["weights"], expected["balance"] + expected["z"]))
    ]
    for got, wanted in zip(*made, strict=True):
        assert_same(got, wanted)


@each_way
def test_gradcheck(scores: str, normalize: bool) -> None:
    gate, x = gating(scores=scores, normalize=normalize, z_loss=0.3, balance_loss=0.7), batch(5)
    forced = torch.tensor([[0, 3], [4, -1], [2, 2], [-1, -1], [1, 0]])
    weight = gate.router.weight.detach().requires_grad_()

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        def route(x: Tensor) -> tuple[Tensor, ...]:
            made = gate.route(x, None, forced)
            return made.weights, *made.losses.values()

        class Route(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate = gate

            def forward(self, x: Tensor) -> tuple[Tensor, ...]:
                return route(x)

        made: tuple[Tensor, ...] = torch.func.functional_call(Route(), {"gate.router.weight": weight}, (x,))
        return made

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), weight))


def test_the_balance_loss_is_least_where_load_is_even() -> None:
    gate = gating(1, balance_loss=0.25)
    x = torch.eye(F, dtype=F64)[:K] * 30
    with torch.no_grad():
        gate.router.weight.copy_(torch.eye(K, F, dtype=F64))
        assert_same(gate.route(x).loss, torch.tensor(0.25, dtype=F64))
        assert_same(gate.route(x[:1].expand(9, F)).loss, torch.tensor(0.25 * K, dtype=F64))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("capacity", [0.1, 0.5, 1.0, 1.3, 4.0])
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=8)
def test_capacity(k: int, capacity: float, data: st.DataObject) -> None:
    """All first choices, then all second ones, in the order of samples, until a module is full."""
    size = data.draw(st.integers(0, 20))
    gate = gating(k, capacity=capacity, seed=data.draw(strategies.seeds))
    x = batch(size, data.draw(strategies.seeds)) + 1  # favourites
    mask = torch.arange(size) % 4 != 1 if data.draw(st.booleans()) else None
    free = gating(k, seed=0)
    free.load_state_dict(gate.state_dict())
    whole, found = free.route(x, mask), gate.route(x, mask)
    limit = math.ceil(round(capacity * size * k / K, 9))
    load, expected = [0] * K, whole.actions.tolist()
    for j in range(k):
        for b in range(size):
            a = expected[b][j]
            if a < 0:
                continue
            load[a] += 1
            if load[a] > limit:
                expected[b][j] = -1
    assert found.actions.tolist() == expected and torch.equal(found.counts, whole.counts)
    kept = found.actions >= 0
    assert torch.equal(found.weights, torch.where(kept, whole.weights, 0))
    assert torch.equal(found.loss, whole.loss)


def test_jitter() -> None:
    """Multiplies what the router sees, in training, by what a generator draws."""
    x = torch.ones(400, F, dtype=F64)
    gate = gating(jitter=0.1, generator=seeds.generator(3))
    seen = gate._logits(x, None)
    center, radius = gate.router.weight.sum(1), 0.1 * gate.router.weight.abs().sum(1)
    assert ((seen - center).abs() <= radius).all() and seen.std(0).min() > 0
    assert (seen.mean(0) - center).abs().max() < 5 * radius.max() / 400**0.5
    again = gating(jitter=0.1, generator=seeds.generator(3))
    assert torch.equal(again._logits(x, None), seen)
    assert torch.equal(gate.eval()._logits(x, None), nn.functional.linear(x, gate.router.weight))


# ------------------------------------------------------------------------------------------------------- masks, NaN


@each_way
def test_masked_is_removed(scores: str, normalize: bool) -> None:
    gate = gating(scores=scores, normalize=normalize, z_loss=0.3, balance_loss=0.7, bias_balancing=0.1)
    x, mask = batch(), torch.arange(B) % 3 > 0
    results = []
    for given, m in ((torch.where(mask[:, None], x, torch.nan), mask), (x[mask], None)):
        gate.zero_grad()
        assert gate.counts is not None
        gate.counts.zero_()
        made = gate.route(given.requires_grad_(), m)
        ((made.weights**2).sum() + made.loss).backward()
        results.append((made, gate.router.weight.grad, gate.counts.clone(), given.grad))
    (masked, dw, counts, dx), (removed, dw_removed, counts_removed, dx_removed) = results
    assert masked.actions[~mask].eq(-1).all() and not masked.weights[~mask].any() and not dx[~mask].any()
    assert torch.equal(masked.actions[mask], removed.actions) and torch.equal(counts, counts_removed)
    assert_same(masked.weights[mask].detach(), removed.weights.detach())  # a library's sums may go by a row's place
    assert_same(masked.loss.detach(), removed.loss.detach())
    assert_same(dw, dw_removed)
    assert_same(dx[mask], dx_removed)
    nobody = gate.route(x, torch.zeros(B, dtype=torch.bool))
    assert nobody.loss == 0 and not nobody.counts.any()
    assert gate.route(x[:0]).loss == 0


def test_not_a_number_stays_in_its_sample() -> None:
    gate, x = gating(z_loss=0.3), batch()
    bad = torch.arange(B) == 2
    made, clean = gate.route(torch.where(bad[:, None], torch.nan, x)), gate.route(x)
    assert torch.equal(made.actions[~bad], clean.actions[~bad]) and made.weights[bad].isnan().all()
    assert torch.equal(made.weights[~bad], clean.weights[~bad]) and torch.equal(
        made.losses["z"][~bad], clean.losses["z"][~bad]
    )
    assert made.losses["balance"][~bad].isfinite().all()


# --------------------------------------------------------------------------------------------------------- balancing


def test_a_moving_bias_evens_the_load() -> None:
    """Samples that nearly all prefer one module end up spread; the weights do not see the bias.

    At the end loads swing about even by as many samples as a step of the bias moves: few, for a small step.
    """
    seeds.manual_seed(0)
    gate = TopKGating(4, 4, 1, bias_balancing=0.005, balance_loss=0, scores="sigmoid", normalize=False)
    with torch.no_grad():
        gate.router.weight.copy_(torch.eye(4))
    x = 0.3 * torch.randn(512, 4) + torch.tensor([2.0, 0.5, 0.0, -0.5])
    share = []
    for _ in range(200):
        made = gate.route(x)
        share.append(made.counts / 512)
        rebalance(nn.ModuleList([gate]))
        assert torch.equal(made.weights[:, 0], x.sigmoid().gather(1, made.actions)[:, 0])
    assert share[0].max() > 0.95 and (torch.stack(share[-20:]).mean(0) - 0.25).abs().max() < 0.05
    assert gate.eval().route(x).counts.any() and not gate.counts.any()  # type: ignore[union-attr]
    gate.rebalance()  # of nothing: all loads are even
    assert torch.equal(gate.selection_bias, gate.state_dict()["selection_bias"])  # type: ignore[arg-type]


def test_only_rebalance_moves_the_bias() -> None:
    """So that a forward pass made a second time, as checkpointing does, decides the same."""
    gate, x = gating(bias_balancing=0.1), batch().requires_grad_()
    once = gate.route(x)
    weights = checkpoint(lambda x: gate.route(x).weights, x, use_reentrant=False)
    weights.square().sum().backward()
    expected = torch.autograd.grad(once.weights.square().sum(), x)[0]
    assert torch.equal(x.grad, expected) and not gate.selection_bias.any()  # type: ignore[arg-type, union-attr]
    assert torch.equal(gate.counts * once.counts.sum(), once.counts * gate.counts.sum())  # type: ignore[operator, union-attr]
    gate.rebalance()
    assert torch.equal(gate.selection_bias, 0.1 * torch.sign(once.counts.float().mean() - once.counts))  # type: ignore[arg-type]
    assert list(gate.state_dict()) == ["selection_bias", "router.weight"]


# ---------------------------------------------------------------------------------------------------------- precision


def test_the_router_is_float32() -> None:
    """Under autocast, and whatever the input's and the parameters' dtype."""
    gate = gating(dtype=F32, z_loss=0.1)
    x = batch(dtype=torch.bfloat16)
    expected = gate.route(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for made in (gate.route(x), gate.route(x.float())):
            assert torch.equal(made.actions, expected.actions) and torch.equal(made.weights, expected.weights)
            assert torch.equal(made.loss, expected.loss) and made.loss.dtype == F32
    half = TopKGating(K, F, 2, z_loss=0.1, dtype=torch.bfloat16)
    whole = TopKGating(K, F, 2, z_loss=0.1)
    whole.load_state_dict(half.state_dict())
    assert torch.equal(half.route(x).weights, whole.route(x.float()).weights)
    assert half.route(x.double()).weights.dtype == F64
    moved = gating(bias_balancing=1e-3).bfloat16()
    assert moved.selection_bias is not None and moved.selection_bias.dtype == F32
    assert moved.router.weight.dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------- forced, trajectories


@each_way
def test_forced_actions_replay(scores: str, normalize: bool) -> None:
    gate, x = gating(scores=scores, normalize=normalize), batch()
    _, meta, actions = gate(x, start(x))
    _, again, forced = gate(x, start(x), forced_actions=actions.to(torch.int32))
    assert torch.equal(forced, actions) and torch.equal(again.mixtures[0].weights, meta.mixtures[0].weights)
    assert torch.equal(again.aux_loss, meta.aux_loss)
    given = torch.tensor([[0, -1]] * B)
    made = gate.route(x, None, given)
    assert torch.equal(made.actions, given) and not made.weights[:, 1].any()
    assert not normalize or made.weights[:, 0].eq(1).all()


def test_what_the_trajectory_has_of_it() -> None:
    gate, decide = gating(dtype=F32, z_loss=0.1), REINFORCE(3, F)
    x = batch(dtype=F32)
    mask = torch.arange(B) % 5 > 0
    meta = start(x, [0, 1] * (B // 2))
    decide(x, meta)
    _, _, actions = gate(x, meta, mask=mask)
    decide(x, meta)
    assert meta.actions.shape == (2, B) and [m.after for m in meta.mixtures] == [1]
    record = meta.mixtures[0]
    assert torch.equal(record.actions, actions) and record.choices == K and torch.equal(record.active, mask)
    assert meta[0].mixtures == [] and len(meta[0].steps) == len(meta[1].steps) == 2
    assert torch.equal(meta[1].mixtures[0]["actions"], actions[1])
    assert torch.equal(meta[1].mixtures[0]["weights"], record.weights[1])
    view = meta[3:7]
    assert torch.equal(view.mixtures[0].actions, actions[3:7]) and torch.equal(view.mixtures[0].active, mask[3:7])
    assert torch.equal(view.aux_losses(), meta.aux_losses()[3:7])
    summary = meta.summary()
    names = [layer.name for layer in summary.layers]
    assert names == ["REINFORCE", "TopKGating", "REINFORCE"] and [s.per_sample for s in summary.layers] == [1, 2, 1]
    counts = summary.layers[1].counts
    for task in (0, 1):
        rows = [b for b in range(B) if b % 2 == task and mask[b]]
        assert counts[task].tolist() == [int((actions[rows] == a).sum()) for a in range(K)]
    pairs = [tuple(sorted(a.tolist())) for a in actions]
    routes = {(*meta.actions[:, b].tolist(), pairs[b]) for b in range(B)}
    assert summary.routes == len(routes) and "decision 1 (TopKGating)" in str(summary)
    assert start(x).aux_loss == 0 and start(x).aux_losses() is None


def test_collapse_of_a_mixture() -> None:
    """Everything to the same k of more modules."""
    gate, x = gating(dtype=F32), batch(dtype=F32)
    for forced, collapsed in (([1, 3], [0]), (None, [])):
        meta = start(x, [0, 1] * (B // 2))
        gate(x, meta, forced_actions=None if forced is None else torch.tensor([forced] * B))
        assert meta.summary().collapsed == collapsed
        assert ("to 2 modules" in str(meta.summary())) == bool(collapsed)


def test_views_and_joined_batches() -> None:
    gate, x = gating(), batch()
    meta = start(x)
    parts = [slice(0, 6), slice(6, B)]
    losses = []
    for rows in parts:
        own = start(x[rows])
        gate(x[rows], own)
        gate(x[rows], meta[rows])
        losses.append(own.aux_loss)
    assert_same(meta.aux_loss.detach(), sum(losses).detach())  # a gating's loss is over the samples that it saw
    joined = [start(x[rows]) for rows in parts]
    for rows, one in zip(parts, joined, strict=True):
        gate(x[rows], one)
    both = joined[0] + joined[1]
    assert len(both.mixtures) == 2 and both.mixtures[1].actions[:6].eq(-1).all()
    assert torch.equal(both.mixtures[1].actions[6:], joined[1].mixtures[0].actions)
    assert_same(both.aux_loss.detach(), sum(losses).detach())


@each_backend
def test_loss_adds_what_it_asks_for(backend: str) -> None:
    seeds.manual_seed(0)
    with use_backend(backend):
        first, select = TopKGating(K, F, 2, z_loss=0.1), linears(K)
        decide, last = REINFORCE(3, F), linears(3)
        x, truth, mask = batch(dtype=F32), torch.randint(F, (B,)), torch.arange(B) % 4 > 0
        y, meta, actions = first(x, start(x), mask=mask)
        y, meta, actions = select(y, meta, actions)
        y, meta, actions = decide(y, meta)
        y, meta, actions = last(y, meta, actions)
        loss = Loss(nn.CrossEntropyLoss(), NegLossReward())
        module, routing = loss(y, meta, truth, reduce=False)
        aux = meta.aux_losses()
        assert aux is not None and not aux[~mask].any() and module.shape == routing.shape == (B,)
        meta._batch.mixtures.clear()
        assert torch.equal(loss(y, meta, truth, reduce=False)[1] + aux, routing)
        (module + routing).mean().backward()
        for m in (first, select, decide, last):
            assert any(p.grad is not None and p.grad.any() for p in m.parameters())
        # without any other decision there is nothing but that
        y, meta = Sequential(first, select)(x)
        assert torch.equal(loss(y, meta, truth)[1], meta.aux_loss)


def test_sequential() -> None:
    net = Sequential(TopKGating(K, F, 2), linears(K), nn.ReLU(), TopKGating(3, F, 1, normalize=False), linears(3))
    x = batch(dtype=F32)
    y, meta = net(x)
    net[2].unused_grad = "zeros"  # type: ignore[assignment]
    y.sum().backward()
    assert [m.actions.shape[1] for m in meta.mixtures] == [2, 1] and meta.actions.shape == (0, B)
    assert all(net[i].router.weight.grad is not None for i in (1, 4))  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------------------- what PyTorch expects


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"capacity": 1.0, "bias_balancing": 0.1, "scores": "sigmoid"}, marks=pytest.mark.long)],
    ids=str,
)
def test_compile(options: dict[str, Any]) -> None:
    net = nn.ModuleList([gating(z_loss=0.1, **options), linears(K, unused_grad="zeros").double()])

    def call(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y, meta, actions = net[0](*Initialization()(x)[:2], mask=mask)
        y, meta, _ = net[1](y, meta, actions)
        return y, meta.aux_loss

    calls = [(batch(size, seed=size).requires_grad_(), torch.arange(size) % 4 > 0) for size in (8, 5, 13)]
    check_compiled(call, calls, parameters=list(net.parameters()), backend="eager")


def test_it_depends_on_no_value() -> None:
    """Nor does the mixture that follows, on the backend that a GPU takes."""
    gate, select = gating(dtype=F32, capacity=1.0, bias_balancing=0.1, z_loss=0.1), linears(K)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with use_backend("reference"), mode:
        x, mask = mode.from_tensor(torch.randn(B, F)), torch.empty(B) > 0
        gate.counts = gate.selection_bias = None  # real tensors, which nothing fake can be added to
        y, meta, actions = gate(x, Initialization()(x)[1], mask=mask)
        y, meta, actions = select(y, meta, actions, mask=mask)
        (y.sum() + meta.aux_loss).backward()
        gate.route(x, None, torch.empty(B, 2, dtype=torch.int64))


CONSTRUCTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_selections": 0}, ValueError, "num_selections: expected at least 1, got 0"),
    ({"num_selections": 2.0}, TypeError, "num_selections: expected an int, got 2.0"),
    ({"in_features": 0}, ValueError, "in_features: expected at least 1, got 0"),
    ({"in_features": None}, TypeError, "in_features: expected an int, got None"),
    ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
    ({"k": 6}, ValueError, "k: expected at most num_selections, 5, got 6"),
    ({"scores": "tanh"}, ValueError, "scores: expected 'softmax' or 'sigmoid', got 'tanh'"),
    ({"jitter": -0.1}, ValueError, "jitter: expected a number of 0 or more, got -0.1"),
    ({"jitter": 1.0}, ValueError, "jitter: expected a number below 1, got 1.0"),
    ({"capacity": 0}, ValueError, "capacity: expected a finite number above 0 or None, got 0"),
    ({"capacity": float("inf")}, ValueError, "capacity: expected a finite number above 0 or None, got inf"),
    ({"balance_loss": -1}, ValueError, "balance_loss: expected a number of 0 or more, got -1"),
    ({"z_loss": math.nan}, ValueError, "z_loss: expected a number of 0 or more, got nan"),
    ({"bias_balancing": -1}, ValueError, "bias_balancing: expected a number of 0 or more, got -1"),
]


@pytest.mark.parametrize("options, error, message", CONSTRUCTION, ids=[str(c[0]) for c in CONSTRUCTION])
def test_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TopKGating(**{"num_selections": K, "in_features": F, **options})


def test_bad_input() -> None:
    gate, x = gating(dtype=F32), batch(dtype=F32)
    meta, forced = start(x), torch.zeros(B, 2, dtype=torch.int64)
    wrong: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (TypeError, "batch: expected a floating-point tensor", x.long(), {}),
        (ValueError, r"batch: expected 6 features a sample, got \[14, 5\]", x[:, 1:], {}),
        (ValueError, "meta: expected one entry per sample, 13, got 14", x[1:], {}),
        (ValueError, "mask: expected one per sample", x, {"mask": torch.ones(3, dtype=torch.bool)}),
        (TypeError, r"forced_actions: expected an integer tensor \[B, k\]", x, {"forced_actions": forced.float()}),
        (ValueError, r"forced_actions: .*\[14, 2\], got \[14, 1\]", x, {"forced_actions": forced[:, :1]}),
        (ValueError, r"forced_actions: expected k per sample", x, {"forced_actions": forced[0]}),
        (IndexError, "forced_actions: expected indices below 5, got 5", x, {"forced_actions": forced + 5}),
    ]  # fmt: skip
    for error, message, given, options in wrong:
        with pytest.raises(error, match=message):
            gate(given, meta, **options)
    with pytest.raises(ValueError, match=r"mix: expected actions of shape \[14, k\], got \[3, 2\]"):
        _, short, _ = gate(x[:3], start(x[:3]))
        meta.mix(short.mixtures[0])
    assert "k=2" in repr(gate) and isinstance(Selection(nn.Linear(1, 1)), nn.Module)
