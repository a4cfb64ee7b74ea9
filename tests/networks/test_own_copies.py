"""A trajectory has copies of its own: what a user writes into a tensor afterwards changes nothing of what was decided.

Axes: B samples, K choices, A agents, T decisions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import networks
from fastroute.networks import CollaborationReward, Loss, NegLossReward, Selection, TopKGating
from tests.helpers import seeds
from tests.helpers.networks import FORMULAS, LEARNING, F, decision, linears, scatter_tables, start

B, K, A, T = 9, 4, 3, 3

#: How a tensor is given, in the memory of the user's.
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda t: t,
    "NumPy's": lambda t: t.numpy(),
    "a column": lambda t: t[:, None],
    "from NumPy": lambda t: torch.from_numpy(t.numpy()),  # whose version no write through the array counts
    "bytes": lambda t: t.numpy().view("uint8") if t.dtype == torch.bool else t,
}


class Buffers:
    """A user's tensors, the same ones at each step; without ``reused``, others at each."""

    def __init__(self, reused: bool, form: str) -> None:
        self.reused, self.form, self.kept = reused, FORMS[form], {}

    def __call__(self, name: str, value: Tensor, form: bool = True) -> Any:
        if not self.reused or name not in self.kept:
            self.kept[name] = value.clone()
        self.kept[name].numpy()[...] = value.numpy()
        return self.form(self.kept[name]) if form else self.kept[name]

    def spoil(self, *others: Tensor) -> None:
        """Write into everything that is given, or got."""
        for t in (*self.kept.values(), *others) if self.reused else ():
            t.copy_(~t if t.dtype == torch.bool else 1 - t)
            t.numpy()[::2] = 0


def some(generator: torch.Generator) -> Tensor:
    """[B] bool; the first sample is among them."""
    return (torch.rand(B, generator=generator) < 0.7) | (torch.arange(B) == 0)


def run(make: Callable[[], list[nn.Module]], reused: bool, form: str, forced: bool, masked: bool) -> list[Any]:
    """Everything that T decisions leave: what they recorded, losses, and all gradients."""
    seeds.manual_seed(0)
    layers, selections = make(), [linears(K) for _ in range(T)]
    for layer in layers:
        scatter_tables(layer)
    generator, given = seeds.generator(1), Buffers(reused, form)
    x = torch.randn(B, F)
    tasks = given("tasks", torch.randint(A, (B,), generator=generator), form=False)
    meta = start(x, tasks)
    for t, (layer, selection) in enumerate(zip(layers, selections, strict=True)):
        many = isinstance(layer, TopKGating)
        more: dict[str, Any] = {}
        if forced:
            shape = (B, 2) if many else (B,)
            more["forced_actions"] = given("forced", torch.randint(K, shape, generator=generator), form=not many)
        mask = given("mask", some(generator)) if masked else None
        agents = given("agents", torch.randint(A, (B,), generator=generator))
        x, meta, actions = layer(x, meta, agents, mask, **more)
        if t == 1:
            given.spoil()
            mask = given("mask", some(generator)) if masked else None
        x, meta, actions = selection(x, meta, actions, mask)
        if meta.records:
            meta.add_rewards(given("rewards", torch.randn(B, generator=generator), form=False))
            meta[0].append("add_rewards", given("one", torch.randn(1, generator=generator), form=False))
        given.spoil(actions)
    losses = Loss(nn.MSELoss(), NegLossReward(), 0.9)(x, meta, torch.zeros_like(x), reduce=False)
    sum(loss.sum() for loss in losses).backward()
    found: list[Any] = [*losses, meta.actions, meta.agents, meta.active, meta.exploratory, meta.task_indices(x.device)]
    for record in meta.records:
        found += [record.states(), record.agents, record.active]
    for mixture in meta.mixtures:
        found += [mixture.actions, mixture.active, mixture.weights, *mixture.losses.values()]
    return found + [p.grad for m in (*layers, *selections) for p in m.parameters()]


def compare(make: Callable[[], list[nn.Module]], form: str, forced: bool, masked: bool) -> None:
    one, other = (run(make, reused, form, forced, masked) for reused in (False, True))
    assert len(one) == len(other) > T
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        assert (a is None) == (b is None), i
        assert a is None or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), i


