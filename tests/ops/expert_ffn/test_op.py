"""``expert_ffn`` on every backend, in float64 and on budget; what it keeps for backward.

Axes: B (b) samples, k experts that each takes, K (e) experts, D (d) features in, H (h) hidden ones, u rows of w_in,
P (p) features out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fastroute
from fastroute import use_backend
from fastroute.functional import expert_ffn
from fastroute.ops import dispatch
from fastroute.ops.activations import ACTIVATIONS
from fastroute.ops.expert_ffn import reference as reference
from tests.helpers import seeds, strategies
from tests.helpers.backends import HERE, each_backend
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_all_same, assert_same, check_compiled, check_exported, gradcheck, opcheck

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
WRT = ("x", "weights", "w_in", "w_out")

#: Which experts seven samples take, of five: [B, k].
ACTIONS: dict[str, list[list[int]]] = {
    "mixed": [[0, 3], [3, 1], [-1, 4], [4, 4], [-1, -1], [1, 0], [3, -2]],  # 2 is empty, 4 is taken twice
    "one-takes-all": [[2, 2]] * 7,
    "all-dropped": [[-1, -3]] * 7,
    "one-each": [[4], [1], [-1], [0], [2], [3], [4]],
    "four": [[0, 1, 2, 3], [4, 3, 2, 1], [-1, 0, -1, 0], [1, 1, 1, 1], [2, 4, 0, 1], [3, 4, 1, 0], [4, 0, 2, 3]],
    "no-samples": [],
}
each_histogram = pytest.mark.parametrize("actions", ACTIONS.values(), ids=ACTIONS)


def ffn_case(
    actions: list[list[int]] | Tensor, D: int = 9, H: int = 6, P: int = 8, *, K: int = 5, gated: bool = True,
    weights: bool = True, dtype: torch.dtype = F32, seed: int = 0,
) -> Case:  # fmt: skip
    generator = seeds.generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

    a = torch.as_tensor(actions, dtype=torch.int64).reshape(len(actions), -1 if len(actions) else 2)
    B = len(a)
    inputs: dict[str, Tensor | None] = {
        "actions": a, "x": normal(B, D), "weights": normal(*a.shape).abs() if weights else None,
        "w_in": normal(K, (2 if gated else 1) * H, D), "w_out": normal(K, P, H),
    }  # fmt: skip
    axes = {"actions": "bk", "x": "bd", "weights": "bk", "w_in": "eud", "w_out": "eph", "y": "bp"}
    return Case(inputs, {"y": normal(B, P)}, axes, tuple(name for name in WRT if inputs[name] is not None))


def op(backend: str, **options: Any) -> Callable[..., dict[str, Tensor]]:
    def call(actions: Tensor, x: Tensor, weights: Tensor | None, w_in: Tensor, w_out: Tensor) -> dict[str, Tensor]:
        with use_backend(backend):
            plan = dispatch.plan(actions, len(w_in))
            return {"y": expert_ffn(x, plan, weights, w_in, w_out, **options)}

    return call


def truth(activation: str = "silu", gated: bool = True) -> Callable[..., dict[str, Tensor]]:
    def call(actions: Tensor, x: Tensor, weights: Tensor | None, w_in: Tensor, w_out: Tensor) -> dict[str, Tensor]:
        w = torch.ones(actions.shape, dtype=x.dtype) if weights is None else weights
        return {"y": reference.expert_ffn(x, actions, w, w_in, w_out, activation, gated)}

    return call


def loop(actions: Tensor, x: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Sample by sample and entry by entry, gated SiLU."""
    rows = []
    for b in range(len(x)):
        y = torch.zeros(w_out.shape[1], dtype=x.dtype)
        for j, e in enumerate(actions[b].tolist()):
            if e >= 0:
                u = w_in[e] @ x[b]
                half = len(u) // 2
                y = y + weights[b, j] * (w_out[e] @ (nn.functional.silu(u[:half]) * u[half:]))
        rows.append(y)
    return torch.stack(rows)


def test_the_reference_is_the_loop() -> None:
    case = ffn_case(ACTIONS["mixed"], dtype=F64)
    expected = evaluate(lambda **given: {"y": loop(**given)}, case)
    assert_all_same(evaluate(truth(), case), expected)


