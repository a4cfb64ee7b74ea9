"""``soft_assignment`` on every backend: against its definition, its laws, and what PyTorch expects of an op.

Axes: b samples, n inputs, m outputs, h width of a vote.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fastroute
from fastroute import functional, use_backend
from tests.helpers import seeds, strategies
from tests.helpers.assignment_cases import FORMS, SHARED, case_of, of_form, op, truth
from tests.helpers.backends import HERE, each_backend
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_same, check_compiled, check_exported, gradcheck, opcheck

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
each_form = pytest.mark.parametrize("form", FORMS)
each_shared = pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
SIZE = (3, 23, 6, 5)


@each_backend
@each_form
@each_shared
def test_float64(backend: str, form: str, shared: str) -> None:
    for size in (SIZE, (2, 300, 9, 33), (1, 1, 2, 1)):
        case = case_of(form, size, shared, F64)
        found = evaluate(op(backend, form), case)
        for name, expected in evaluate(truth(form), case).items():
            got = found[name]
            assert got is not None and expected is not None
            assert_same(got, expected, name)


@each_backend
@each_form
@pytest.mark.parametrize("shared", ["", "m"], ids=["own", "by outputs"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_within_budget(backend: str, form: str, shared: str, dtype: torch.dtype) -> None:
    cases = [case_of(form, (3, 40, 6, 5), shared, dtype, seed) for seed in range(2)]
    check(op(backend, form), truth(form), cases, dtype=dtype)


@pytest.mark.parametrize("m", [1, 3, 16, 17, 32, 33])
@pytest.mark.parametrize("form", ["mean", "gated", "routing"])
def test_around_a_block(form: str, m: int) -> None:
    """Rows and outputs just below and above what the C++ takes at a time."""
    for n in (1, 15, 16, 17, 33):
        for dtype in (F64, F32):
            case = case_of(form, (2, n, m, 20), "m" if form == "mean" else "", dtype)
            check(op("auto", form), truth(form), [case], dtype=dtype)


@each_backend
@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_many_inputs(backend: str, shared: str) -> None:
    """Long sums stay as accurate as plain PyTorch's."""
    cases = [case_of("routing", (2, 3000, 4, 17), shared, F32, seed) for seed in range(2)]
    check(op(backend, "routing"), truth("routing"), cases, dtype=F32)


@each_backend
@each_form
@pytest.mark.parametrize("shared", ["", "bm"], ids=["own", "by both"])
def test_gradcheck(backend: str, form: str, shared: str) -> None:
    gradcheck(op(backend, form), case_of(form, (2, 4, 3, 2), shared))


@each_backend
@hypothesis.given(data=st.data())
def test_any_sizes(backend: str, data: st.DataObject) -> None:
    size = (data.draw(st.integers(0, 4)), data.draw(st.integers(0, 70)), data.draw(st.integers(1, 40)),
            data.draw(st.sampled_from([0, 1, 3, 16, 31])))  # fmt: skip
    form, shared = data.draw(st.sampled_from(sorted(FORMS))), data.draw(st.sampled_from(sorted(SHARED.values())))
    case = case_of(form, size, shared, F64, data.draw(strategies.seeds))
    found = evaluate(op(backend, form), case)
    for name, expected in evaluate(truth(form), case).items():
        got = found[name]
        assert got is not None and expected is not None
        assert_same(got, expected, name)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each_shared
def test_layouts(backend: str, layout: Callable[[Tensor], Tensor], shared: str) -> None:
    form = "padded"
    case = case_of(form, SIZE, shared, F64)
    moved = case.with_inputs(**{k: layout(t) for k in ("scores", "votes", "gate", "use", "ign", "mask")
                                if (t := case.inputs[k]) is not None})  # fmt: skip
    found = evaluate(op(backend, form), moved)
    for name, expected in evaluate(op(backend, form), case).items():
        got = found[name]
        assert got is not None and expected is not None
        assert_same(got, expected, name)


# -------------------------------------------------------------------------------------------------------------- laws