def learning(algo: str, agents: int = A, **options: Any) -> Callable[[], list[nn.Module]]:
    def make() -> list[nn.Module]:
        reward = CollaborationReward(0.3, K, 16)
        own = {"exploration": 0.5, "additional_reward_func": reward, **options}
        return [decision(algo, K, agents, **own) for _ in range(T)]

    return make


each_way = pytest.mark.parametrize("forced, masked", [(False, False), (False, True), (True, False), (True, True)])


@pytest.mark.parametrize("algo", LEARNING)
@pytest.mark.parametrize("formula", FORMULAS)
@each_way
def test_decisions(algo: str, formula: str, forced: bool, masked: bool) -> None:
    compare(learning(algo, formula=formula), "a tensor", forced, masked)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("agents", [1, A])
@each_way
def test_forms(form: str, agents: int, forced: bool, masked: bool) -> None:
    """However it is given."""
    compare(learning("WPL", agents), form, forced, masked)
    compare(learning("REINFORCE", agents, policy_storage_type="tabular"), form, forced, masked)


@each_way
def test_gatings(forced: bool, masked: bool) -> None:
    compare(lambda: [TopKGating(K, F, k=2, z_loss=0.1) for _ in range(T)], "a tensor", forced, masked)


@each_way
def test_with_fixed_decisions_between(forced: bool, masked: bool) -> None:
    for fixed in (networks.PerTaskAssignment, networks.PassThrough):
        compare(lambda fixed=fixed: [*learning("REINFORCE")()[1:], fixed()], "a tensor", forced, masked)  # type: ignore[misc]


@pytest.mark.parametrize("fixed", [networks.PerTaskAssignment(), networks.PassThrough()])
@pytest.mark.parametrize("given", [None, "forced_actions"])
def test_fixed_decisions_give_no_tensor_of_the_users(fixed: Any, given: str | None) -> None:
    tasks, x = torch.tensor([0, 1, 2]), torch.zeros(3, F)
    meta = start(x, tasks)
    actions = fixed(x, meta, **({} if given is None else {given: tasks}))[2]
    actions += 5
    assert tasks.tolist() == meta.tasks.tolist() == meta.task_indices(x.device).tolist() == [0, 1, 2]
    assert fixed(x, meta)[2].max() < 3


def test_actions_of_a_gating_that_were_changed_have_no_weights() -> None:
    """Nobody knows them, however they were changed; a plan is made anew likewise."""
    x = torch.randn(B, F)
    for write in (lambda a: a.copy_(1 - a), lambda a: a.numpy().__setitem__(0, 0)):
        meta = start(x)
        _, _, actions = TopKGating(K, F, k=2)(x, meta)
        assert meta.weights_of(actions) is meta.mixtures[0].weights
        write(actions)
        with pytest.raises(ValueError, match="weights: expected those of these actions"):
            Selection(*(nn.Linear(F, F) for _ in range(K)))(x, meta, actions)


def test_selections_take_what_decisions_take() -> None:
    """Indices in a list, in an array or in a tensor of any integer dtype: [B], [B, 1], and [B, k] with weights."""
    x, layer = torch.randn(3, F), linears(K)
    wanted, weights = torch.tensor([2, 0, 3]), torch.rand(3, 2)
    expected = layer(x, start(x), wanted)[0]
    mixed = layer(x, start(x), wanted[:, None].expand(3, 2), weights=weights)[0]
    for kind in ("int64", "int32", "uint8"):
        array = wanted.numpy().astype(kind)
        for given in (array, torch.from_numpy(array), array.tolist(), array[:, None], array[:, None].tolist()):
            assert torch.equal(layer(x, start(x), given)[0], expected)
            _, meta, actions = decision("WPL", K, A)(x, start(x), [0, 1, 2], forced_actions=given)
            assert torch.equal(actions, wanted) and torch.equal(meta.actions[0], wanted)
        both = array[:, None].repeat(2, 1)
        assert torch.equal(layer(x, start(x), both, weights=weights)[0], mixed)
        gate = TopKGating(K, F, k=2)
        assert torch.equal(gate(x, start(x), forced_actions=both)[2], wanted[:, None].expand(3, 2))
