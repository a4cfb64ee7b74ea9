"""``Loss`` as users call it: both READMEs' orders, losses and rewards of their own, what is missing or not a number.

Axes: B samples.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastroute.networks import (
    BaseReward,
    CollaborationReward,
    CorrectClassifiedReward,
    Loss,
    NegLossReward,
    PassThrough,
    PerActionBaseReward,
    PerTaskAssignment,
    Trajectory,
)
from tests.helpers import seeds
from tests.helpers.networks import FORMULAS, LEARNING, F, decision, linears, play, start

B = 5
MSE = nn.MSELoss()


def routed(algo: str = "REINFORCE", T: int = 2, masks: Any = None, **options: Any) -> tuple[Tensor, Any]:
    seeds.manual_seed(0)
    layers = [decision(algo, 3, **options) for _ in range(T)]
    y, meta, _ = play(layers, [linears(3) for _ in range(T)], torch.randn(B, F), masks=masks)
    return y, meta


def targets(kind: str = "classes") -> Tensor:
    generator = seeds.generator(1)
    return torch.randint(F, (B,), generator=generator) if kind == "classes" else torch.randn(B, F, generator=generator)


def vectors(loss: Any, y: Tensor, meta: Any, *rest: Any, reward: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = Loss(loss, reward or NegLossReward())(y, meta, *rest, reduce=False, **options)
    return made


# ---------------------------------------------------------------------------------------------------- arguments


def test_both_readmes_orders() -> None:
    y, meta = routed()
    loss, t = Loss(nn.CrossEntropyLoss(), NegLossReward()), targets()
    expected = loss(y, meta, t)
    for found in (
        loss(y, t, meta),
        loss(y, list(meta), t),
        loss(y, t, list(meta)),
        loss(y, mys=meta, ystrue=t),
        loss(y, meta, ystrue=t),
    ):
        assert all(map(torch.equal, found, expected))
    with pytest.raises(TypeError, match="mys: expected a Trajectory or a list of its samples, got Tensor"):
        loss(y, t, t)


def test_means_and_vectors() -> None:
    y, meta = routed()
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), functional.cross_entropy):
        made = Loss(loss, NegLossReward())
        losses, routing = made(y, meta, targets(), reduce=False)
        torch.testing.assert_close(losses, functional.cross_entropy(y, targets(), reduction="none"))
        assert losses.shape == routing.shape == (B,)
        for mean, vector in zip(made(y, meta, targets()), (losses, routing), strict=True):
            torch.testing.assert_close(mean, vector.mean())


def test_the_users_loss_is_left_as_it_is() -> None:
    y, meta = routed()
    loss = nn.CrossEntropyLoss(weight=torch.rand(F))
    vectors(loss, y, meta, targets())
    assert loss.reduction == "mean"


class Scaled(nn.Module):
    """A loss with a state among its attributes: how often it was called, and a running mean that it divides by."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction, self.calls, self.mean = "mean", 0, torch.ones(())

    def forward(self, yest: Tensor, ytrue: Tensor) -> Tensor:
        each = (yest - ytrue).square().mean(1)
        self.calls, self.mean = self.calls + 1, 0.5 * self.mean + 0.5 * each.detach().mean()
        each = each / self.mean
        return each.mean() if self.reduction == "mean" else each


