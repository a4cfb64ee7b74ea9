"""MMoE, CGC and PLE against loops over experts in float64, in one graph, in half precision, and by their laws.

Axes: N samples, T tasks, D features in, H hidden ones, P features out, E experts; n of a task's own, s shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastroute.multitask import CGC, PLE, Experts, MMoE
from fastroute.ops.activations import ACTIVATIONS
from tests.helpers import seeds, strategies
from tests.helpers.budget import assert_within_budget
from tests.helpers.opcheck import assert_same, check_compiled, check_exported

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
D, H, P, T = 7, 6, 5, 3
SIZES: dict[str, Any] = {"hidden_features": H, "out_features": P}

MAKE: dict[str, Callable[..., Any]] = {
    "MMoE": lambda **o: MMoE(D, 4, T, **{**SIZES, **o}),
    "MMoE, one layer": lambda **o: MMoE(D, 4, T, **{"out_features": P, **o}),
    "CGC": lambda **o: CGC(D, 2, 3, T, **{**SIZES, **o}),
    "CGC, one own": lambda **o: CGC(D, 1, 2, T, **{**SIZES, "activation": "gelu", "gate_bias": True, **o}),
    "CGC, none shared": lambda **o: CGC(D, 2, 0, T, **{**SIZES, **o}),
    "PLE": lambda **o: PLE(D, 2, 3, T, **{**SIZES, **o}),
    "PLE, three levels": lambda **o: PLE(D, 1, 1, T, levels=3, **{**SIZES, "gate_bias": True, **o}),
    "PLE, none own": lambda **o: PLE(D, 0, 2, T, **{**SIZES, **o}),
}
each_layer = pytest.mark.parametrize("name", MAKE)


def layer(name: str, *, seed: int = 0, dtype: torch.dtype = F64, **options: Any) -> Any:
    seeds.manual_seed(seed)
    return MAKE[name](dtype=dtype, **options)


def samples(*lead: int, seed: int = 0, dtype: torch.dtype = F64, width: int = D) -> Tensor:
    return torch.randn(*lead, width, generator=seeds.generator(seed), dtype=F64).to(dtype)


# ----------------------------------------------------------------------------------------------- the same, by loops


def one_expert(bank: Experts, e: int, x: Tensor) -> Tensor:
    h = ACTIVATIONS[bank.activation](nn.functional.linear(x, bank.w_in[e], bank.b_in[e]))
    return h if bank.w_out is None else nn.functional.linear(h, bank.w_out[e], bank.b_out[e])


def weights(gate: Any, t: int, x: Tensor) -> Tensor:
    w = gate.weight[t].to(torch.promote_types(gate.weight.dtype, F32))
    z = x.to(w.dtype) @ w.mT
    return (z if gate.bias is None else z + gate.bias[t].to(w.dtype)).softmax(-1)


def by_loop(module: Any, x: Tensor, gate_input: Tensor | None = None) -> list[Tensor]:
    """A task at a time, an expert at a time, as the papers write it."""
    levels = module.levels if isinstance(module, PLE) else [module]
    own_in, shared_in = [x] * T, x
    seen, shared_seen = [x if gate_input is None else gate_input] * T, x if gate_input is None else gate_input
    for level in levels:
        n, s = level.own_count, level.shared_count
        own = [[one_expert(level.task_experts, t * n + k, own_in[t]) for k in range(n)] for t in range(T)]
        shared = [one_expert(level.shared_experts, k, shared_in) for k in range(s)]

        def mixed(g: Tensor, experts: list[Tensor]) -> Tensor:
            return sum(g[..., k, None].to(y.dtype) * y for k, y in enumerate(experts))  # type: ignore[return-value]

        made = [mixed(weights(level.gate, t, seen[t]), own[t] + shared) for t in range(T)]
        if level.shared_gate is not None:
            every = [y for task in own for y in task] + shared
            shared_in = mixed(weights(level.shared_gate, 0, shared_seen), every)
        own_in, seen, shared_seen = made, made, shared_in
    return own_in


def outcome(call: Callable[[Tensor], Any], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaves = {"x": x.clone().requires_grad_(), **dict(module.named_parameters())}
    made = call(leaves["x"])
    ys = list(made.values() if isinstance(made, Mapping) else made)
    generator = seeds.generator(1)
    cotangents = [torch.randn(y.shape, dtype=F64, generator=generator).to(y.dtype) for y in ys]
    grads = torch.autograd.grad(ys, list(leaves.values()), cotangents)
    return {**{f"y{t}": y.detach() for t, y in enumerate(ys)}, **dict(zip(leaves, grads, strict=True))}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, t in expected.items():
        assert_same(found[key], t, key)


@each_layer
@pytest.mark.parametrize("lead", [(9,), (3, 4), (), (0,), (2, 0, 3)], ids=str)
def test_the_same_as_a_loop(name: str, lead: tuple[int, ...]) -> None:
    module, x = layer(name), samples(*lead)
    compare(outcome(module, module, x), outcome(lambda x: by_loop(module, x), module, x))


@each_layer
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_an_input_without_gradient(name: str, activation: str) -> None:
    """Which a CPU does by other products, of many rows."""
    module, x = layer(name, activation=activation), samples(40)
    ps = list(module.parameters())

    def results(ys: Any) -> list[Tensor | None]:
        return [
            *(y.detach() for y in ys),
            *torch.autograd.grad(sum(y.square().sum() for y in ys), ps, allow_unused=True),
        ]

    found, expected = results(module(x)), results(by_loop(module, x))
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), k
        if a is not None and b is not None:
            assert_same(a, b, str(k))
    with torch.no_grad():
        for a, y in zip(module(x), by_loop(module, x), strict=True):
            assert_same(a, y, "y")


@hypothesis.given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    n, s = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    hypothesis.assume(n + s)
    hidden = data.draw(st.sampled_from([None, 1, H]))
    activation = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    seeds.manual_seed(data.draw(strategies.seeds))
    options: dict[str, Any] = {"hidden_features": hidden, "out_features": P, "activation": activation}
    module = PLE(D, n, s, T, levels=data.draw(st.integers(1, 3)), gate_bias=data.draw(st.booleans()), **options)
    module.double()
    x = samples(*data.draw(st.lists(st.integers(1, 5), max_size=3)), seed=data.draw(strategies.seeds))
    for got, expected in zip(module(x), by_loop(module, x), strict=True):
        assert_same(got.detach(), expected.detach())


@pytest.mark.parametrize("hidden", [None, H])
@pytest.mark.parametrize("lead", [(), (4,), (2, 0), (3, 2)], ids=str)
def test_experts_and_gates_alone(hidden: int | None, lead: tuple[int, ...]) -> None:
    seeds.manual_seed(0)
    bank, x = Experts(D, hidden, P, 4, activation="silu", dtype=F64), samples(*lead)
    assert_same(bank(x).detach(), torch.stack([one_expert(bank, e, x) for e in range(4)], -2).detach())
    gate = layer("MMoE", gate_bias=True).gate
    g = gate(x)
    assert g.shape == (*lead, T, 4)
    assert_same(g.detach(), torch.stack([weights(gate, t, x) for t in range(T)], -2).detach())
    with pytest.raises(ValueError, match=r"x: expected \[..., 7\], got \[3\]"):
        bank(x.new_zeros(3))
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch\.int64"):
        gate(x.long())


def test_gates_may_look_at_something_else() -> None:
    module, x, seen = (
        CGC(4, 0, [nn.Linear(D, P, dtype=F64) for _ in range(3)], T, dtype=F64),
        samples(6),
        samples(6, width=4),
    )
    g = module.gate(seen)
    experts = [e(x) for e in module.shared_experts]
    for t, y in enumerate(module(x, seen)):
        assert_same(y.detach(), sum(g[:, t, k, None] * e for k, e in enumerate(experts)).detach())


@each_layer
@pytest.mark.long_after(2)
def test_gradcheck(name: str) -> None:
    few = {"out_features": 2} if name == "MMoE, one layer" else {"hidden_features": 3, "out_features": 2}
    module, x = layer(name, activation="tanh", **few), samples(2)
    names = [key for key, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return made

    leaves = [x, *(p.detach().clone() for p in module.parameters())]
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in leaves])


# -------------------------------------------------------------------------------------------------------------- laws


@each_layer
def test_permuting_samples_permutes_outputs(name: str) -> None:
    module, x = layer(name), samples(8)
    order = torch.randperm(8, generator=seeds.generator(0))
    with torch.no_grad():
        for y, turned, first, last in zip(module(x), module(x[order]), module(x[:3]), module(x[3:]), strict=True):
            assert_same(turned, y[order])
            assert_same(torch.cat([first, last]), y, "joined batches")


@torch.no_grad()
def test_permuting_experts_with_their_gates_changes_nothing() -> None:
    module, x = layer("MMoE", gate_bias=True), samples(8)
    order = torch.randperm(4, generator=seeds.generator(2))
    moved = copy.deepcopy(module)
    for p in moved.shared_experts.parameters():
        p.copy_(p[order])
    for p in moved.gate.parameters():
        p.copy_(p[:, order])
    for got, expected in zip(moved(x), module(x), strict=True):
        assert_same(got, expected)


@torch.no_grad()
def test_permuting_tasks_with_their_experts_permutes_outputs() -> None:
    module, x = layer("PLE"), samples(8)
    order, n = [2, 0, 1], 2
    moved = copy.deepcopy(module)
    for level in moved.levels:
        for p in level.task_experts.parameters():
            p.copy_(p.unflatten(0, (T, n))[order].flatten(0, 1))
        level.gate.weight.copy_(level.gate.weight[order])
        if level.shared_gate is not None:
            w, own = level.shared_gate.weight[0], T * n
            w[:own] = w[:own].unflatten(0, (T, n))[order].flatten(0, 1)
    y = module(x)
    for got, t in zip(moved(x), order, strict=True):
        assert_same(got, y[t])


@pytest.mark.parametrize("name", [name for name in MAKE if "PLE" not in name])
@torch.no_grad()
def test_identical_experts_are_one_expert(name: str) -> None:
    module, x = layer(name), samples(8)
    banks = [part for part in module.modules() if isinstance(part, Experts)]
    for bank in banks:
        for p, first in zip(bank.parameters(), banks[0].parameters(), strict=True):
            p.copy_(first[:1].expand_as(p))
    for y in module(x):
        assert_same(y, one_expert(banks[0], 0, x))


@torch.no_grad()
def test_one_level_is_cgc_and_no_own_experts_is_mmoe() -> None:
    x = samples(8)
    cgc, ple = layer("CGC"), PLE(D, 2, 3, T, levels=1, dtype=F64, **SIZES)
    ple.levels[0].load_state_dict(cgc.state_dict())
    mmoe, alone = layer("MMoE"), CGC(D, 0, 4, T, dtype=F64, **SIZES)
    alone.load_state_dict(mmoe.state_dict())
    for a, b in ((ple, cgc), (alone, mmoe)):
        for got, expected in zip(a(x), b(x), strict=True):
            assert torch.equal(got, expected)


@torch.no_grad()
def test_a_gate_that_is_sure_takes_one_expert() -> None:
    module, x = layer("MMoE", gate_bias=True), samples(8)
    module.gate.weight.zero_()
    module.gate.bias.fill_(-torch.inf)
    for t, e in enumerate((2, 0, 3)):
        module.gate.bias[t, e] = 0
    for y, e in zip(module(x), (2, 0, 3), strict=True):
        assert_same(y, one_expert(module.shared_experts, e, x))


@each_layer
def test_not_a_number_stays_in_its_sample(name: str) -> None:
    module, x = layer(name), samples(9)
    bad = torch.arange(9) == 4
    for found, y in zip(module(torch.where(bad[:, None], torch.nan, x)), module(x), strict=True):
        assert torch.equal(found[~bad], y[~bad]) and found[bad].isnan().all()


# ------------------------------------------------------------------------------------------------- experts of any kind


@pytest.mark.parametrize("kind", ["MMoE", "CGC", "PLE"])
def test_modules_as_experts(kind: str) -> None:
    """The same numbers as stacked ones, from a list of networks with the same parameters."""
    stacked = layer(kind)

    def network(bank: Experts, e: int) -> nn.Module:
        made = nn.Sequential(nn.Linear(bank.in_features, H), nn.ReLU(), nn.Linear(H, P)).double()
        for layer, w, b in ((made[0], bank.w_in, bank.b_in), (made[2], bank.w_out, bank.b_out)):
            layer.weight.data.copy_(w[e])
            layer.bias.data.copy_(b[e])
        return made

    def own(level: Any) -> list[list[nn.Module]]:
        n = level.own_count
        return [[network(level.task_experts, t * n + k) for k in range(n)] for t in range(T)]

    def shared(level: Any) -> list[nn.Module]:
        return [network(level.shared_experts, k) for k in range(level.shared_count)]

    made: Any
    if kind == "MMoE":
        made = MMoE(D, nn.ModuleList(shared(stacked)), T, dtype=F64)
    elif kind == "CGC":
        made = CGC(D, own(stacked), shared(stacked), T, dtype=F64)
    else:
        levels = list(stacked.levels)
        made = PLE([D, P], [own(level) for level in levels], [shared(level) for level in levels], T, dtype=F64)
    gates = {k: v for k, v in stacked.state_dict().items() if "gate" in k}
    assert set(made.load_state_dict(gates, strict=False).missing_keys) == {
        k for k in made.state_dict() if "experts" in k
    }
    x = samples(3, 4)
    for got, expected in zip(made(x), stacked(x), strict=True):
        assert_same(got.detach(), expected.detach())


def test_convolutions_as_experts() -> None:
    """Images to maps, with gates on features of their own; [B, C, H, W] or [B, N, ...]."""
    experts = [nn.Conv2d(2, 3, 3, dtype=F64) for _ in range(4)]
    module, x, seen = MMoE(D, experts, T, dtype=F64), torch.randn(5, 2, 6, 6, dtype=F64), samples(5)
    g = module.gate(seen)
    for t, y in enumerate(module(x, seen)):
        assert_same(y.detach(), sum(g[:, t, e].reshape(5, 1, 1, 1) * c(x) for e, c in enumerate(experts)).detach())


def test_outputs_by_name() -> None:
    seeds.manual_seed(0)
    named, x = MMoE(D, 4, ["age", "size", "price"], dtype=F64, **SIZES), samples(3)
    plain = layer("MMoE")
    plain.load_state_dict(named.state_dict())
    made = named(x)
    assert list(made) == ["age", "size", "price"]
    assert all(torch.equal(a, b) for a, b in zip(made.values(), plain(x), strict=True))


# -------------------------------------------------------------------------------------------- dtypes, bits, parameters


def stacked(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"y": torch.stack(by_loop(module, x)).detach()}


@each_layer
def test_half_precision(name: str) -> None:
    for seed in range(2):
        module, x = layer(name, seed=seed, dtype=BF16), samples(40, seed=seed, dtype=BF16)
        made = module(x)
        assert all(y.dtype == BF16 for y in made) and all(p.dtype == BF16 for p in module.parameters())
        found, given = {"y": torch.stack(made).detach()}, (copy.deepcopy(module).double(), x.double())
        assert_within_budget(found, partial(stacked, *given), BF16, stored=BF16)


@each_layer
def test_single_precision(name: str) -> None:
    module, x = layer(name, dtype=F32), samples(50, dtype=F32)
    exact = copy.deepcopy(module).double()
    found = outcome(module, module, x)
    assert_within_budget(found, lambda: outcome(lambda x: by_loop(exact, x), exact, x.double()), F32)


@each_layer
def test_autocast(name: str) -> None:
    """Experts in bfloat16, gates in float32, gradients in the parameters' dtype."""
    module, x = layer(name, dtype=F32), samples(30, dtype=F32)
    with torch.autocast("cpu", dtype=BF16):
        made = module(x)
        first = (module.levels[0] if isinstance(module, PLE) else module).gate
        g = first(x)
    assert all(y.dtype == BF16 for y in made) and g.dtype == F32 and torch.equal(g, first(x))
    sum(y.float().sum() for y in made).backward()
    assert all(p.grad is not None and p.grad.dtype == F32 for p in module.parameters())


