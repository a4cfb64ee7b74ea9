"""A trajectory is upstream's list of samples: index, slice, iterate, append, finalize, join; and a report of it.

Axes: B samples, T decisions, K choices.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import networks
from fastroute.networks import Loss, NegLossReward, SampleMetaInformation, Trajectory
from tests.helpers import seeds
from tests.helpers.networks import F, decision, linears, play, start

KEYS = {"actions", "is_exploratory", "states", "loss_funcs", "reward_func"}


def routed(
    B: int = 6, tasks: Any = (), mask: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Any, list[Any], Any]:
    """Two layers, WPL then REINFORCE; the mask is the second's."""
    seeds.manual_seed(seed)
    x = torch.randn(B, F)
    layers = [decision("WPL", 4), decision("REINFORCE", 3)]
    y, meta, actions = play(layers, [linears(4), linears(3)], x, tasks=tasks, masks=(None, mask))
    return y, meta, layers, actions


# ------------------------------------------------------------------------------------------------------------ a list


@pytest.mark.parametrize("twice", [lambda meta: meta[[0, 1, 0]], lambda meta: [meta[0], meta[1], meta[0]]])
def test_a_sample_that_a_view_has_twice(twice: Any) -> None:
    """It is read twice; of two decisions for it one would be lost."""
    y, meta, layers, _ = routed(6)
    view, rows, loss = twice(meta), torch.tensor([0, 1, 0]), Loss(nn.MSELoss(), NegLossReward())
    for found, whole in zip(
        *(loss(a, b, a.detach() + 1, reduce=False) for a, b in ((y[rows], view), (y, meta))), strict=True
    ):
        assert torch.equal(found, whole[rows])
    writes: list[Any] = [
        lambda: layers[0](torch.randn(3, F), view), lambda: networks.TopKGating(3, F)(torch.randn(3, F), view),
        lambda: Trajectory.of(view).add_rewards([1.0, 2.0, 3.0]),
    ]  # fmt: skip
    for write in writes:
        with pytest.raises(ValueError, match=r"meta: expected each sample once .* got sample 0 twice"):
            write()


def test_a_list_of_samples() -> None:
    _, meta, _, _ = routed(6, tasks=[3, 1, 3, 0, 1, 1])
    assert len(meta) == 6 and isinstance(meta, Trajectory)
    assert [s.task for s in meta] == [3, 1, 3, 0, 1, 1] == list(meta.tasks)
    assert meta[0] is meta[0] and meta[-1] is meta[5] and meta[torch.tensor(2)] is meta[2]
    assert all(a is b for a, b in zip(meta, [meta[i] for i in range(6)], strict=True))
    assert [s.task for s in reversed(meta)] == [1, 1, 0, 3, 1, 3]
    assert meta[4] in meta and meta.index(meta[4]) == 4
    for out in (6, -7):
        with pytest.raises(IndexError, match="meta: expected an index below 6"):
            meta[out]


@pytest.mark.parametrize(
    "key, picked",
    [
        (slice(1, 4), [1, 2, 3]),
        (slice(None, None, -2), [5, 3, 1]),
        (slice(4, 99), [4, 5]),
        (slice(3, 3), []),
        ([2, 0, -1], [2, 0, 5]),
        (torch.tensor([5, 5, 1]), [5, 5, 1]),
        (torch.tensor([True, False, False, True, False, True]), [0, 3, 5]),
    ],
    ids=str,
)
def test_parts(key: Any, picked: list[int]) -> None:
    _, meta, _, _ = routed(tasks=list("abcdef"), mask=torch.tensor([1, 0, 1, 1, 1, 0]))
    part = meta[key]
    assert isinstance(part, Trajectory) and len(part) == len(picked)
    assert [s.task for s in part] == ["abcdef"[i] for i in picked] == list(part.tasks)
    assert all(part[i] is meta[b] for i, b in enumerate(picked))
    rows = torch.tensor(picked, dtype=torch.int64)
    for name in ("actions", "agents", "active", "exploratory"):
        assert torch.equal(getattr(part, name), getattr(meta, name)[:, rows]), name
    for record, whole in zip(part.records, meta.records, strict=True):
        assert torch.equal(record.states(), whole.states()[rows])
        assert record.decision is whole.decision and record.reward is whole.reward


