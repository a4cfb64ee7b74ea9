"""``agent_policy`` on every backend: choices, values and gradients against the definition, and laws that they keep.

Axes: N (n) rows, A (a) agents, F (f) features in, K (k) choices, C (c) outputs of a critic: K, or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fastroute
from fastroute import functional, use_backend
from fastroute.ops import dispatch
from fastroute.ops.policy.op import KINDS
from tests.helpers import seeds, strategies
from tests.helpers.agent_policy_cases import (
    DIFFERENTIABLE,
    NETS,
    case_of,
    each_kind,
    each_net,
    lists,
    op,
    results,
    some_agents,
    truth,
)
from tests.helpers.backends import HERE, each_backend, needs_native
from tests.helpers.budget import check
from tests.helpers.cases import evaluate
from tests.helpers.dispatch_cases import actions_of, each_histogram
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_all_same, assert_same, check_compiled, check_exported, gradcheck, opcheck
from tests.helpers.process_wide import on_threads

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
each_dtype = pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])

# ------------------------------------------------------------------------------------------------ values, gradients


@each_backend
@each_net
@each_kind
@each_dtype
def test_values(backend: str, net: str, kind: str, dtype: torch.dtype) -> None:
    options = {"kind": kind, "temperature": 0.6}
    for N, A, F, K in ((64, 3, 9, 5),) if kind != "softmax" else ((64, 3, 9, 5), (33, 20, 33, 17), (9, 2, 3, 1)):
        cases = [case_of(some_agents(N, A, s), A, F, K, net, dtype, s) for s in range(2)]
        if dtype == F64:
            found, exact = (evaluate(fn(**options), cases[0]) for fn in (partial(op, backend), truth))
            assert_all_same(found, exact)
        else:
            found = check(op(backend, **options), truth(**options), cases, dtype=dtype, stored=dtype)
        assert found["value"].dtype == torch.promote_types(dtype, F32)  # type: ignore[union-attr]
        agents = cases[0].inputs["agents"]
        for name in DIFFERENTIABLE:
            if name in found:
                assert not found[name][agents < 0].any()  # type: ignore[index]


@each_backend
@each_histogram
@pytest.mark.parametrize("stacked", [False, True], ids=["lists", "stacked"])
def test_histograms(backend: str, histogram: list[int], stacked: bool) -> None:
    A = len(histogram) - 1
    for net in NETS:
        if stacked and net == "table-and-state-value":
            continue
        case = case_of(actions_of(histogram), A, 6, 4, net, F64)
        found, exact = evaluate(op(backend, stacked=stacked), case), evaluate(truth(), case)
        assert_all_same(found, exact)


@each_backend
@each_net
def test_one_agent_needs_no_plan(backend: str, net: str) -> None:
    case = case_of(torch.zeros(37, dtype=torch.int64), 1, 7, 5, net, F64)
    for stacked in (False, True):
        found, exact = evaluate(op(backend, no_plan=True, stacked=stacked), case), evaluate(truth(), case)
        assert_all_same(found, exact)


@each_backend
@each_kind
@pytest.mark.parametrize("net", ["critic", "state-value", "tables"])
def test_gradcheck(backend: str, kind: str, net: str) -> None:
    gradcheck(op(backend, kind=kind, temperature=0.7), case_of(some_agents(6, 2), 2, 3, 4, net))


@each_backend
@pytest.mark.parametrize("only", DIFFERENTIABLE)
def test_any_output_alone_may_have_the_gradient(backend: str, only: str) -> None:
    agents = torch.tensor([0, 2, 1, 0, -1, 2, 0])
    case = case_of(agents, 3, 4, 5, "critic", F64)
    case.cotangents.pop("value")
    for name in DIFFERENTIABLE:
        case.cotangents.pop(name, None)
    case.cotangents[only] = torch.randn(7 if only in ("value", "critic_at") else (7, 5), dtype=F64)  # type: ignore[arg-type]
    found, exact = evaluate(op(backend), case), evaluate(truth(), case)
    for name, t in exact.items():
        if t is None:
            assert found[name] is None, name
        else:
            assert_same(found[name], t, name)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- choices


@each_backend
@hypothesis.given(data=st.data())
def test_choices_are_those_of_policy(backend: str, data: st.DataObject) -> None:
    """Of the scores that it gives, in every combination; and its scores are those of ``grouped_linear``."""
    N, A = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 5))
    K = data.draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 33])))
    kind, seed = data.draw(st.sampled_from(KINDS)), data.draw(strategies.seeds)
    net = data.draw(st.sampled_from(sorted(NETS)))
    generator = seeds.generator(seed)
    options: dict[str, Any] = {"kind": kind, "temperature": data.draw(st.sampled_from([0.1, 1.0, 3.0]))}
    if data.draw(st.booleans()):
        options["uniform"] = torch.rand(N, K, generator=generator, dtype=F64)
    if data.draw(st.booleans()):
        options["coin"] = torch.rand(N, generator=generator, dtype=F64)
        options["exploration"] = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    if data.draw(st.booleans()):
        options["forced"] = torch.randint(-1, K, (N,), generator=generator)
    case = case_of(torch.randint(-1, A, (N,), generator=generator), A, 3, K, net, F64, seed)
    given, agents, x = lists(case.inputs), case.inputs["agents"], case.inputs["x"]
    has_mean = kind != "score" and len(given["critic_weights"] or given["critic_biases"]) > 0
    has_mean = has_mean and NETS[net].get("outputs", K) == K
    with use_backend(backend):
        plan = dispatch.plan(agents, A)
        made = functional.agent_policy(x, plan, **given, **options, expected=has_mean)  # type: ignore[arg-type]
        alone = functional.policy(made.scores, **options)
        scores = functional.grouped_linear(x, plan, given["weights"], given["biases"])
    has_agent = agents >= 0
    assert torch.equal(made.scores, scores) and torch.equal(made.greedy, alone.greedy)
    assert torch.equal(made.actions[has_agent], alone.actions[has_agent])
    assert torch.equal(made.value[has_agent], alone.value[has_agent])
    assert torch.equal(made.actions[~has_agent], options.get("forced", torch.zeros_like(agents))[~has_agent])
    assert not made.value[~has_agent].any()
    if has_mean:
        z = made.scores
        p = (z / options["temperature"]).softmax(1) if kind == "softmax" else z - z.min(1, keepdim=True).values + 1e-6
        assert_same(made.expected, (p * made.critic).sum(1) / p.sum(1), "expected")  # type: ignore[arg-type]
        assert not made.expected.requires_grad  # type: ignore[union-attr]


@each_backend
def test_permuting_rows_and_relabelling_agents(backend: str) -> None:
    A, agents = 4, some_agents(50, 4)
    case = case_of(agents, A, 6, 5, "critic", F64)
    expected = evaluate(op(backend), case)
    rows, names = torch.randperm(50), torch.randperm(A)
    moved = case.select("n", rows).select("a", names)
    new_name = torch.cat([names.argsort(), torch.tensor([-1])])
    moved = moved.with_inputs(agents=new_name[moved.inputs["agents"]])
    found = evaluate(op(backend), moved)
    for name, t in expected.items():
        letters = case.axes[name.removeprefix("d") if name[0] == "d" else name]
        back = found[name]
        for axis, letter in enumerate(letters):
            if letter in "na":
                t = t.index_select(axis, rows if letter == "n" else names)  # type: ignore[union-attr]
        # sums over rows go in another order, and those of a library may go by a row's place
        if t.is_floating_point() and (backend == "reference" or (name.startswith("d") and name != "dx")):  # type: ignore[union-attr]
            assert_same(back, t, name)  # type: ignore[arg-type]
        else:
            assert torch.equal(back, t), name  # type: ignore[arg-type]


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    case = case_of(some_agents(23, 3), 3, 6, 5, "critic", F64)
    moved = case.with_inputs(**{k: layout(t) for k, t in case.inputs.items() if k != "agents" and t is not None})
    found, expected = evaluate(op(backend), moved), evaluate(op(backend), case)
    assert_all_same(found, expected)


@each_backend
def test_what_is_not_a_number_stays_in_its_row(backend: str) -> None:
    case = case_of(torch.arange(12) % 3, 3, 4, 5, "critic", F32).with_inputs(forced=None)
    u = torch.rand(12, 5, generator=seeds.generator(0))
    bad = case.inputs["x"].clone()  # type: ignore[union-attr]
    bad[4, 2] = torch.nan
    clean, spoiled = (evaluate(op(backend), case.with_inputs(uniform=u, x=x)) for x in (case.inputs["x"], bad))
    others = torch.arange(12) != 4
    for name in (*DIFFERENTIABLE, "dx"):
        assert torch.equal(clean[name][others], spoiled[name][others]), name  # type: ignore[index]
    of_others = [0, 2]
    for name in ("weights", "biases"):
        assert torch.equal(clean[f"d{name}"][of_others], spoiled[f"d{name}"][of_others])  # type: ignore[index]


# --------------------------------------------------------------------------------------------------------- gradients


def parameters_of(A: int, F: int, K: int, dtype: torch.dtype = F32) -> tuple[list[Tensor], list[Tensor]]:
    generator = seeds.generator(0)
    weights = [torch.randn(K, F, generator=generator).to(dtype).requires_grad_() for _ in range(A)]
    return weights, [torch.randn(K, generator=generator).to(dtype).requires_grad_() for _ in range(A)]


@each_backend
@pytest.mark.parametrize("keep_empty", [False, True])
def test_agents_without_rows(backend: str, keep_empty: bool) -> None:
    weights, biases = parameters_of(4, 3, 5)
    with use_backend(backend):
        plan = dispatch.plan(torch.tensor([1, 3, 1]), 4)
        made = functional.agent_policy(torch.randn(3, 3), plan, weights, biases, keep_empty=keep_empty)
        made.value.sum().backward()
    for a in range(4):
        for p in (weights[a], biases[a]):
            if a in (1, 3):
                assert p.grad is not None and p.grad.any()
            elif keep_empty:
                assert p.grad is not None and not p.grad.any()
            else:
                assert p.grad is None


@each_backend
def test_only_what_is_wanted(backend: str) -> None:
    """x, and frozen parameters, get no gradient; a loss of nothing differentiable has none."""
    weights, biases = parameters_of(2, 3, 5)
    biases = [b.detach() for b in biases]
    x = torch.randn(6, 3, requires_grad=True)
    with use_backend(backend):
        plan = dispatch.plan(torch.arange(6) % 2, 2)
        made = functional.agent_policy(x.detach(), plan, weights, biases, critic_weights=weights)
        assert not made.actions.requires_grad and not made.greedy.requires_grad
        (made.value + made.critic_at).sum().backward()  # type: ignore[operator]
        assert all(w.grad is not None for w in weights) and x.grad is None
        functional.agent_policy(x, plan, [w.detach() for w in weights], biases).value.sum().backward()
    assert x.grad is not None and x.grad.any()


@each_backend
def test_autocast(backend: str) -> None:
    weights, biases = parameters_of(2, 8, 5)
    with use_backend(backend), torch.autocast("cpu", BF16):
        made = functional.agent_policy(torch.randn(6, 8), dispatch.plan(torch.arange(6) % 2, 2), weights, biases)
    assert made.scores.dtype == BF16 and made.value.dtype == F32
    made.value.sum().backward()
    assert all(w.grad is not None and w.grad.dtype == F32 for w in weights)


# ------------------------------------------------------------------------------------------- what PyTorch expects


@needs_native
@pytest.mark.parametrize(("dtype", "net"), [(F32, "tables"), (BF16, "critic")])
def test_opcheck(dtype: torch.dtype, net: str) -> None:
    case = case_of(torch.tensor([0, 2, -1, 0, 2]), 3, 4, 5, net, dtype)
    nets = list(lists(case.inputs).values())
    order, offsets, _ = torch.ops.fastroute._dispatch_plan_native(case.inputs["agents"], 3)
    acc = torch.promote_types(dtype, F32)
    u, coin, x = torch.rand(5, 5, dtype=acc), torch.rand(5, dtype=acc), case.inputs["x"]
    native = torch.ops.fastroute._agent_policy_native.default
    for rest in ((None, None, None), (u, coin, None), (None, None, case.inputs["forced"])):
        opcheck(native, (x, order, offsets, *nets, *rest, 0, 0.5, 0.3, True), grad=False)
    made = native(x, order, offsets, *nets, u, None, None, 0, 0.5, 0.3, False)
    grads = [torch.randn(5, dtype=acc), torch.randn(5, 5).to(dtype), None, torch.randn(5, dtype=acc)]
    wants = (x is not None, x is not None, True, x is not None, True, False, False, True)
    backward = torch.ops.fastroute._agent_policy_native_backward.default
    given = (*grads, made[3], made[0], x, order, offsets, nets[0], nets[2], 3, 5, 0, 0.5, *wants)
    opcheck(backward, given, grad=False)


@needs_native
def test_no_operator_runs_inside() -> None:
    A, agents = 6, torch.randint(6, (40,))
    weights, biases = parameters_of(A, 9, 7)
    critic_weights, critic_biases = parameters_of(A, 9, 1)
    x, u = torch.randn(40, 9, requires_grad=True), torch.rand(40, 7)
    with use_backend("native"):
        plan = dispatch.plan(agents, A)
        with torch.profiler.profile() as profile:
            made = functional.agent_policy(
                x, plan, weights, biases, critic_weights=critic_weights, critic_biases=critic_biases, uniform=u,
                keep_empty=True,
            )  # fmt: skip
            torch.autograd.backward([made.value, made.critic_at], [torch.ones(40), torch.ones(40)])  # type: ignore[list-item]
    counts = {e.key: e.count for e in profile.key_averages() if e.key.startswith("aten::")}
    assert counts.pop("aten::detach") == 1 + 4 * A  # what AccumulateGrad does to a gradient that it keeps as it is
    assert counts.keys() <= {"aten::ones", "aten::empty", "aten::fill_"}, counts  # of the test itself


@needs_native
def test_same_bits_on_any_number_of_threads() -> None:
    case = case_of(some_agents(3000, 7), 7, 40, 20, "critic", F32)
    made = on_threads((1, 2, 7), lambda: evaluate(op("native"), case))
    for other in made[1:]:
        assert all(torch.equal(made[0][k], t) for k, t in other.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("backend, kind", [*((b, "softmax") for b in HERE), (HERE[-1], "shifted")])
def test_compile(backend: str, kind: str) -> None:
    """Without looking at counts, on the reference in another order of sums."""
    generator = seeds.generator(0)
    weights, biases = parameters_of(3, 4, 5, F64)
    critic, _ = parameters_of(3, 4, 5, F64)
    calls = [
        (torch.randn(N, 4, generator=generator, dtype=F64).requires_grad_(), torch.arange(N) % 3,
         torch.rand(N, 5, generator=generator, dtype=F64))
        for N in (16, 7, 33)
    ]  # fmt: skip

    def call(x: Tensor, agents: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
        made = functional.agent_policy(
            x, dispatch.plan(agents, 3), weights, biases, critic_weights=critic, uniform=uniform, kind=kind,
            keep_empty=True,
        )  # fmt: skip
        return tuple(results(made).values())

    with use_backend(backend):
        check_compiled(call, calls, parameters=[*weights, *biases], backend="eager")


class Greedy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.policy, self.critic = nn.Linear(4, 5), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = functional.agent_policy(
            x, None, [self.policy.weight], [self.policy.bias], critic_weights=[self.critic.weight],
            critic_biases=[self.critic.bias],
        )  # fmt: skip
        return tuple(t for t in made if t is not None)


@each_backend
def test_export(backend: str) -> None:
    example, *others = [torch.randn(B, 4, generator=seeds.generator(B)) for B in (6, 2, 33)]
    with use_backend(backend):
        check_exported(Greedy(), example, others, {0: torch.export.Dim("batch", min=2)})


def test_explain() -> None:
    for backend in HERE:
        with use_backend(backend):
            made = fastroute.explain(Greedy(), torch.randn(6, 4))
        assert [(d.backend, d.case.op) for d in made] == [(backend, "agent_policy")]


W, PLAN = torch.zeros(5, 4), dispatch.plan(torch.tensor([0, 1]), 2)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"x": None}, ValueError, r"x: expected a tensor \[N, F\]"),
        ({"x": torch.zeros(2, 3)}, ValueError, r"x: expected \[N, 4\].*got \[2, 3\]"),
        ({"x": torch.zeros(3, 4)}, ValueError, r"x: expected the plan's 2 rows, got \[3, 4\]"),
        ({"x": torch.zeros(2, 4, dtype=F64)}, TypeError, "x: expected the agents' dtype torch.float32.*float64"),
        ({"plan": None}, ValueError, "plan: expected one for 2 agents, got None"),
        ({"plan": dispatch.plan(torch.zeros(1, 2).long(), 2)}, ValueError, "plan: expected one agent per row, got 2"),
        ({"plan": dispatch.plan(torch.zeros(2).long(), 3)}, ValueError, "plan: expected one of 2 agents, got one of 3"),
        ({"weights": ()}, ValueError, "weights: expected one of each module"),
        ({"biases": [W[:, 0]]}, ValueError, r"biases: expected 2 tensors \[5\], one for each weight, got 1 \[5\]"),
        ({"biases": [W[0]] * 2}, ValueError, r"biases: expected 2 tensors \[5\], one for each weight, got 2 \[4\]"),
        ({"critic_weights": [W]}, ValueError, "critic_weights: expected one of each of 2 agents, got 1"),
        ({"critic_weights": [W[:3]] * 2}, ValueError, "critic_weights: expected 5 outputs, or 1, got 3"),
        ({"critic_weights": [W[:, :3]] * 2}, ValueError, "critic_weights: expected 4 features, got 3"),
        ({"kind": "linear"}, ValueError, "kind: expected one of softmax, score, shifted, got 'linear'"),
        ({"uniform": torch.ones(2, 4)}, ValueError, r"uniform: expected shape \[2, 5\] .*got \[2, 4\]"),
        ({"coin": torch.ones(2, 1)}, ValueError, r"coin: expected shape \[2\]"),
        ({"forced": torch.zeros(3, dtype=torch.int64)}, ValueError, r"forced: expected shape \[2\]"),
        ({"forced": torch.zeros(2, dtype=torch.int32)}, TypeError, "forced: expected int64, got torch.int32"),
        ({"expected": True}, ValueError, "expected: expected a critic of 5 outputs"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        functional.agent_policy(**{"x": torch.zeros(2, 4), "plan": PLAN, "weights": [W, W], **arguments})  # type: ignore[arg-type]