@each_layer
def test_the_same_bits_again(name: str) -> None:
    module, x = layer(name, dtype=F32), samples(50, dtype=F32)
    first, again = outcome(module, module, x), outcome(module, module, x)
    assert all(torch.equal(t, again[key]) for key, t in first.items())


@pytest.mark.parametrize("name", ["MMoE", *(pytest.param(n, marks=pytest.mark.long) for n in ("CGC, one own", "PLE"))])
def test_compile(name: str) -> None:
    module = layer(name)
    calls = [(samples(2, size, seed=size).requires_grad_(),) for size in (8, 9, 13)]
    check_compiled(lambda x: tuple(module(x)), calls, parameters=list(module.parameters()))


@pytest.mark.parametrize("name", ["MMoE", "PLE"])
@pytest.mark.long_after(1)
def test_export(name: str) -> None:
    module = layer(name, dtype=F32).eval()
    example, *others = [samples(N, dtype=F32, seed=N) for N in (9, 2, 33)]
    check_exported(module, example, others, {0: torch.export.Dim("samples", min=2, max=4096)})


def test_checkpointing() -> None:
    module, x = layer("PLE"), samples(20)
    expected = outcome(module, module, x)
    compare(outcome(lambda x: checkpoint(module, x, use_reentrant=False), module, x), expected)