class OfTorch(nn.MSELoss):
    """A class of PyTorch's, with a state."""

    calls = 0

    def forward(self, yest: Tensor, ytrue: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(yest, ytrue)


def shadowed() -> nn.Module:
    """A loss whose instance has a forward of its own, which looks at that instance."""
    made: Any = nn.L1Loss()
    plain = made.forward
    made.forward = lambda *pair: 2 * plain(*pair)
    return made  # type: ignore[no-any-return]


LOSSES: dict[str, Any] = {
    "PyTorch's": nn.MSELoss, "of a sum": lambda: nn.SmoothL1Loss(reduction="sum"), "with a state": Scaled,
    "a subclass": OfTorch, "a forward of its own": shadowed,
    "compiled": lambda: torch.compile(nn.MSELoss(), backend="eager"),
    "compiled with a state": lambda: torch.compile(Scaled(), backend="eager"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("fails", [False, True])
def test_a_users_loss_keeps_its_reduction_and_its_state(name: str, fails: bool) -> None:
    """It gives what it gives on its own, call by call, and is afterwards what it was, after an error too."""
    (y, meta), t = routed(), targets("values")
    mine, other = LOSSES[name](), LOSSES[name]()
    loss, before = Loss(mine, NegLossReward()), mine.reduction
    if fails:
        with pytest.raises((TypeError, RuntimeError)):
            loss(y, meta, t[:, :2])
        assert mine.reduction == before
        return
    for scale in (1.0, 10.0):
        found, _ = loss(scale * y, meta, t, reduce=False)
        expected = other(scale * y, t)
        of_sample = 1 if "state" in name else F
        torch.testing.assert_close(found.sum(), expected if name == "of a sum" else expected * B * of_sample)
        assert mine.reduction == before
    for one, same in zip((mine, other), (other, mine), strict=True):
        assert getattr(one, "calls", 0) == getattr(same, "calls", 0)
        torch.testing.assert_close(one(y, t), same(y, t))


def huber(yest: Tensor, ytrue: Tensor, reduction: str = "mean") -> Tensor:
    return functional.huber_loss(yest, ytrue, reduction=reduction)


@pytest.mark.parametrize(
    "loss",
    [
        functional.mse_loss,
        huber,
        lambda yest, ytrue: (yest - ytrue).abs(),  # [B, F]: a sample's entries are summed
        lambda yest, ytrue: (yest - ytrue).abs().sum(1),  # [B]
        lambda yest, ytrue: (yest - ytrue)[:, :, None].expand(-1, -1, 2),  # [B, F, 2]
    ],
)
def test_functions_as_losses(loss: Any) -> None:
    y, meta = routed()
    made, _ = vectors(loss, y, meta, targets("values"))
    try:
        each = loss(y, targets("values"), reduction="none")
    except TypeError:
        each = loss(y, targets("values"))
    torch.testing.assert_close(made, each.reshape(B, -1).sum(1))


@pytest.mark.parametrize("function", [nn.MSELoss(), nn.L1Loss(), nn.BCEWithLogitsLoss(), lambda a, b: (a - b) ** 2])
@pytest.mark.parametrize(
    ("of_y", "of_target"), [((5, 1), (5,)), ((5,), (5, 1)), ((5, 1, 3), (5, 3)), ((5, 3), (5, 1, 3))]
)
def test_targets_get_the_predictions_shape(function: Any, of_y: tuple[int, ...], of_target: tuple[int, ...]) -> None:
    """PyTorch would broadcast [B, 1] against [B] to [B, B], the losses of all pairs."""
    y, target = torch.rand(of_y, dtype=torch.float64), torch.rand(of_target, dtype=torch.float64)
    loss = Loss(function, NegLossReward())
    found, _ = loss(y, Trajectory(5), target, reduce=False)
    expected, _ = loss(y, Trajectory(5), target.reshape(of_y), reduce=False)
    assert torch.equal(found, expected)


def test_all_pairs_are_no_losses() -> None:
    """Integers may be classes, so they keep their shape: what would be made of them is refused."""
    loss = Loss(lambda a, b: (a - b).square(), NegLossReward())
    with pytest.raises(
        ValueError, match=r"one loss per sample, 5, got shape \[5, 5\] of ysest \[5, 1\] and ystrue \[5\]"
    ):
        loss(torch.rand(5, 1), Trajectory(5), torch.arange(5))
    losses, _ = Loss(nn.CrossEntropyLoss(), NegLossReward())(torch.rand(5, 1), Trajectory(5), torch.zeros(5).long())
    assert losses == 0


def test_a_reduced_loss_is_refused() -> None:
    y, meta = routed()
    with pytest.raises(ValueError, match=r"pytorch_loss_func: expected one loss per sample, 5, got shape \[\]"):
        vectors(lambda a, b: (a - b).square().mean(), y, meta, targets("values"))


@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, 2), (B, 2, 3)])
def test_external_losses(shape: tuple[int, ...]) -> None:
    y, meta = routed()
    external = torch.randn(shape, requires_grad=True)
    for ystrue in (None, targets("values")):
        losses, routing = vectors(MSE, y, meta, ystrue, external_losses=external)
        torch.testing.assert_close(losses, external.reshape(B, -1).sum(1))
        # the rewards are these losses', and carry no gradient
        assert torch.autograd.grad(losses.sum(), external, retain_graph=True)[0].eq(1).all()
        assert torch.autograd.grad(routing.sum(), external, allow_unused=True, retain_graph=True)[0] is None
    torch.testing.assert_close(meta.final_reward, -losses.detach())