@each_backend
def test_masking_is_deleting(backend: str) -> None:
    case = case_of("routing", SIZE, "", F64)
    rest = torch.tensor([i for i in range(SIZE[1]) if i not in (0, 7, 22)])
    mask = torch.ones(SIZE[1], 1, dtype=torch.bool)
    mask[rest] = False
    found, alone = (
        evaluate(op(backend, "routing"), case.with_inputs(mask=mask)),
        evaluate(op(backend, "routing"), case.select("n", rest)),
    )
    assert_same(found["y"], alone["y"])  # type: ignore[arg-type]
    for name in ("dscores", "dvotes", "dgate"):
        assert_same(found[name][:, rest], alone[name])  # type: ignore[index, arg-type]
        assert not found[name][:, [0, 7, 22]].any()  # type: ignore[index]


@each_backend
@pytest.mark.parametrize("mean", [False, True])
def test_padding_is_not_read(backend: str, mean: bool) -> None:
    case = case_of("gated mean" if mean else "padded", SIZE, "", F64)
    lengths = torch.tensor([23, 5, 0])
    alone = evaluate(op(backend, "gated mean" if mean else "padded"), case.with_inputs(lengths=lengths))
    spoiled = {k: t.clone() for k in ("scores", "votes", "gate") if (t := case.inputs[k]) is not None}
    for b, length in enumerate(lengths):
        for t in spoiled.values():
            t[b, length:] = math.nan
    found = evaluate(op(backend, "gated mean" if mean else "padded"), case.with_inputs(**spoiled, lengths=lengths))
    for name, expected in alone.items():
        assert torch.equal(found[name], expected), name  # type: ignore[arg-type]
    assert not found["y"][2].any()  # type: ignore[index]


@each_backend
def test_a_mean_is_a_mean(backend: str) -> None:
    """Of equal votes it is that vote; weights of every output sum to one."""
    scores, vote = 5 * torch.randn(2, 9, 4, dtype=F64), torch.randn(3, dtype=F64)
    with use_backend(backend):
        for eps in (0, 1e-8, 0.1):
            y = functional.soft_assignment(scores, vote.expand(2, 9, 1, 3), mean=True, eps=eps)
            assert_same(y, vote.expand(2, 4, 3))
        weights = functional.soft_assignment(scores, torch.eye(9, dtype=F64)[None, :, None], mean=True)
        R = scores.softmax(-1)
        assert_same(weights.mT, R / R.sum(1, keepdim=True))


@each_backend
def test_a_mean_of_nothing_is_zero(backend: str) -> None:
    scores = torch.randn(2, 5, 3, requires_grad=True)
    mask = torch.zeros(2, 5, 3, dtype=torch.bool)
    mask[0, :, 1] = True
    mask[1] = True
    with use_backend(backend):
        y = functional.soft_assignment(scores, torch.randn(2, 5, 1, 4), mask=mask, mean=True, eps=1e-3)
    assert not y[0, 1].any() and not y[1].any() and y[0, 0].all()
    y.sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all() and not scores.grad[1].any()


@each_backend
def test_extreme_scores(backend: str) -> None:
    scores = torch.tensor(
        [[[1e4, -1e4, 0.0], [-3e38, -3e38, -3e38], [-torch.inf, 0.0, 3e38], [-500.0, -501.0, -600.0]]]
    )
    with use_backend(backend):
        R = functional.soft_assignment(scores, torch.eye(4)[None, :, None])
    torch.testing.assert_close(R.mT, scores.softmax(-1))


@each_backend
def test_what_is_not_a_number_stays_in_its_sample(backend: str) -> None:
    case = case_of("routing", SIZE, "", F32)
    clean = evaluate(op(backend, "routing"), case)
    for name in ("scores", "votes", "gate"):
        t = case.inputs[name].clone()  # type: ignore[union-attr]
        t[1, 3] = math.nan
        found = evaluate(op(backend, "routing"), case.with_inputs(**{name: t}))
        for k in ("y", "dscores", "dvotes", "dgate"):
            assert torch.equal(found[k][[0, 2]], clean[k][[0, 2]])  # type: ignore[index]


@each_backend
def test_same_bits_every_time(backend: str) -> None:
    case = case_of("routing", (4, 2000, 7, 13), "", F32)
    first, second = (evaluate(op(backend, "routing"), case) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name])  # type: ignore[arg-type]