def test_state_copies_and_devices() -> None:
    module = layer("PLE", gate_bias=True)
    shapes = {name: list(t.shape) for name, t in module.state_dict().items()}
    assert shapes == {
        "levels.0.task_experts.w_in": [6, H, D], "levels.0.task_experts.b_in": [6, H],
        "levels.0.task_experts.w_out": [6, P, H], "levels.0.task_experts.b_out": [6, P],
        "levels.0.shared_experts.w_in": [3, H, D], "levels.0.shared_experts.b_in": [3, H],
        "levels.0.shared_experts.w_out": [3, P, H], "levels.0.shared_experts.b_out": [3, P],
        "levels.0.gate.weight": [T, 5, D], "levels.0.gate.bias": [T, 5],
        "levels.0.shared_gate.weight": [1, 9, D], "levels.0.shared_gate.bias": [1, 9],
        "levels.1.task_experts.w_in": [6, H, P], "levels.1.task_experts.b_in": [6, H],
        "levels.1.task_experts.w_out": [6, P, H], "levels.1.task_experts.b_out": [6, P],
        "levels.1.shared_experts.w_in": [3, H, P], "levels.1.shared_experts.b_in": [3, H],
        "levels.1.shared_experts.w_out": [3, P, H], "levels.1.shared_experts.b_out": [3, P],
        "levels.1.gate.weight": [T, 5, P], "levels.1.gate.bias": [T, 5],
    }  # fmt: skip
    other = layer("PLE", seed=1, gate_bias=True)
    other.load_state_dict(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other(samples(4)), module(samples(4)), strict=True))
    on_meta = PLE(D, 2, 3, T, device="meta", **SIZES)
    assert all(p.is_meta and p.dtype == F32 for p in on_meta.parameters())
    assert all(y.is_meta and y.shape == (4, P) for y in on_meta(samples(4, dtype=F32).to("meta")))
    empty = on_meta.to_empty(device="cpu")
    empty.reset_parameters()
    assert all(p.isfinite().all() for p in empty.parameters())