def test_a_part_of_a_part() -> None:
    _, meta, _, _ = routed(6)
    part = meta[1:][::2][[2, 0]]
    assert [s is meta[i] for s, i in zip(part, (5, 1), strict=True)] == [True, True]


def test_tensors_of_the_batch() -> None:
    mask = torch.tensor([1, 0, 1, 1, 1, 0]).bool()
    _, meta, _, actions = routed(mask=mask)
    assert meta.actions.tolist() == [actions[0].tolist(), torch.where(mask, actions[1], -1).tolist()]
    assert meta.active.tolist() == [[True] * 6, mask.tolist()]
    assert meta.agents.tolist() == [[0] * 6, torch.where(mask, 0, -1).tolist()]
    assert actions[1][~mask].tolist() == [0, 0]
    empty = start(torch.randn(3, F))
    assert empty.actions.shape == (0, 3) and empty.records == [] and empty.tasks is None


# --------------------------------------------------------------------------------------------------------- the steps


def test_steps() -> None:
    mask = torch.tensor([1, 0, 1, 1, 1, 0]).bool()
    _, meta, layers, actions = routed(mask=mask)
    for b, sample in enumerate(meta):
        taken = [t for t in range(2) if t == 0 or mask[b]]
        assert len(sample.steps) == len(taken)
        for t, step in zip(taken, sample.steps, strict=True):
            assert set(step) == KEYS
            assert step["actions"].shape == () and step["actions"].dtype == torch.int64
            assert int(step["actions"]) == int(actions[t][b])
            assert step["is_exploratory"].shape == () and step["is_exploratory"].dtype == torch.uint8
            assert step["states"].shape == (1, (4, 3)[t], 5) and step["states"].requires_grad
            assert step["loss_funcs"] == layers[t].loss_func
            assert step["reward_func"] is layers[t].additional_reward_func
    assert "steps=1" in repr(meta[1]) and repr(meta) == "Trajectory(B=6, T=2)"


def test_states_have_their_gradient() -> None:
    _, meta, layers, _ = routed()
    with torch.no_grad():  # looked at without one first
        assert meta[0].steps[0]["states"] is not None
    meta[3].steps[0]["states"][0, :, 1].sum().backward(retain_graph=True)
    assert layers[0]._qvalue_mem[0]._approx._layers[0].weight.grad is not None
    meta[3].steps[0]["states"][0, 2, 0].backward()
    assert layers[0]._policy[0]._approx._layers[0].weight.grad is not None


def test_append() -> None:
    _, meta, _, _ = routed(mask=torch.tensor([1, 0, 1, 1, 1, 1]))
    meta[0].append("note", "last")
    meta[1].append("note", "first, for there is no other")
    meta[2].append("note", 1)
    meta[2].append("note", 2)
    assert [s.get("note") for s in meta[0].steps] == [None, "last"]
    assert [s.get("note") for s in meta[1].steps] == ["first, for there is no other"]
    assert [s.get("note") for s in meta[2].steps] == [None, 2]
    assert all(set(s) == KEYS for s in meta[3].steps)


def test_append_between_decisions() -> None:
    x = torch.randn(3, F)
    meta = start(x)
    with pytest.raises(ValueError, match=r"append\('note'\): no decision.*new_step=True"):
        meta[0].append("note", 1)
    meta[0].append("mine", "before", new_step=True)
    meta[0].append("also", 7)
    decision("REINFORCE", 3)(x, meta)
    meta[0].append("after", True)
    meta[1].append("mine", "later", new_step=True)
    assert [sorted(s) for s in meta[0].steps] == [["also", "mine"], sorted(KEYS | {"after"})]
    assert [sorted(s) for s in meta[1].steps] == [sorted(KEYS), ["mine"]]
    assert [sorted(s) for s in meta[2].steps] == [sorted(KEYS)]
    loss = Loss(nn.MSELoss(), NegLossReward())
    with pytest.raises(ValueError, match="meta: sample 0 has a step that no decision recorded"):
        loss(x, meta, x)