def test_modules_and_decisions_learn_apart() -> None:
    seeds.manual_seed(0)
    layers, selections = [decision("ActorCritic", 3)], [linears(3)]
    y, meta, _ = play(layers, selections, torch.randn(B, F))
    module_loss, routing_loss = Loss(MSE, NegLossReward())(y, meta, targets("values"))
    for total, learns, other in ((module_loss, selections, layers), (routing_loss, layers, selections)):
        made = torch.autograd.grad(total, [*learns[0].parameters()], allow_unused=True, retain_graph=True)
        assert any(g is not None for g in made)
        made = torch.autograd.grad(total, [*other[0].parameters()], allow_unused=True, retain_graph=True)
        assert all(g is None for g in made)


# ------------------------------------------------------------------------------------------------ final rewards


class Doubled(BaseReward):
    """Defined for one sample, as upstream's classes."""

    def forward(self, loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
        assert loss.shape == (1,) and yest.shape == (1, F)
        return -2 * loss + yest.mean() * 0 + ytrue.sum() * 0


def with_python(loss: Tensor, yest: Tensor, ytrue: Tensor) -> float:
    """What vmap cannot do: it looks at the numbers."""
    return -2 * float(loss) if float(loss) < 1e9 else 0.0


@pytest.mark.parametrize("reward", [Doubled(), lambda loss, yest, ytrue: -2 * loss, with_python])
@pytest.mark.parametrize("ystrue", [True, False], ids=["targets", "external"])
def test_final_rewards_of_a_users_own(reward: Any, ystrue: bool) -> None:
    y, meta = routed()
    external = None if ystrue else torch.rand(B)
    losses, routing = vectors(
        MSE, y, meta, targets("values") if ystrue else None, external_losses=external, reward=reward
    )
    torch.testing.assert_close(meta.final_reward, -2 * losses.detach())
    assert not meta.final_reward.requires_grad and routing.shape == (B,)


def _negated(loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
    loss *= -1
    return loss


def _overwritten(loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
    found = -loss.clone()
    for t in (loss, yest, ytrue):
        t.zero_()
    return found


class _InBulk(BaseReward):
    """Gives the same tensor in each call."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.given = function, torch.empty(B)

    def rewards(self, loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
        return self.given.copy_(self.function(loss, yest, ytrue))


class _PerAction(PerActionBaseReward):
    """Of a loss's own numbers, which it writes into."""

    def register_all(self, dists: Any, actions: Tensor, active: Tensor | None = None) -> None:
        actions.fill_(-1)

    def rewards(self, dists: Any, actions: Tensor, like: Tensor) -> Tensor:
        actions += 1
        return like.fill_(0.25)


@pytest.mark.parametrize("reward", [_negated, _overwritten, _InBulk(_negated), _InBulk(_overwritten)])
@pytest.mark.parametrize("per_action", [None, _PerAction])
def test_a_users_reward_may_write_into_what_it_is_given(reward: Any, per_action: Any) -> None:
    expected, got = [], []
    for made, f in ((expected, NegLossReward()), (got, reward)):
        y, meta = routed(additional_reward_func=per_action and per_action())
        t = targets("values")
        losses, routing = vectors(MSE, y, meta, t, reward=f)
        first = meta.final_reward.clone()
        vectors(MSE, 2 * y, routed()[1], t, reward=f)  # a later batch
        made += [losses, routing, first, meta.final_reward, meta.actions, t]
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


_CALLS = torch.zeros(1)


def test_a_function_that_writes_is_called_sample_by_sample() -> None:
    """Whatever it writes into."""

    def counting(loss: Tensor, yest: Tensor, ytrue: Tensor, calls: Tensor = _CALLS) -> Tensor:
        calls += 1
        return loss * 0 + calls

    y, meta = routed()
    _CALLS.zero_()
    vectors(MSE, y, meta, targets("values"), reward=counting)
    assert meta.final_reward.tolist() == list(range(1, B + 1))


def test_a_users_own_error_is_seen() -> None:
    def reward(loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        vectors(MSE, *routed(), targets("values"), reward=reward)
    with pytest.raises(NotImplementedError, match=r"BaseReward defines no forward"):
        vectors(MSE, *routed(), targets("values"), reward=BaseReward())


def test_correct_classified() -> None:
    y, meta = routed()
    t = y.argmax(1).clone()
    t[1] = (t[1] + 1) % F
    expected = torch.tensor([1.0, -1, 1, 1, 1])
    for truth in (t, t[:, None], functional.one_hot(t, F)):
        made = CorrectClassifiedReward().rewards(torch.zeros(B), y, truth)
        assert torch.equal(made, expected)
    assert torch.equal(CorrectClassifiedReward().rewards(torch.zeros(B), t, t), torch.ones(B))
    assert torch.equal(CorrectClassifiedReward(scale=3.0).rewards(torch.zeros(B), y, t), 3 * expected)
    literal = CorrectClassifiedReward(scale=3.0, formula="upstream").rewards(torch.zeros(B), y, t)
    assert torch.equal(literal, expected)
    _, routing = vectors(nn.CrossEntropyLoss(), y, meta, t, reward=CorrectClassifiedReward())
    assert torch.equal(meta.final_reward, expected) and routing.isfinite().all()
    with pytest.raises(ValueError, match="ystrue: CorrectClassifiedReward needs the true classes, got none"):
        vectors(MSE, y, meta, None, external_losses=torch.zeros(B), reward=CorrectClassifiedReward())
    with pytest.raises(ValueError, match=r"ystrue: expected class indices \[B\] or one-hot \[B, 6\], got \[5, 2\]"):
        CorrectClassifiedReward().rewards(torch.zeros(B), y, torch.zeros(B, 2))


def test_scale() -> None:
    losses = torch.rand(3)
    assert torch.equal(NegLossReward(2.0).rewards(losses, losses, None), -2 * losses)
    assert torch.equal(NegLossReward(2.0, formula="upstream").rewards(losses, losses, None), -losses)


# ------------------------------------------------------------------------------------- discounting, memory of rewards


def test_discounting() -> None:
    """With a final reward alone, decision t of T has gamma^(T - 1 - t) of it; upstream takes no notice."""
    for formula, gamma in (("intended", 0.5), ("upstream", 1.0)):
        seeds.manual_seed(0)
        layers = [decision("REINFORCE", 3) for _ in range(3)]
        x = torch.randn(B, F)
        meta = start(x)
        for layer in layers:
            layer(x, meta)
        losses = torch.rand(B)
        loss = Loss(MSE, NegLossReward(), 0.5, formula=formula)  # type: ignore[arg-type]
        _, routing = loss(x, meta, external_losses=losses, reduce=False)
        logs = [
            layer._policy[0](x).log_softmax(1).gather(1, meta.actions[t][:, None])[:, 0]
            for t, layer in enumerate(layers)
        ]
        torch.testing.assert_close(routing, sum(log * losses * gamma ** (2 - t) for t, log in enumerate(logs)))


def test_clear() -> None:
    for clear in (False, True):
        reward = CollaborationReward(0.5, 3, 8)
        y, meta = routed(additional_reward_func=reward)
        assert (reward.history >= 0).sum() == 8  # two layers share it
        Loss(MSE, NegLossReward(), clear=clear)(y, meta, targets("values"))
        assert bool((reward.history >= 0).any()) == (not clear)


def test_rewards_learn_in_training_alone() -> None:
    for formula, learns in (("intended", False), ("upstream", True)):  # upstream's learn from eval batches, too
        reward = CollaborationReward(0.5, 3, 8)
        layer = decision("REINFORCE", 3, additional_reward_func=reward, formula=formula).eval()
        layer(torch.randn(4, F), start(torch.randn(4, F)))
        assert bool((reward.history >= 0).any()) == learns


def test_decisions_share_no_default_reward() -> None:
    a, b = decision("REINFORCE"), decision("REINFORCE")
    assert a.additional_reward_func is not b.additional_reward_func
    assert type(a.additional_reward_func) is PerActionBaseReward


def test_rewards_of_a_users_own_in_bulk() -> None:
    class Even(PerActionBaseReward):
        def rewards(self, dists: Any, actions: Tensor, like: Tensor) -> Tensor:
            assert dists().shape == (B, 3, 5)
            return (actions % 2 == 0).to(like)

    y, meta = routed(T=1, additional_reward_func=Even())
    loss = Loss(MSE, NegLossReward(), normalize_per_action_rewards=False)
    _, routing = loss(y, meta, external_losses=torch.ones(B), reduce=False)
    log_p = meta.records[0].columns[0].at(meta.actions[0])
    torch.testing.assert_close(routing, -log_p * ((meta.actions[0] % 2 == 0).float() - 1))


# ------------------------------------------------------------------------------------------- what is not there


def test_not_a_number_stays_in_its_sample() -> None:
    for algo in LEARNING:
        reward = CollaborationReward(0.5, 3, 8)
        y, meta = routed(algo, additional_reward_func=reward)
        for spoiled in (math.nan, math.inf):
            losses = torch.rand(B)
            clean = vectors(MSE, y, meta, None, external_losses=losses)[1]
            losses[2] = spoiled
            made = vectors(MSE, y, meta, None, external_losses=losses)[1]
            others = torch.arange(B) != 2
            assert torch.equal(made[others], clean[others]), algo
            if algo not in ("GumbelSoftmax", "RELAX"):
                assert not made[2].isfinite(), algo


def test_not_a_number_in_a_sample_of_the_batch() -> None:
    """In the input: the other samples' outputs and losses, and modules that it does not reach, are the same."""
    seeds.manual_seed(0)
    layers, selections = [decision("ActorCritic", 3, 2)], [linears(3)]
    x, agents = torch.randn(B, F), torch.tensor([0, 1, 1, 1, 0])
    forced = [torch.tensor([0, 2, 1, 1, 0])]
    bad = x.clone()
    bad[1] = math.nan
    found = []
    for batch in (x, bad):
        y, meta, _ = play(layers, selections, batch, agents=agents, forced=forced)
        made = vectors(MSE, y, meta, targets("values"))
        selections[0].zero_grad()
        made[0].sum().backward(retain_graph=True)
        found.append((y, *made, *(p.grad.clone() for p in selections[0].parameters() if p.grad is not None)))
    others = torch.arange(B) != 1
    for i, (got, expected) in enumerate(zip(found[1], found[0], strict=True)):
        if i < 3:
            assert torch.equal(got[others], expected[others]) and got[1].isnan().any()
        elif i < 7:  # modules 0 and 1
            assert torch.equal(got, expected)
        else:
            assert got.isnan().any()


def test_samples_without_a_decision() -> None:
    mask = torch.tensor([1, 0, 1, 1, 0]).bool()
    for algo in ("REINFORCE", "QLearning", "AAC", "EGreedyAAC", "RELAX", "WPL"):
        y, meta = routed(algo, masks=(mask, mask), additional_reward_func=CollaborationReward(0.5, 3, 8))
        losses, routing = vectors(MSE, y, meta, targets("values"))
        assert not routing[~mask].any() and routing.isfinite().all() and losses.isfinite().all()
    for layer in (PerTaskAssignment(), PassThrough()):
        x = torch.randn(B, F)
        y, meta, _ = layer(x, start(x, [0] * B), None)
        losses, routing = vectors(MSE, y, meta, targets("values"))
        assert not routing.any() and losses.shape == (B,) and not routing.requires_grad
    for algo in LEARNING:
        y, meta = routed(algo, masks=(~mask & mask,) * 2)  # nobody decided for
        routing = vectors(MSE, y, meta, targets("values"))[1]
        assert routing.shape == (B,) and not routing.any(), algo


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_mode_is_that_of_the_decision(formula: Any) -> None:
    """Not that of the loss: also where a layer decides once in each."""
    for algo, (modes, after) in itertools.product(LEARNING, (([True], False), ([False], True), ([True, False], True))):
        made = []
        for last in (modes[-1], after):
            seeds.manual_seed(0)
            layer, x = decision(algo, 3, formula=formula, exploration=0.5), torch.randn(B, F)
            meta = start(x)
            for mode in modes:
                layer.train(mode)(x, meta)
            layer.train(last)
            made.append(vectors(MSE, x, meta, targets("values"))[1])
        assert torch.equal(*made), algo
        assert made[0].requires_grad or algo == "GumbelSoftmax" or (algo == "RELAX" and not modes[0])


def test_an_empty_batch() -> None:
    for algo in ("REINFORCE", "QLearning", "AAC", "EGreedyAAC", "WPL", "RELAX", "GumbelSoftmax"):
        for formula in ("intended", "upstream"):
            layers = [decision(algo, 3, 2, formula=formula, additional_reward_func=CollaborationReward(0.5, 3, 8))]
            selections = [linears(3)]
            y, meta, _ = play(layers, selections, torch.zeros(0, F), agents=torch.zeros(0, dtype=torch.int64))
            made = Loss(MSE, NegLossReward(), formula=formula)(y, meta, torch.zeros(0, F))  # type: ignore[arg-type]
            correct = Loss(nn.CrossEntropyLoss(), CorrectClassifiedReward())
            assert not any(correct(y, meta, torch.zeros(0, dtype=torch.int64)))
            assert y.shape == (0, F) and [float(m.detach()) for m in made] == [0.0, 0.0], algo
            total = sum(made)
            if isinstance(total, Tensor) and total.requires_grad:
                total.backward()


@pytest.mark.parametrize("formula", FORMULAS)
def test_without_gradients(formula: Any) -> None:
    """A validation loss: the same numbers, in training mode and in eval."""
    for algo in LEARNING:
        for train in (True, False):
            layer, x = decision(algo, 3, formula=formula).train(train), torch.randn(B, F)
            forced, found = torch.tensor([0, 1, 2, 2, 1]), []
            for enabled in (True, False):
                seeds.manual_seed(0)
                with torch.set_grad_enabled(enabled):
                    y, meta, _ = layer(x, start(x), forced_actions=forced)
                    found.append(Loss(MSE, NegLossReward(), formula=formula)(y, meta, targets("values"), reduce=False))
            assert not any(t.requires_grad for t in found[1])
            if algo != "RELAX":  # whose value holds the variance of a gradient
                assert all(map(torch.equal, *found)), algo


def test_once_more() -> None:
    """The same trajectory may be read twice."""
    y, meta = routed("ActorCritic")
    loss = Loss(MSE, NegLossReward())
    first, second = loss(y, meta, targets("values")), loss(y, meta, targets("values"))
    assert all(map(torch.equal, first, second))