@each_backend
@pytest.mark.parametrize("scores_dtype", [BF16, F32])
def test_scores_of_another_dtype(backend: str, scores_dtype: torch.dtype) -> None:
    """As under autocast: votes in one dtype, scores in another; the sum is in float32."""
    case = case_of("gated", SIZE, "", BF16 if scores_dtype == F32 else F32, scores_dtype=scores_dtype)
    found = evaluate(op(backend, "gated"), case)
    expected = evaluate(truth("gated"), case)
    assert found["y"].dtype == F32 and found["dscores"].dtype == scores_dtype  # type: ignore[union-attr]
    torch.testing.assert_close(found["y"], expected["y"])


def test_float16_takes_the_reference() -> None:
    case = case_of("routing", SIZE, "", F16)
    assert evaluate(op("auto", "routing"), case)["y"].dtype == F32  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------- what PyTorch expects


@pytest.mark.parametrize(
    ("backend", "form", "shared"),
    [(HERE[0], "scores", ""), (HERE[0], "first", "b"), (HERE[0], "padded", "bm"), (HERE[-1], "masked mean", "m")],
)
def test_opcheck(backend: str, form: str, shared: str) -> None:
    inputs = case_of(form, (2, 5, 3, 4), shared, F64).inputs
    for k in ("use", "ign"):
        if (t := inputs[k]) is not None and t.dim() == 2:
            inputs[k] = t[None]
    given = [inputs[k] for k in ("votes", "scores", "gate", "use", "ign", "prior", "mask", "lengths")]
    eps = FORMS[form].get("eps", 0.0)
    opcheck(torch.ops.fastroute.soft_assignment.default, (*given, eps, backend))
    dM, dp = torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 3, dtype=F64)
    backward = torch.ops.fastroute.soft_assignment_backward.default
    opcheck(backward, (*given, eps, backend, dM, dp, [True, True, False, True, True]), grad=False)


