"""``policy`` on every backend: choices and values against their definition, draws against their probabilities.

Axes: N (n) rows, K (k) choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from scipy import stats  # comes with scikit-learn
from torch import Tensor, nn

import fastroute
from fastroute import functional, use_backend
from fastroute.ops.policy import reference as reference
from fastroute.ops.policy.contract import KINDS
from tests.helpers import seeds, strategies
from tests.helpers.backends import HERE, each_backend, needs_native
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_all_same, assert_same, check_compiled, check_exported, gradcheck, opcheck

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
each_dtype = pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
each_kind = pytest.mark.parametrize("kind", KINDS)


def draws(N: int, K: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.rand(N, K, dtype=dtype, generator=seeds.generator(seed))


def value_case(N: int, K: int, dtype: torch.dtype = F32, seed: int = 0, scale: float = 2.0) -> Case:
    """Of forced actions, some negative: then no rounding can change a choice."""
    generator = seeds.generator(seed)
    acc = torch.promote_types(dtype, F32)
    scores = (torch.randn(N, K, generator=generator, dtype=F64) * scale).to(dtype)
    forced = torch.randint(-1, K, (N,), generator=generator)
    return Case(
        {"scores": scores, "forced": forced}, {"value": torch.randn(N, generator=generator, dtype=F64).to(acc)},
        {"scores": "nk", "forced": "n", "value": "n"}, ("scores",),
    )  # fmt: skip


def op(backend: str, **options: Any) -> Callable[..., dict[str, Tensor]]:
    def call(**inputs: Tensor) -> dict[str, Tensor]:
        with use_backend(backend):
            return {"value": functional.policy(**inputs, **options).value}

    return call


def truth(**options: Any) -> Callable[..., dict[str, Tensor]]:
    return lambda **inputs: {"value": reference.policy(**inputs, **options).value}


@each_backend
@each_kind
@each_dtype
@pytest.mark.parametrize("N, K", [(64, 5), (33, 20), (7, 1), (5, 131), (300, 2)])
def test_values(backend: str, kind: str, dtype: torch.dtype, N: int, K: int) -> None:
    for temperature in (1.0,) if kind != "softmax" else (1.0, 0.3):
        options = {"kind": kind, "temperature": temperature}
        cases = [value_case(N, K, dtype, seed) for seed in range(2)]
        acc = torch.promote_types(dtype, F32)
        if dtype == F64:
            found, exact = (evaluate(fn(**options), cases[0]) for fn in (partial(op, backend), truth))
            assert_all_same(found, exact)
        else:
            found = check(op(backend, **options), truth(**options), cases, dtype=dtype)
        value = found["value"]
        assert value is not None and value.dtype == acc and value.shape == (N,)
        forced = cases[0].inputs["forced"]
        assert forced is not None and not value[forced < 0].any() and not found["dscores"][forced < 0].any()  # type: ignore[index]


@each_backend
@each_kind
def test_gradcheck(backend: str, kind: str) -> None:
    gradcheck(op(backend, kind=kind, temperature=0.7), value_case(6, 4))


# --------------------------------------------------------------------------------------------------------- choices


def chosen(backend: str, scores: Tensor, **options: Any) -> Any:
    with use_backend(backend):
        return functional.policy(scores, **options)


@each_backend
@hypothesis.given(data=st.data())
def test_choices(backend: str, data: st.DataObject) -> None:
    """Every combination, against the definition in float64 where rounding cannot change the winner."""
    N = data.draw(st.integers(0, 20))
    K = data.draw(st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33, 100])))
    kind, seed = data.draw(st.sampled_from(KINDS)), data.draw(strategies.seeds)
    generator = seeds.generator(seed)
    scores = torch.randn(N, K, generator=generator, dtype=F64)
    options: dict[str, Any] = {"kind": kind, "temperature": data.draw(st.sampled_from([0.1, 1.0, 3.0]))}
    if data.draw(st.booleans()):
        options["uniform"] = draws(N, K, seed, F64)
    if data.draw(st.booleans()):
        options["coin"] = torch.rand(N, generator=generator, dtype=F64)
        options["exploration"] = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    if data.draw(st.booleans()):
        options["forced"] = torch.randint(-1, K, (N,), generator=generator)
    made = chosen(backend, scores, **options)
    # the definition, row by row
    for b in range(N):
        z = scores[b]
        best = int(z.argmax())
        p = {"softmax": (z / options["temperature"]).softmax(0), "score": torch.ones(K) / K,
             "shifted": (z - z.min() + 1e-6) / (z - z.min() + 1e-6).sum()}[kind]  # fmt: skip
        expected = best
        if "uniform" in options and ("coin" not in options or float(options["coin"][b]) < options["exploration"]):
            expected = int((p / -options["uniform"][b].log()).argmax())
        if "forced" in options:
            expected = int(options["forced"][b])
        assert int(made.actions[b]) == expected and int(made.greedy[b]) == best
        worth = z[expected] if kind == "score" else p[expected].clamp(2**-23 if kind == "shifted" else 0, None).log()
        if kind == "shifted":
            worth = worth.clamp(max=math.log1p(-(2**-23)))
        assert_same(made.value[b], worth.double() if expected >= 0 else torch.zeros((), dtype=F64))
    assert made.actions.dtype == made.greedy.dtype == torch.int64


@each_backend
def test_a_coin_without_uniform_is_greedy(backend: str) -> None:
    scores = torch.randn(30, 4, generator=seeds.generator(0))
    made = chosen(backend, scores, coin=torch.zeros(30), exploration=1.0)
    assert torch.equal(made.actions, scores.argmax(1))


@each_backend
@each_kind
def test_ties(backend: str, kind: str) -> None:
    """The first of equals, in the greedy choice and in the race."""
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 5.0]])
    assert chosen(backend, scores, kind=kind).actions.tolist() == [1, 0, 3]
    made = chosen(backend, scores, kind=kind, uniform=torch.full((3, 4), 0.5))
    assert made.actions.tolist() == ([0, 0, 0] if kind == "score" else [1, 0, 3]) and made.greedy.tolist() == [1, 0, 3]


@each_backend
@each_kind
@each_dtype
def test_what_is_not_a_number_stays_in_its_row(backend: str, kind: str, dtype: torch.dtype) -> None:
    scores = torch.randn(6, 4, generator=seeds.generator(0)).to(dtype)
    uniform = draws(6, 4, dtype=torch.promote_types(dtype, F32))
    clean, clean_grad = _with_gradient(backend, scores, kind, uniform)
    for spoiled in (math.nan, math.inf, -math.inf):
        bad = scores.clone()
        bad[2, 1] = spoiled
        made, grad = _with_gradient(backend, bad, kind, uniform)
        others = torch.arange(6) != 2
        for got, expected in ((made.actions, clean.actions), (made.value, clean.value), (made.greedy, clean.greedy),
                              (grad, clean_grad)):  # fmt: skip
            assert torch.equal(got[others], expected[others])
        assert 0 <= int(made.actions[2]) < 4 and 0 <= int(made.greedy[2]) < 4
        if math.isnan(spoiled):
            assert int(made.greedy[2]) == int(bad.argmax(1)[2])


def _with_gradient(backend: str, scores: Tensor, kind: str, uniform: Tensor) -> tuple[Any, Tensor]:
    leaf = scores.clone().requires_grad_()
    made = chosen(backend, leaf, kind=kind, uniform=uniform)
    made.value.sum().backward()
    assert leaf.grad is not None
    return made, leaf.grad


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each_kind
def test_layouts(backend: str, layout: Callable[[Tensor], Tensor], kind: str) -> None:
    scores, uniform, coin = torch.randn(9, 5), draws(9, 5), torch.rand(9)
    options = {"kind": kind, "exploration": 0.5, "temperature": 0.5}
    expected = chosen(backend, scores, uniform=uniform, coin=coin, **options)
    made = chosen(backend, layout(scores), uniform=layout(uniform), coin=layout(coin), **options)
    assert all(map(torch.equal, made, expected))
    forced = layout(torch.arange(9) % 6 - 1)
    a, b = (chosen(backend, s, forced=f, **options) for s, f in ((scores, forced.clone()), (layout(scores), forced)))
    assert all(map(torch.equal, a, b))


@each_backend
def test_forced_actions_are_not_aliased(backend: str) -> None:
    forced = torch.tensor([1, 0])
    made = chosen(backend, torch.randn(2, 3), forced=forced)
    made.actions.fill_(2)
    assert forced.tolist() == [1, 0]


@each_backend
def test_large_scores(backend: str) -> None:
    """log p does not overflow, and a hopeless choice is hopeless, not NaN."""
    made = chosen(backend, torch.tensor([[1e4, -1e4, 0.0]]), forced=torch.tensor([1]))
    assert float(made.value) == -2e4
    made = chosen(backend, torch.full((1, 3), -3e38), uniform=draws(1, 3))
    assert float(made.value) == pytest.approx(-math.log(3))


# ----------------------------------------------------------------------------------------------------------- draws


@each_backend
@each_kind
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_have_their_probabilities(backend: str, kind: str, temperature: float) -> None:
    """A chi-square test of 40,000 draws; a right sampler fails it once in a million seeds."""
    z = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.9])
    N = 40_000
    made = chosen(backend, z.expand(N, 5), kind=kind, temperature=temperature, uniform=draws(N, 5, seed=3))
    p = {"softmax": (z.double() / temperature).softmax(0), "score": torch.full((5,), 0.2, dtype=F64),
         "shifted": (z - z.min() + 1e-6).double() / (z - z.min() + 1e-6).double().sum()}[kind]  # fmt: skip
    counts, expected = torch.bincount(made.actions, minlength=5).double(), N * p
    likely = expected >= 5
    assert counts[~likely].sum() <= 8  # "shifted" gives the least likely one a chance in ten million
    chi2 = float(((counts - expected).square() / expected)[likely].sum())
    assert stats.chi2.sf(chi2, int(likely.sum()) - 1) > 1e-6


@each_backend
def test_coins_have_their_frequency(backend: str) -> None:
    N, exploration = 20_000, 0.3
    coin = torch.rand(N, generator=seeds.generator(0))
    scores = torch.tensor([0.0, 1.0, 0.5, 0.2]).expand(N, 4)
    made = chosen(backend, scores, kind="score", uniform=draws(N, 4), coin=coin, exploration=exploration)
    counts = torch.bincount(made.actions, minlength=4)
    explored = [int(counts[k]) for k in (0, 2, 3)]
    for count in explored:  # each with chance exploration / 4
        assert stats.binomtest(count, N, exploration / 4).pvalue > 1e-6
    assert torch.equal(made.actions[coin >= exploration], torch.ones_like(made.actions)[coin >= exploration])


# ------------------------------------------------------------------------------------------- what PyTorch expects


@needs_native
@pytest.mark.parametrize("dtype, kind", list(zip((F32, F64, BF16), KINDS, strict=True)))
def test_opcheck(dtype: torch.dtype, kind: str) -> None:
    native = torch.ops.fastroute._policy_native.default
    acc = torch.promote_types(dtype, F32)
    scores, uniform, coin = torch.randn(6, 4).to(dtype), draws(6, 4, dtype=acc), torch.rand(6, dtype=acc)
    forced = torch.tensor([0, 3, -1, 1, 2, 2])
    for rest in ((None, None, None), (uniform, None, None), (uniform, coin, None), (None, None, forced)):
        opcheck(native, (scores, *rest, KINDS.index(kind), 0.5, 0.3), grad=False)
    grad = torch.randn(6, dtype=acc)
    backward = torch.ops.fastroute._policy_native_backward.default
    opcheck(backward, (grad, scores, forced, KINDS.index(kind), 0.5), grad=False)


@pytest.mark.parametrize("backend, kind", [*((b, "softmax") for b in HERE), (HERE[0], "shifted"), (HERE[-1], "score")])
def test_compile(backend: str, kind: str) -> None:
    generator = seeds.generator(0)
    calls = [
        (torch.randn(B, 4, generator=generator, dtype=F64).requires_grad_(), draws(B, 4, B, F64),
         torch.rand(B, generator=generator, dtype=F64))
        for B in (16, 7, 33)
    ]  # fmt: skip

    def call(scores: Tensor, uniform: Tensor, coin: Tensor) -> tuple[Tensor, ...]:
        return tuple(functional.policy(scores, uniform=uniform, coin=coin, kind=kind, temperature=0.5, exploration=0.3))

    with use_backend(backend):
        check_compiled(call, calls)


@pytest.mark.parametrize("backend, kind", [*((b, KINDS[0]) for b in HERE), *((HERE[-1], k) for k in KINDS[1:])])
def test_two_in_one_graph(backend: str, kind: str) -> None:
    """Of which nothing is a variable that the first one took."""
    calls = [(torch.randn(B, 3, dtype=F64, requires_grad=True), draws(B, 3, B, F64)) for B in (8, 5)]

    def call(z: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
        options = {"uniform": uniform, "kind": kind, "temperature": 0.5, "exploration": 0.3}
        return tuple(functional.policy(t, **options).value for t in (z, 2 * z))

    with use_backend(backend):
        check_compiled(call, calls)


class Greedy(nn.Module):
    def forward(self, scores: Tensor) -> tuple[Tensor, ...]:
        return tuple(functional.policy(scores, temperature=0.5))


@each_backend
def test_export(backend: str) -> None:
    example, *others = [torch.randn(B, 4, generator=seeds.generator(B)) for B in (6, 2, 33)]
    with use_backend(backend):
        check_exported(Greedy(), example, others, {0: torch.export.Dim("batch", min=2)})


@each_backend
def test_choices_have_no_gradient(backend: str) -> None:
    made = chosen(backend, torch.randn(5, 3).requires_grad_())
    assert made.value.requires_grad and not made.actions.requires_grad and not made.greedy.requires_grad


def test_explain() -> None:
    for backend in HERE:
        with use_backend(backend):
            made = fastroute.explain(Greedy(), torch.randn(6, 4))
        assert [(d.backend, d.case.op) for d in made] == [(backend, "policy")]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"scores": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "scores: .*floating-point.*int64"),
        ({"scores": torch.zeros(3)}, ValueError, r"scores: .*\[N, K\].*got \[3\]"),
        ({"scores": torch.zeros(3, 0)}, ValueError, r"scores: .*got \[3, 0\]"),
        ({"kind": "linear"}, ValueError, "kind: expected one of softmax, score, shifted, got 'linear'"),
        ({"uniform": torch.ones(2, 4)}, ValueError, r"uniform: expected shape \[2, 3\] .*got \[2, 4\]"),
        ({"coin": torch.ones(2, 1)}, ValueError, r"coin: expected shape \[2\]"),
        (
            {"coin": torch.ones(2, dtype=torch.int64)},
            TypeError,
            "coin: expected a floating-point tensor, got torch.int64",
        ),
        ({"forced": torch.zeros(3, dtype=torch.int64)}, ValueError, r"forced: expected shape \[2\]"),
        ({"forced": torch.zeros(2, dtype=torch.int32)}, TypeError, "forced: expected int64, got torch.int32"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        functional.policy(**{"scores": torch.zeros(2, 3), **arguments})


@each_backend
def test_empty(backend: str) -> None:
    case = value_case(0, 4)
    assert evaluate(op(backend), case)["dscores"].shape == (0, 4)  # type: ignore[union-attr]