def test_finalize() -> None:
    _, meta, layers, actions = routed(mask=torch.tensor([1, 0, 1, 1, 1, 1]))
    sample = meta[2]
    sample.append("note", "x")
    for name in ("actions", "states", "note"):
        with pytest.raises(AttributeError):
            getattr(sample, name)
    for _ in range(2):  # callable again
        sample.finalize()
        assert sample.actions == [actions[0][2], actions[1][2]]
        assert sample.note == [None, "x"]
        assert [s.shape for s in sample.states] == [(1, 4, 5), (1, 3, 5)]
        assert sample.loss_funcs == [layer.loss_func for layer in layers]
    with pytest.raises(AttributeError, match="no step of this sample has 'nothing'; they have: actions"):
        sample.nothing  # noqa: B018
    meta[1].finalize()
    assert len(meta[1].actions) == 1
    assert not hasattr(meta[3], "actions")


def test_after_the_loss() -> None:
    y, meta, _, _ = routed()
    losses = torch.rand(6)
    meta[4].append("add_rewards", 0.5)
    Loss(nn.MSELoss(), NegLossReward())(y, meta, external_losses=losses)
    assert torch.equal(meta.final_reward, -losses) and torch.equal(meta[2:4].final_reward, -losses[2:4])
    assert float(meta[3].final_reward) == -float(losses[3])
    assert len(meta[3].actions) == 2 and list(meta[3].add_rewards) == [0.0, 0.0] and meta[4].add_rewards[1] == 0.5


# ----------------------------------------------------------------------------------------------- adding rewards