class Mean(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return functional.soft_assignment(scores, scores[..., None], mean=True, eps=1e-8)


@each_backend
def test_compile(backend: str) -> None:
    generator = seeds.generator(0)
    calls = [
        (torch.randn(B, 7, 4, generator=generator, dtype=F64, requires_grad=True),
         torch.randn(B, 7, 1, 6, generator=generator, dtype=F64, requires_grad=True))
        for B in (3, 5, 2)
    ]  # fmt: skip
    with use_backend(backend):
        check_compiled(lambda s, v: functional.soft_assignment(s, v, mean=True, eps=1e-8), calls)
        check_compiled(lambda s, v: functional.soft_assignment(s, v, torch.ones_like(s[..., 0])), calls)


@pytest.mark.parametrize(("form", "shared"), [("routing", ""), ("masked mean", "m")])
def test_small_sizes_are_plain_operators_in_a_graph(form: str, shared: str) -> None:
    """Where sizes are constants; on a backend asked for by name, or of unknown or large sizes, the op stays one."""
    case = case_of(form, (3, 40, 6, 5), shared, F32)

    def ops_in(case: Case, backend: str = "auto", dynamic: bool = False) -> bool:
        found: list[bool] = []

        def look(graph: torch.fx.GraphModule, _: Any) -> Any:
            found.append(any("fastroute" in str(node.target) for node in graph.graph.nodes))
            return graph.forward

        torch._dynamo.reset()
        with use_backend(backend):
            evaluate(torch.compile(of_form(form), fullgraph=True, dynamic=dynamic, backend=look), case)
        return found[0]

    if "native" in HERE:
        assert ops_in(case, "native")
    assert not ops_in(case)
    assert ops_in(case, dynamic=True)
    assert ops_in(case_of(form, (1, 1025, 2, 2), shared, F32))
    check(
        torch.compile(of_form(form), fullgraph=True, dynamic=False, backend="aot_eager"),
        truth(form),
        [case],
        dtype=F32,
    )


@each_backend
def test_export(backend: str) -> None:
    example, *others = [torch.randn(B, 5, 4, generator=seeds.generator(B)) for B in (6, 2, 33)]
    with use_backend(backend):
        check_exported(Mean(), example, others, {0: torch.export.Dim("batch", min=2)})


def test_nothing_but_the_inputs_is_saved() -> None:
    case = case_of("routing", SIZE, "", F32)
    leaves = {k: t.requires_grad_() for k, t in case.inputs.items() if t is not None}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        functional.soft_assignment(**leaves)
    homes = {t.untyped_storage().data_ptr() for t in leaves.values()}
    assert saved and all(t.untyped_storage().data_ptr() in homes for t in saved)


def test_explain() -> None:
    made = fastroute.explain(Mean(), torch.randn(2, 5, 4))
    assert [d.case.op for d in made] == ["soft_assignment"]
    assert dict(made[0].case.sizes) == {"B": 2, "n": 5, "m": 4, "h": 1}


S, V = torch.zeros(2, 5, 3), torch.zeros(2, 5, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"votes": [1.0]}, TypeError, r"votes: expected a tensor \[B, n, m, h\], got list"),
        ({"votes": V.long()}, TypeError, "votes: expected a floating-point tensor"),
        ({"votes": V[0]}, ValueError, r"votes: expected \[B, n, m, h\], got \[5, 3, 4\]"),
        (
            {"votes": V[:, :4]},
            ValueError,
            r"votes: expected \[2 or 1, 5, 3 or 1, h\] .*like the scores, got \[2, 4, 3, 4\]",
        ),
        ({"scores": S[0]}, ValueError, r"scores: expected \[B, n, m\], got \[5, 3\]"),
        ({"scores": S.long()}, TypeError, "scores: expected a floating-point tensor"),
        ({"scores": None}, ValueError, "gate: expected a tensor when scores is None, got None"),
        ({"scores": None, "gate": torch.ones(2, 5)}, ValueError, "prior: expected a tensor when scores is None"),
        (
            {"scores": None, "gate": torch.ones(2), "prior": torch.ones(3)},
            ValueError,
            r"gate: expected \[B, n\], got \[2\]",
        ),
        ({"scores": None, "gate": torch.ones(2, 5), "prior": torch.ones(3, 1)}, ValueError, r"prior: expected \[m\]"),
        ({"gate": torch.ones(2, 4)}, ValueError, r"gate: expected shape \[2, 5\] \(B, n\), got \[2, 4\]"),
        ({"gate": torch.ones(2, 5).double()}, TypeError, r"gate: expected torch.float32 with votes torch.float32"),
        ({"use": torch.ones(4, 3)}, ValueError, r"use: expected shape \[5, 3\] \(n, m\), got \[4, 3\]"),
        ({"ign": torch.ones(1, 5, 3)}, ValueError, r"ign: expected shape \[2, 5, 3\] \(B, n, m\), got \[1, 5, 3\]"),
        ({"mask": torch.ones(5, 3)}, TypeError, "mask: expected a bool tensor"),
        ({"lengths": torch.tensor([6, 1])}, ValueError, "lengths: expected values from 0 to 5"),
        ({"use": torch.ones(5, 3), "mean": True}, ValueError, "mean: expected no use and no ign"),
        ({"eps": 1e-8}, ValueError, "eps: expected 0 without mean, got 1e-08"),
        ({"scores": S.to("meta")}, ValueError, "scores: expected a tensor on cpu like votes, got one on meta"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        functional.soft_assignment(**{"scores": S, "votes": V, **arguments})


@pytest.mark.parametrize("eps", [-1, -1e-8, math.nan, math.inf])
def test_eps_is_a_number_of_zero_or_more(eps: float) -> None:
    with pytest.raises(ValueError, match=r"^eps: expected a number of 0 or more, got"):
        functional.soft_assignment(torch.zeros(2, 4, 3), torch.zeros(2, 4, 1, 5), mean=True, eps=eps)


@each_backend
@pytest.mark.parametrize("masked", [False, True])
def test_a_learned_prior(backend: str, masked: bool) -> None:
    """Its gradient is that of the definition; without gradients the kernels are used as before."""
    seeds.manual_seed(0)
    gate, votes, prior = torch.rand(2, 7, dtype=F64), torch.randn(2, 7, 3, 5, dtype=F64), torch.rand(3, dtype=F64)
    mask = torch.rand(2, 7, 3) < 0.3 if masked else None

    def made(prior: Tensor) -> Tensor:
        with use_backend(backend):
            return functional.soft_assignment(None, votes, gate, prior=prior, mask=mask)

    assert torch.autograd.gradcheck(made, prior.clone().requires_grad_())
    assert_same(made(prior.clone().requires_grad_()).detach(), made(prior))