def test_initial_values_are_those_of_linear_layers() -> None:
    seeds.manual_seed(0)
    bank = Experts(400, 100, 50, 20)
    for w, b, fan in ((bank.w_in, bank.b_in, 400), (bank.w_out, bank.b_out, 100)):
        for p in (w, b):
            bound = fan**-0.5
            assert bound * 0.98 < p.abs().max() <= bound
            assert abs(float(p.detach().std()) / (bound / 3**0.5) - 1) < 0.05


def test_every_parameter_has_a_gradient() -> None:
    module = layer("PLE", gate_bias=True)
    sum(y.sum() for y in module(samples(1, 2))).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


# --------------------------------------------------------------------------------------------------------- bad input

LIN = [nn.Linear(D, P) for _ in range(3)]
CONSTRUCTION: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: MMoE(0, 4, T, **SIZES), ValueError, "in_features: expected at least 1, got 0"),
    (lambda: MMoE(D, 0, T, **SIZES), ValueError, "experts: expected at least 1, got 0"),
    (lambda: MMoE(D, 2.5, T, **SIZES), TypeError, "experts: expected an int, got 2.5"),  # type: ignore[arg-type]
    (lambda: MMoE(D, 4, 0, **SIZES), ValueError, "tasks: expected at least 1, got 0"),
    (lambda: MMoE(D, 4, "age", **SIZES), TypeError, "tasks: expected a number or a list of names, got the str 'age'"),
    (lambda: MMoE(D, 4, ["a", "a"], **SIZES), ValueError, "tasks: expected different names, got 'a' twice"),
    (lambda: MMoE(D, 4, [], **SIZES), TypeError, r"tasks: expected a number or a list of one or more names, got \[\]"),
    (lambda: MMoE(D, 4, T), ValueError, "out_features: expected a number, as experts are given by"),
    (lambda: MMoE(D, 4, T, out_features=P, activation="swish"), ValueError, "activation: expected one of .*'swish'"),
    (lambda: MMoE(D, 4, T, out_features=P, dtype=torch.int32), TypeError, "dtype: expected a floating-point dtype"),
    (lambda: MMoE(D, 4, T, out_features=P, hiden=3), TypeError, "unexpected keyword argument 'hiden'"),
    (lambda: MMoE(D, LIN, T, out_features=P), ValueError, "hidden_features, out_features: expected None, as"),
    (lambda: MMoE(D, [3], T), TypeError, "experts: expected modules, got int"),  # type: ignore[list-item]
    (lambda: CGC(D, 0, 0, T, **SIZES), ValueError, "task_experts, shared_experts: expected at least one expert in all"),
    (lambda: CGC(D, -1, 2, T, **SIZES), ValueError, "task_experts: expected 0 or more, got -1"),
    (lambda: CGC(D, [LIN, LIN], LIN, T), ValueError, "task_experts: expected a list of modules per task, 3"),
    (lambda: CGC(D, [LIN, LIN, LIN[:2]], LIN, T), ValueError, r"expected as many for every task, got \[3, 3, 2\]"),
    (lambda: PLE(D, 1, 1, T, levels=0, **SIZES), ValueError, "levels: expected at least 1, got 0"),
    (lambda: PLE(D, [[LIN] * T], [LIN], T), ValueError, "in_features, task_experts, shared_experts: expected one"),
    (lambda: PLE([D, P], [[LIN] * T], [LIN], T), ValueError, r"expected as many as there are levels, got \[2, 1, 1\]"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, message", CONSTRUCTION, ids=[c[2][:50] for c in CONSTRUCTION])
def test_construction(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", ["MMoE", "CGC", "PLE"])
def test_bad_input(name: str) -> None:
    module, x = layer(name, dtype=F32), samples(3, 4, dtype=F32)
    for error, message, args in (
        (TypeError, r"x: expected a tensor \[..., in_features\], got list", ([1.0],)),
        (TypeError, "x: expected a floating-point tensor, got torch.int64", (x.long(),)),
        (ValueError, r"x: expected \[..., 7\], got \[3, 4, 6\]", (x[..., :6],)),
        (ValueError, r"x: expected \[..., 7\], got \[\]", (x[0, 0, 0],)),
        (TypeError, "x: expected the experts' dtype torch.float32, got torch.float64", (x.double(),)),
        (ValueError, r"gate_input: expected \[..., 7\], got \[3, 4, 2\]", (x, x[..., :2])),
        (ValueError, r"gate_input: expected the axes of x, \[3, 4\] and one more, got \[3\]", (x, x[:, 0])),
        (ValueError, "gate_input: expected a tensor on cpu like x, got one on meta", (x, x.to("meta"))),
    ):
        with pytest.raises(error, match=message):
            module(*args)


def test_bad_experts() -> None:
    x = samples(4, dtype=F32)
    with pytest.raises(
        ValueError, match=r"experts\[1\]: expected an output \[4, 5\] like experts\[0\]'s, got \[4, 2\]"
    ):
        MMoE(D, [nn.Linear(D, P), nn.Linear(D, 2)], T)(x)
    with pytest.raises(ValueError, match=r"experts\[0\]: expected an output of \[4\] and more axes.*got \[28\]"):
        MMoE(D, [nn.Flatten(0)], T)(x)
    with pytest.raises(
        ValueError, match=r"shared_experts: expected outputs of the task experts' shape \[5\], got \[2\]"
    ):
        CGC(D, [[nn.Linear(D, P)]] * T, [nn.Linear(D, 2)], T)(x)