@each_backend
@each_histogram
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
def test_budget(backend: str, actions: list[list[int]], dtype: torch.dtype) -> None:
    cases = [ffn_case(actions, dtype=dtype, seed=seed) for seed in range(2)]
    y = check(op(backend), truth(), cases, dtype=dtype, stored=dtype)["y"]
    assert y is not None and y.dtype == dtype and y.is_contiguous()
    dropped = (cases[0].inputs["actions"] < 0).all(1)  # type: ignore[union-attr, operator]
    assert not y[dropped].any()


@each_backend
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend: str, activation: str, gated: bool) -> None:
    options = {"activation": activation, "gated": gated}
    case = ffn_case(ACTIONS["mixed"], gated=gated, dtype=F64)
    expected = evaluate(truth(activation, gated), case)
    assert_all_same(evaluate(op(backend, **options), case), expected)
    gradcheck(op(backend, **options), ffn_case(ACTIONS["mixed"][:4], 3, 2, 2, gated=gated))


@each_backend
def test_without_weights(backend: str) -> None:
    case = ffn_case(ACTIONS["four"], weights=False, dtype=F64)
    expected = evaluate(truth(), case)
    assert_all_same(evaluate(op(backend), case), expected)


@each_backend
@hypothesis.given(data=st.data())
def test_any_histogram(backend: str, data: st.DataObject) -> None:
    """In float64, against the definition."""
    K, k, B = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 40))
    names = data.draw(st.lists(st.integers(-1, K - 1), min_size=1, max_size=4))  # few names: many empty experts
    picks = torch.randint(len(names), (B, k), generator=seeds.generator(data.draw(strategies.seeds)))
    gated, activation = data.draw(st.booleans()), data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    case = ffn_case(
        torch.tensor(names)[picks], data.draw(strategies.widths), data.draw(strategies.widths),
        data.draw(strategies.widths), K=K, gated=gated, dtype=F64,
    )  # fmt: skip
    expected = evaluate(truth(activation, gated), case)
    assert_all_same(evaluate(op(backend, activation=activation, gated=gated), case), expected)


@each_backend
@pytest.mark.parametrize("wrt", [("x",), ("weights",), ("w_in",), ("w_out",), ("weights", "w_out")], ids=str)
def test_only_what_is_wanted(backend: str, wrt: tuple[str, ...]) -> None:
    case = ffn_case(ACTIONS["mixed"], dtype=F64)
    whole = evaluate(op(backend), case)
    found = evaluate(op(backend), Case(case.inputs, case.cotangents, case.axes, wrt))
    for name in wrt:
        assert torch.equal(found[f"d{name}"], whole[f"d{name}"])  # type: ignore[arg-type]


@each_backend
def test_the_same_bits_again(backend: str) -> None:
    case = ffn_case(ACTIONS["four"] * 9)
    first, again = evaluate(op(backend), case), evaluate(op(backend), case)
    assert all(torch.equal(t, again[name]) for name, t in first.items())  # type: ignore[arg-type]


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("of", ["x", "weights", "w_in", "w_out", "cotangent"])
def test_layouts(backend: str, layout: Callable[[Tensor], Tensor], of: str) -> None:
    case = ffn_case(ACTIONS["mixed"], dtype=F64)
    expected = evaluate(op(backend), case)
    if of == "cotangent":
        moved = Case(case.inputs, {"y": layout(case.cotangents["y"])}, case.axes, case.wrt)
    else:
        moved = case.with_inputs(**{of: layout(case.inputs[of])})  # type: ignore[arg-type]
    assert_all_same(evaluate(op(backend), moved), expected)


# ----------------------------------------------------------------------------------------------------- what it keeps


def kept_bytes(call: Callable[[], Tensor], parameters: list[Tensor]) -> dict[torch.dtype, int]:
    """Bytes that autograd keeps for backward, by dtype, without parameters."""
    own, kept = {p.data_ptr() for p in parameters}, {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr(), t.dtype] = t.numel() * t.element_size()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = call()
    assert y.requires_grad
    return {dtype: sum(n for (_, d), n in kept.items() if d == dtype) for dtype in {d for _, d in kept}}