def losses_of(meta: Any, y: Tensor, **options: Any) -> Tensor:
    made: Tensor = Loss(nn.MSELoss(), NegLossReward(), normalize_per_action_rewards=False)(
        y, meta, external_losses=torch.arange(1.0, len(y) + 1), reduce=False, **options
    )[1]
    return made.detach()


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda v: torch.tensor([[v]])])
def test_rewards_are_added(kind: Any) -> None:
    """One by one or in bulk, through a part or not: the same losses."""
    amounts = [0.5, 0.0, -2.0, 1.0, 0.0, 3.0]
    found = []
    for way in range(4):
        y, meta, _, _ = routed()
        if way == 0:
            for b, amount in enumerate(amounts):
                if amount:
                    meta[b].append("add_rewards", kind(amount))
        if way == 1:
            meta.add_rewards(torch.tensor(amounts))
        if way == 2:
            meta[::2].add_rewards(torch.tensor(amounts[::2]))
            meta[1::2].add_rewards(torch.tensor(amounts[1::2]))
        if way == 3:
            meta.add_rewards(torch.tensor(amounts) - 1)
            meta[:].add_rewards(torch.ones(6))
        if way:
            assert [float(s.steps[-1]["add_rewards"]) for s in meta] == amounts
        found.append(losses_of(meta, y))
    assert not torch.equal(found[0], losses_of(*routed()[1::-1]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_rewards_of_each_step() -> None:
    """Between the decisions, they are the first one's."""
    seeds.manual_seed(0)
    x = torch.randn(4, F)
    layers = [decision("REINFORCE", 3) for _ in range(2)]
    forced = torch.tensor([0, 1, 2, 0])
    vectors = []
    for step in (None, 0, 1):
        meta = start(x)
        for t, layer in enumerate(layers):
            layer(x, meta, forced_actions=forced)
            if t == step:
                meta.add_rewards(torch.full((4,), 2.0))
        vectors.append(losses_of(meta, x))
    first, second = (meta_log(layer, x, forced) for layer in layers)
    # R = r_0 + r_1 for the first decision and r_1 for the second: half of 2 is added to a step's reward (T = 2)
    torch.testing.assert_close(vectors[1] - vectors[0], -first)
    torch.testing.assert_close(vectors[2] - vectors[0], -first - second)


def meta_log(layer: Any, x: Tensor, forced: Tensor) -> Tensor:
    made: Tensor = layer._policy[0](x).log_softmax(1).gather(1, forced[:, None])[:, 0].detach()
    return made


# ---------------------------------------------------------------------------------------------- parts that are written


def test_a_decision_on_a_part_writes_into_the_whole() -> None:
    seeds.manual_seed(0)
    x = torch.randn(6, F)
    meta = start(x, list(range(6)))
    layer, rows = decision("AAC", 3), [4, 1, 2]
    _, part, actions = layer(x[rows], meta[rows])
    assert len(part) == 3 and len(meta.records) == 1
    assert meta.active.tolist() == [[False, True, True, False, True, False]]
    assert meta.actions[0, rows].tolist() == actions.tolist() and len(meta[0].steps) == 0
    assert int(meta[4].steps[0]["actions"]) == int(actions[0])
    # the same as a mask
    masked = start(x)
    forced = torch.zeros(6, dtype=torch.int64).index_copy(0, torch.tensor(rows), actions)
    layer(x, masked, None, torch.tensor([0, 1, 1, 0, 1, 0]), forced_actions=forced)
    a, b = losses_of(meta, x), losses_of(masked, x)
    torch.testing.assert_close(a, b)
    assert not a[[0, 3, 5]].any() and a[rows].all()


def test_agents_of_a_part_are_recorded() -> None:
    x = torch.randn(4, F)
    meta = start(x)
    decision("REINFORCE", 3, 5)(x[1:3], meta[1:3], torch.tensor([4, 2]))
    assert meta.agents.tolist() == [[-1, 4, 2, -1]]


# ----------------------------------------------------------------------------------------------------- joined


def test_joined() -> None:
    """Loss vectors of batches put together are those of the batches; so are the samples' steps."""
    parts = [routed(4, tasks=list("abcd"), seed=1), routed(3, tasks=list("efg"), mask=torch.tensor([1, 0, 1]), seed=2)]
    meta = parts[0][1] + parts[1][1]
    assert [s.task for s in meta] == list("abcdefg") and len(meta) == 7
    assert [len(s.steps) for s in meta] == [2, 2, 2, 2, 2, 1, 2]
    y = torch.cat([p[0] for p in parts])
    apart = []
    for made, losses in zip(parts, torch.arange(1.0, 8).split([4, 3]), strict=True):
        apart.append(Loss(nn.MSELoss(), NegLossReward())(made[0], made[1], external_losses=losses, reduce=False)[1])
    joined = Loss(nn.MSELoss(), NegLossReward())(y, meta, external_losses=torch.arange(1.0, 8), reduce=False)[1]
    torch.testing.assert_close(joined, torch.cat(apart))


def test_split_and_joined_again() -> None:
    y, meta, _, _ = routed(6)
    expected = losses_of(meta, y)
    for pieces in (
        meta[:2] + meta[2:],
        [*meta[:4]] + [*meta[4:]],
        list(meta),
        meta[:0] + meta,
    ):
        again = Trajectory.of(pieces)
        assert all(a is b for a, b in zip(again, meta, strict=True))
        assert torch.equal(losses_of(pieces, y), expected)
    order = [3, 0, 5, 1]
    loss = Loss(nn.MSELoss(), NegLossReward(), normalize_per_action_rewards=False)
    shuffled = loss(y[order], [meta[i] for i in order], external_losses=torch.tensor(order) + 1.0, reduce=False)[1]
    assert torch.equal(shuffled, expected[order])


@pytest.mark.parametrize("sizes", [(4, 3), (1, 3), (1, 1)])
def test_a_list_of_samples_of_several_batches(sizes: tuple[int, int]) -> None:
    """What is decided for a plain list is seen by the list, by its samples, and by their own batches' trajectories."""
    B = sum(sizes)
    x, layer = torch.randn(B, F, generator=seeds.generator(0)), decision("REINFORCE", 4)
    forced = torch.arange(3 * B).reshape(3, B) % 4

    def lost(samples: Any, rows: slice) -> Tensor:
        y = torch.zeros(B, 1)[rows]
        return Loss(nn.MSELoss(), NegLossReward())(y, samples, y + 1, reduce=False)[1]

    whole = start(x)
    for t in range(3):
        layer(x, whole, forced_actions=forced[t])
    parts, rows = [start(p) for p in x.split(sizes)], [slice(0, sizes[0]), slice(sizes[0], B)]
    both = [*parts[0], *parts[1]]
    layer(x, both, forced_actions=forced[0])
    for part, own in zip(parts, rows, strict=True):
        layer(x[own], part, forced_actions=forced[1, own])
    layer(x.flip(0), both[::-1], forced_actions=forced[2].flip(0))
    for samples in (both, [*parts[0], *parts[1]]):
        assert [[int(s["actions"]) for s in sample.steps] for sample in samples] == forced.T.tolist()
    assert torch.equal(lost(both, slice(B)), lost(whole, slice(B)))
    for part, own in zip(parts, rows, strict=True):
        assert torch.equal(lost(part, own), lost(whole, slice(B))[own])
    a, b = start(x[:2]), start(x[:1])
    with pytest.raises(ValueError, match="meta: expected each sample once"):
        layer(x[[0, 0, 1]], [a[0], a[0], b[0]])


def test_what_was_appended_is_joined_too() -> None:
    (_, a, _, _), (_, b, _, _) = routed(2, seed=1), routed(2, seed=2)
    a[1].append("note", "a1")
    b[0].append("add_rewards", 0.5)
    b.add_rewards(torch.tensor([0.0, 2.0]))
    a[0].append("mine", 1, new_step=True)
    joined = a + b
    assert joined[1].steps[-1]["note"] == "a1" and joined[0].steps[-1] == {"mine": 1}
    assert float(joined[2].steps[-1]["add_rewards"]) == 0.5 and float(joined[3].steps[-1]["add_rewards"]) == 2.0


def test_samples_made_by_the_user() -> None:
    samples = [SampleMetaInformation(task=t) for t in (2, 0, 1)]
    assert [s.task for s in samples] == [2, 0, 1] and samples[0].steps == [] and SampleMetaInformation().task is None
    x = torch.randn(3, F)
    _, meta, agents = networks.PerTaskAssignment()(x, samples, None)
    assert agents.tolist() == [2, 0, 1]
    x, meta, actions = decision("QLearning", 4, 3)(x, meta, agents)
    assert [int(s.steps[0]["actions"]) for s in samples] == actions.tolist()
    samples[1].task = 7
    assert meta[1].task == 7 and [s.task for s in meta] == [2, 7, 1]
    assert losses_of(samples, x).shape == (3,)


# ------------------------------------------------------------------------------------------------------- the report


def forced(actions: list[list[int]], tasks: Any = (), K: int = 4) -> Trajectory:
    x = torch.randn(len(actions[0]), F)
    meta = start(x, tasks)
    for row in actions:
        decision("REINFORCE", K)(x, meta, forced_actions=torch.tensor(row))
    return meta


def test_summary() -> None:
    meta = forced([[0, 0, 1, 1, 2, 3], [3, 3, 3, 3, 3, 0]], tasks=[0, 0, 0, 1, 1, 1])
    made = meta.summary()
    assert made.samples == 6 and made.tasks == [0, 1] and made.routes == 4
    first, second = made.layers
    assert first.counts.tolist() == [[2, 1, 0, 0], [0, 1, 1, 1]]
    assert second.counts.tolist() == [[0, 0, 0, 3], [1, 0, 0, 2]]
    assert (first.used, second.used, first.name) == (4, 2, "REINFORCE")
    entropy = -sum(p * math.log2(p) for p in (2 / 6, 2 / 6, 1 / 6, 1 / 6))
    assert first.entropy == pytest.approx(entropy)
    within = (-(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)) + math.log2(3)) / 2
    assert first.task_entropy == pytest.approx(within)
    assert made.collapsed == [] and "warning" not in str(made)
    assert "6 samples, 2 tasks, 4 distinct routes" in str(made)


def test_summary_of_any_labels() -> None:
    taken = [[0, 1, 1, 3]]
    for tasks, expected in (
        (torch.tensor([0.5, 0.25, 1.0, 0.5]), [0.25, 0.5, 1]),
        ([torch.tensor(2), 1, torch.tensor(2.0), 1], [1, 2]),
        (["b", "a", "b", None], ["b", "a", None]),
        (torch.tensor([float("inf"), 0, 0, 0]), [0, float("inf")]),
    ):
        made = forced(taken, tasks=tasks).summary()
        assert made.tasks == expected and [type(t) for t in made.tasks] == [type(t) for t in expected]
        labels = [float(t) if isinstance(t, torch.Tensor) else t for t in tasks]
        counts = [[sum(t == task and k == own for t, own in zip(labels, taken[0], strict=True)) for k in range(4)]
                  for task in expected]  # fmt: skip
        assert made.layers[0].counts.tolist() == counts and str(made)
    for wrong in ([["a"], ["b"], ["a"], ["b"]], [torch.tensor([1, 2])] * 4, [1, {}, 2, 3]):
        with pytest.raises(TypeError, match=r"^tasks: expected labels"):
            forced(taken, tasks=wrong).summary()
    for unordered in ({"a": 1, "b": 2, "c": 3, "d": 4}, {1, 2, 3, 4}):
        with pytest.raises(TypeError, match=r"^tasks: expected a list or a tensor of labels, one per sample, got \{"):
            start(torch.randn(4, F), unordered)
    empty = start(torch.randn(0, F))
    decision("REINFORCE")(torch.randn(0, F), empty)
    assert str(empty.summary()).startswith("0 samples") and not empty.summary().layers[0].counts.any()


def test_summary_warns_of_collapse() -> None:
    meta = forced([[1] * 40, [0, 1, 2, 3] * 10, [2] * 39 + [1]], tasks=[0, 1] * 20)
    made = meta.summary()
    assert made.collapsed == [0, 2] and made.layers[0].entropy == 0
    assert str(made).count("warning: decision") == 2
    assert forced([[1] * 40], tasks=[5] * 40).summary().collapsed == []  # one task may well take one module


def test_summary_without() -> None:
    """Tasks, decisions, samples, or active ones."""
    assert forced([[0, 1, 1]]).summary().layers[0].counts.tolist() == [[1, 2, 0, 0]]
    x = torch.randn(3, F)
    assert start(x).summary().layers == [] and "0 distinct routes" in str(start(x).summary())
    meta = start(x)
    decision("REINFORCE")(x, meta, None, torch.zeros(3, dtype=torch.bool))
    assert not meta.summary().layers[0].counts.any() and str(meta.summary())
    assert str(start(x[:0]).summary()).startswith("0 samples")
    words = forced([[0, 1, 1]], tasks=["b", "a", "b"]).summary()
    assert words.tasks == ["a", "b"] and words.layers[0].counts.tolist() == [[0, 1, 0, 0], [1, 1, 0, 0]]
    labels = forced([[0, 1, 1]], tasks=torch.tensor([4, 2, 4])).summary()
    assert labels.tasks == [2, 4] and labels.layers[0].counts[1].tolist() == [1, 1, 0, 0]


def test_one_plan_for_all_decisions_of_the_same_agents() -> None:
    """But not for those of a tensor that was changed in between, nor of inference tensors."""
    meta, agents = start(torch.zeros(4, F)), torch.tensor([0, 1, 1, 0])
    first = meta.plan_of(agents, 2)
    assert meta.plan_of(agents, 2) is first and meta.plan_of(agents.clone(), 2) is not first
    assert meta.plan_of(agents, 3) is not first
    agents[0] = 1
    assert meta.plan_of(agents, 2).order.tolist() == [3, 0, 1, 2]
    agents.numpy()[1] = 0  # by whom no version is counted
    assert meta.plan_of(agents, 2).order.tolist() == [1, 3, 0, 2]
    with torch.inference_mode():
        own = torch.tensor([1, 0, 0, 0])
        assert meta.plan_of(own, 2).order.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_decision_of_two_without_gradients(mode: Any) -> None:
    """It counts for the other one's returns as one that is frozen; of inference mode it is refused, and told how."""
    x, y = torch.randn(6, F), torch.zeros(6, dtype=torch.int64)
    first, second = networks.REINFORCE(3, F), networks.REINFORCE(3, F, policy_storage_type="tabular")
    score = Loss(nn.CrossEntropyLoss(), NegLossReward())

    def gradients(within: Any) -> list[Tensor]:
        seeds.manual_seed(0)
        h, meta, _ = first(x, start(x))
        with within():
            h, meta, _ = second(h, meta)
        return list(torch.autograd.grad(score(h, meta, y)[1], list(first.parameters())))

    if mode is torch.inference_mode:
        with pytest.raises(RuntimeError, match=r"inference_mode where gradients are made: .* use torch\.no_grad"):
            gradients(mode)
        return
    found = gradients(mode)
    second.requires_grad_(False)
    for a, b in zip(found, gradients(contextlib.nullcontext), strict=True):
        assert a.any() and torch.equal(a, b)