@each_backend
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_memory_does_not_grow_with_k(backend: str, k: int) -> None:
    """x, once; of each entry an index and its weight; nothing of the hidden layer or of what the experts give."""
    B, K, D = 64, 8, 16
    case = ffn_case(torch.stack([torch.randperm(K)[:k] for _ in range(B)]), D, 32, D, K=K)
    a, x, w, w_in, w_out = (t.clone() for t in case.inputs.values())  # type: ignore[union-attr]
    leaves = [t.requires_grad_() for t in (x, w, w_in, w_out)]
    kept = kept_bytes(lambda: op(backend)(a, *leaves)["y"], [w_in, w_out])
    assert kept == {F32: 4 * B * D + 4 * B * k, torch.int64: 8 * B * k + 8 * (K + 1)}
    if k > 1:
        plain = kept_bytes(lambda: truth()(a, *leaves)["y"], [w_in, w_out])
        assert sum(plain.values()) > k * sum(kept.values())


# ---------------------------------------------------------------------------------------------- not a number, dropped


@each_backend
def test_a_dropped_weight_is_not_looked_at(backend: str) -> None:
    case = ffn_case(ACTIONS["mixed"], dtype=F64)
    a, w = case.inputs["actions"], case.inputs["weights"]
    assert a is not None and w is not None
    expected = evaluate(op(backend), case)
    found = evaluate(op(backend), case.with_inputs(weights=torch.where(a < 0, torch.nan, w)))
    for name, t in found.items():
        assert torch.equal(t, expected[name]), name  # type: ignore[arg-type]
    assert not found["dweights"][a < 0].any()  # type: ignore[index]


@each_backend
@pytest.mark.parametrize("what", ["x", "weights", "cotangent"])
def test_not_a_number_stays_in_its_sample(backend: str, what: str) -> None:
    case = ffn_case(ACTIONS["mixed"], dtype=F64)
    expected = evaluate(op(backend), case)
    bad = torch.arange(7) == 1  # takes experts 3 and 1
    if what == "cotangent":
        moved = Case(case.inputs, {"y": case.cotangents["y"].masked_fill(bad[:, None], torch.nan)}, case.axes, case.wrt)
    else:
        moved = case.with_inputs(**{what: case.inputs[what].masked_fill(bad[:, None], torch.nan)})  # type: ignore[union-attr]
    found = evaluate(op(backend), moved)
    for name in ("y", "dx", "dweights"):
        assert torch.equal(found[name][~bad], expected[name][~bad]), name  # type: ignore[index]
    others = [0, 2, 4]
    for name in ("dw_in", "dw_out"):
        assert_same(found[name][others], expected[name][others], name)  # type: ignore[index]


@each_backend
def test_a_dropped_sample_may_be_anything(backend: str) -> None:
    case = ffn_case(ACTIONS["mixed"], dtype=F64)
    gone = torch.arange(7) == 4
    found = evaluate(op(backend), case.with_inputs(x=case.inputs["x"].masked_fill(gone[:, None], torch.nan)))  # type: ignore[union-attr]
    for name, t in evaluate(op(backend), case).items():
        assert torch.equal(found[name], t), name  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- what PyTorch expects


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("gated", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=pytest.mark.long)], ids=["fp32", "bf16"])
def test_opcheck(backend: str, gated: bool, dtype: torch.dtype) -> None:
    for weighted in (True, False) if backend == HERE[-1] else (gated,):
        case = ffn_case(ACTIONS["mixed"], 4, 3, 2, gated=gated, weights=weighted, dtype=dtype)
        a, x, w, w_in, w_out = case.inputs.values()
        plan = dispatch.plan(a, 5)  # type: ignore[arg-type]
        given = x, plan.order, plan.offsets, w, w_in, w_out, 2, "silu", gated, backend
        opcheck(torch.ops.fastroute.expert_ffn.default, given)
        for wants in ((True, weighted, True, True), (False, weighted, False, False), (False, False, False, True)):
            opcheck(torch.ops.fastroute.expert_ffn_backward.default, (*given, case.cotangents["y"], *wants), grad=False)


class Layer(nn.Module):
    """Three experts, two for every row, chosen by its first features."""

    def __init__(self, dtype: torch.dtype = F32) -> None:
        super().__init__()
        generator = seeds.generator(0)
        self.w_in = nn.Parameter(torch.randn(3, 10, 4, dtype=dtype, generator=generator))
        self.w_out = nn.Parameter(torch.randn(3, 6, 5, dtype=dtype, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        plan = dispatch.plan((x[:, :2].abs() * 4).long().clamp(max=3) - 1, 3)
        return expert_ffn(x, plan, x[:, 2:].sigmoid(), self.w_in, self.w_out)


@each_backend
def test_compile(backend: str) -> None:
    layer, generator = Layer(), seeds.generator(0)
    calls = [(torch.randn(B, 4, generator=generator).requires_grad_(),) for B in (16, 7, 33)]
    with use_backend(backend):
        check_compiled(layer, calls, parameters=list(layer.parameters()))


@each_backend
def test_export(backend: str) -> None:
    generator = seeds.generator(0)
    example, *others = [torch.randn(B, 4, generator=generator) for B in (6, 2, 33)]
    with use_backend(backend):
        check_exported(Layer(), example, others, {0: torch.export.Dim("batch", min=2, max=4096)})


@each_backend
def test_autocast(backend: str) -> None:
    """The products in bfloat16, the weights as they are; gradients in the parameters' dtype."""
    case = ffn_case(ACTIONS["mixed"])
    half = {k: v if v is None or k in ("actions", "weights") else v.to(BF16) for k, v in case.inputs.items()}
    with torch.autocast("cpu", dtype=BF16):
        found = evaluate(op(backend), case)
    expected = evaluate(op(backend), Case(half, case.cotangents, case.axes, case.wrt))
    for name, t in found.items():
        assert t is not None and t.dtype == (BF16 if name == "y" else F32)
        assert torch.equal(t.to(BF16), expected[name].to(BF16)), name  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=BF16):
        assert evaluate(op(backend), case.to(F64))["y"].dtype == F64  # type: ignore[union-attr]


def test_explain() -> None:
    for backend in HERE:
        with use_backend(backend):
            made = fastroute.explain(Layer(), torch.randn(6, 4))
        assert {d.backend for d in made} == {backend} and "F=4, O=10" in str(made) and "F=5, O=6" in str(made)


def test_bad_input() -> None:
    case = ffn_case(ACTIONS["mixed"])
    a, x, w, w_in, w_out = case.inputs.values()
    assert a is not None and x is not None and w is not None and w_in is not None and w_out is not None
    plan = dispatch.plan(a, 5)
    fine: dict[str, Any] = {"x": x, "plan": plan, "weights": w, "w_in": w_in, "w_out": w_out}
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"activation: expected one of none, relu.*'swish'", {"activation": "swish"}),
        (TypeError, "x: expected a floating-point tensor", {"x": x.long()}),
        (ValueError, r"x: expected \[B, 9\], as the experts take, got \[7, 8\]", {"x": x[:, 1:]}),
        (ValueError, r"x: expected the plan's 7 rows, got \[6, 9\]", {"x": x[1:]}),
        (ValueError, r"weights: expected one per entry, \[7, 2\], got \[7, 1\]", {"weights": w[:, :1]}),
        (TypeError, "weights: expected a floating-point tensor", {"weights": w.long()}),
        (ValueError, r"w_in, w_out: expected \[K, 2H, D\]", {"w_in": w_in[0]}),
        (ValueError, r"w_in: expected \[K, 2H, D\] for gated experts, got \[5, 11, 9\]", {"w_in": w_in[:, 1:]}),
        (
            ValueError,
            r"w_out: expected \[5, P, 12\], as w_in is \[5, 12, 9\] and gated is False, got",
            {"gated": False},
        ),
        (ValueError, r"w_out: expected \[5, P, 6\]", {"w_out": w_out[1:]}),
        (ValueError, "plan: expected one of 5 experts, as w_in has, got one of 6", {"plan": dispatch.plan(a, 6)}),
        (TypeError, r"w_out: expected x's dtype torch.float32, got torch.float64", {"w_out": w_out.double()}),
    ]
    for error, message, changed in wrong:
        with pytest.raises(error, match=message):
            expert_ffn(**{**fine, **changed})
    with pytest.raises(IndexError, match="actions: expected indices below 3, got 6 of 14 out of range"):
        dispatch.plan(a, 3)
