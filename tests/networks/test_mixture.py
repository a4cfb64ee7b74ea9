"""Selection with several modules a sample: as a plain loop over samples and entries has it.

Axes: B samples, k modules that each takes, K modules.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fastroute import use_backend
from fastroute.networks import Initialization, Selection, Sequential, TopKGating
from tests.helpers import seeds, strategies
from tests.helpers.backends import each_backend
from tests.helpers.networks import F, gradients, linears, start
from tests.helpers.opcheck import assert_same, check_compiled, check_exported
from tests.networks.test_selection import STACKS, K, made

pytestmark = pytest.mark.usefixtures("poisoned")

F64 = torch.float64
#: [12, 3], nobody takes module 1; sample 2 has none, sample 3 one twice.
ACTIONS = torch.tensor([
    [2, 0, 3], [0, -1, 2], [-1, -4, -1], [3, 3, 0], [2, 2, 2], [-1, 0, -1],
    [3, 0, 2], [0, 2, 3], [-2, 3, 3], [2, -1, 0], [0, 0, 3], [3, 2, 0],
])  # fmt: skip
B, k = ACTIONS.shape


def weights_of(actions: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(actions.shape, generator=seeds.generator(seed), dtype=F64)


def by_loop(modules: Any, x: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
    like = modules[0](x[:1])[0]
    rows = []
    for b in range(len(x)):
        y = torch.zeros_like(like)
        for j, a in enumerate(actions[b].tolist()):
            if a >= 0:
                y = y + weights[b, j].to(y.dtype) * modules[a](x[b : b + 1])[0]
        rows.append(y)
    return torch.stack(rows)


@each_backend
@pytest.mark.parametrize("name", STACKS)
def test_the_same_as_a_loop(name: str, backend: str) -> None:
    selection, x = made(name)
    both: list[dict[str, Tensor | None]] = []
    for apart in (False, True):
        selection.zero_grad()
        leaf, w = x.clone().requires_grad_(), weights_of(ACTIONS).requires_grad_()
        with use_backend(backend):
            if apart:
                y = by_loop(selection._submodules, leaf, ACTIONS, w)
            else:
                y, meta, actions = selection(leaf, start(x), ACTIONS, weights=w)
                assert actions is ACTIONS and len(meta) == B and not y[2].any()
            y.backward(torch.randn(y.shape, dtype=F64, generator=seeds.generator(1)))
        assert leaf.grad is not None and w.grad is not None
        assert apart or (not leaf.grad[2].any() and not w.grad[ACTIONS < 0].any())
        both.append({"y": y.detach(), "x": leaf.grad, "weights": w.grad, **gradients(selection)})
    for key, expected in both[1].items():
        got = both[0][key]
        if expected is None or got is None:  # of module 1, in the loop perhaps zeros for its look at the shape
            assert got is None and "_submodules.1." in key, key
        else:
            assert_same(got, expected, key)


@each_backend
@hypothesis.given(data=st.data())
def test_any_histogram(backend: str, data: st.DataObject) -> None:
    modules, k, size = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 30))
    names = data.draw(st.lists(st.integers(-1, modules - 1), min_size=1, max_size=4))
    seed = data.draw(strategies.seeds)
    seeds.manual_seed(seed)
    actions = torch.tensor(names)[torch.randint(len(names), (size, k))]
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32, torch.int8]))
    selection = linears(modules, unused_grad="zeros").double()
    x, w = torch.randn(size, F, dtype=F64, requires_grad=True), torch.randn(size, k, dtype=F64, requires_grad=True)
    weights = [x, w, *selection.parameters()]
    with use_backend(backend):
        y, _, _ = selection(x, start(x), actions.to(dtype), weights=w)
    expected = by_loop(selection._submodules, x, actions, w) if size else y
    assert_same(y.detach(), expected.detach())
    cotangent = torch.randn(y.shape, dtype=F64)
    found = torch.autograd.grad(y, weights, cotangent, allow_unused=True, retain_graph=True)
    grads = (
        torch.autograd.grad(expected, weights, cotangent, allow_unused=True, retain_graph=True)
        if (expected.requires_grad)
        else [None] * len(weights)
    )
    for got, wanted in zip(found, grads, strict=True):
        if wanted is None:
            assert got is None or not got.any()
        else:
            assert got is not None
            assert_same(got, wanted)


@each_backend
@pytest.mark.parametrize("name", ["linear", "deep", "conv", "different-depths", "norm-alone", "identity"])
@pytest.mark.parametrize("actions", [[[-1, -1]] * 3, [[3, 3]] * 3, [], [[2, 0]]], ids=str)
def test_extreme_batches(name: str, actions: list[list[int]], backend: str) -> None:
    selection, x = made(name)
    given = torch.tensor(actions, dtype=torch.int64).reshape(-1, 2)
    x, w = x[: len(given)].requires_grad_(), weights_of(given)
    with use_backend(backend):
        y, _, _ = selection(x, start(x), given, weights=w)
    like = selection._submodules[0](made(name)[1][:1])
    assert y.shape == (len(given), *like.shape[1:])
    if len(given):
        assert_same(y.detach(), by_loop(selection._submodules, x, given, w).detach())


@each_backend
@pytest.mark.parametrize("name", ["linear", "deep", "conv", "own-class", "tokens"])
def test_one_entry_is_plain_selection(name: str, backend: str) -> None:
    """To the bit, with weights of one; and [B] with weights is [B, 1] with them."""
    selection, x = made(name)
    actions = ACTIONS[:, 0]
    with use_backend(backend):
        plain, _, _ = selection(x, start(x), actions)
        ones = torch.ones(B, 1)
        for given, weights in ((actions[:, None], ones), (actions, ones[:, 0]), (actions[:, None], None)):
            assert torch.equal(selection(x, start(x), given, weights=weights)[0], plain)
        y, _, _ = selection(x, start(x), actions[:, None], weights=weights_of(actions[:, None]))
        w = weights_of(actions[:, None]).reshape(-1, *[1] * (plain.dim() - 1))
        assert_same(y.detach(), (w * plain).detach())


def test_without_weights_it_is_a_sum() -> None:
    selection, x = made("linear")
    expected = selection(x, start(x), ACTIONS, weights=torch.ones(B, k))[0]
    assert torch.equal(selection(x, start(x), ACTIONS)[0], expected)


# --------------------------------------------------------------------------------------------------------------- laws


@each_backend
@pytest.mark.parametrize("name", ["linear", "deep", "different-depths"])
def test_laws(name: str, backend: str) -> None:
    selection, x = made(name)
    w, order = weights_of(ACTIONS), torch.randperm(B, generator=seeds.generator(2))
    with use_backend(backend):

        def run(x: Tensor, actions: Tensor, w: Tensor, mask: Tensor | None = None) -> Tensor:
            y: Tensor = selection(x, start(x), actions, mask, weights=w)[0].detach()
            return y

        whole = run(x, ACTIONS, w)
        assert_same(run(x[order], ACTIONS[order], w[order]), whole[order], "permuted samples")
        entries = torch.tensor([2, 0, 1])
        assert_same(run(x, ACTIONS[:, entries], w[:, entries]), whole, "permuted entries")
        parts = [run(x[rows], ACTIONS[rows], w[rows]) for rows in (slice(0, 5), slice(5, None))]
        assert_same(torch.cat(parts), whole, "joined batches")
        mask = torch.arange(B) % 3 > 0
        masked = run(x, ACTIONS, w, mask)
        assert not masked[~mask].any()
        assert_same(masked[mask], run(x[mask], ACTIONS[mask], w[mask]), "masked is removed")
        twice = torch.cat([ACTIONS[:, :1], ACTIONS[:, :1]], 1)
        halves = torch.cat([0.25 * w[:, :1], 0.75 * w[:, :1]], 1)
        assert_same(run(x, twice, halves), run(x, ACTIONS[:, :1], w[:, :1]), "the same module twice")
        labels = torch.randperm(K, generator=seeds.generator(3))
        moved = Selection(*[selection._submodules[int(i)] for i in labels])
        renamed = torch.where(ACTIONS >= 0, labels.argsort()[ACTIONS.clamp(min=0)], ACTIONS)
        assert_same(moved(x, start(x), renamed, weights=w)[0].detach(), whole, "relabelled modules")


@each_backend
@pytest.mark.parametrize("name", ["linear", "deep", "different-depths", "conv"])
def test_not_a_number(name: str, backend: str) -> None:
    """A sample's stays in it, and what is dropped may be anything."""
    selection, x = made(name)
    w = weights_of(ACTIONS)
    with use_backend(backend):

        def run(x: Tensor, w: Tensor, mask: Tensor | None = None) -> dict[str, Tensor | None]:
            selection.zero_grad()
            x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = selection(x, start(x), ACTIONS, mask, weights=w)[0]
            y.sum().backward()
            return {"y": y.detach(), "x": x.grad, "w": w.grad, **gradients(selection)}

        expected = run(x, w)
        for key, t in run(x, torch.where(ACTIONS < 0, torch.nan, w)).items():
            assert t is None or torch.equal(t, expected[key]), key  # type: ignore[arg-type]
        bad = torch.arange(B) == 3
        for found in (run(torch.where(bad.reshape(-1, *[1] * (x.dim() - 1)), torch.nan, x), w),
                      run(x, torch.where(bad[:, None], torch.nan, w))):  # fmt: skip
            for key in ("y", "x", "w"):
                assert torch.equal(found[key][~bad], expected[key][~bad]), key  # type: ignore[index]
        without = run(x, w, ~bad)
        poisoned = torch.where(bad.reshape(-1, *[1] * (x.dim() - 1)), torch.nan, x)
        if name in ("linear", "deep"):  # a slice is not made of a masked sample either, but a norm's mean is its own
            for key, t in run(poisoned, w, ~bad).items():
                assert t is None or torch.equal(t, without[key]), key  # type: ignore[arg-type]


def test_what_takes_nothing_passes_on_request() -> None:
    selection = linears(K, dropped="identity").double()
    x, w = torch.randn(B, F, dtype=F64, requires_grad=True), weights_of(ACTIONS)
    mask = torch.arange(B) != 7
    y, _, _ = selection(x, start(x), ACTIONS, mask, weights=w)
    out = (ACTIONS < 0).all(1) | ~mask
    assert out.sum() == 2 and torch.equal(y[out], x[out])
    assert_same(y[~out].detach(), by_loop(selection._submodules, x, ACTIONS, w)[~out].detach())
    selection, x = made("linear", dropped="identity")
    with pytest.raises(ValueError, match=r"dropped='identity': .*\[12, 6\].*\[12, 5\]"):
        selection(x, start(x), ACTIONS, weights=w)


def test_dropout_is_drawn_per_entry() -> None:
    seeds.manual_seed(0)
    selection = Selection(*[nn.Sequential(nn.Identity(), nn.Dropout(0.5)) for _ in range(3)])
    x, actions = torch.ones(2000, 4), torch.tensor([[0, 2]]).expand(2000, 2)
    y = selection(x, start(x), actions)[0]
    shares = torch.stack([(y == v).double().mean() for v in (0, 2, 4)])
    assert (shares - torch.tensor([0.25, 0.5, 0.25], dtype=F64)).abs().max() < 5 * 0.5 / 8000**0.5


def test_dtypes_follow_the_modules() -> None:
    for name in ("linear", "deep", "different-depths"):
        selection, x = made(name)
        w = weights_of(ACTIONS).float().requires_grad_()
        for dtype in (torch.float32, torch.bfloat16):
            y, _, _ = selection.to(dtype)(x.to(dtype), start(x), ACTIONS, weights=w)
            assert y.dtype == dtype
            y.float().sum().backward()
            assert w.grad is not None and w.grad.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _, _ = selection.float()(x.float(), start(x), ACTIONS, weights=w)
        assert y.dtype == by_autocast(selection, x).dtype


def by_autocast(selection: Selection, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y: Tensor = selection._submodules[0](x.float())
    return y


@each_backend
def test_the_input_is_not_copied(backend: str) -> None:
    """Like modules read it through the plan: kept for backward are x once and the entries' outputs."""
    selection, x = linears(K, outputs=3), torch.randn(B, F, requires_grad=True)
    own, saved = {p.data_ptr() for p in selection.parameters()}, {}

    def pack(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.data_ptr() not in own:
            saved[t.data_ptr()] = t.numel()
        return t

    w = torch.rand(B, k)
    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selection(x, start(x), ACTIONS, weights=w)
    assert sorted(saved.values()) == sorted([x.numel(), w.numel(), B * k * 3])


def test_logging_and_pointers() -> None:
    selection = linears(K, store_module_pointers=True)
    x = torch.randn(B, F)
    selection.start_logging_selections()
    selection(x, start(x), ACTIONS, torch.arange(B) < 2)
    assert selection.stop_logging_and_get_selections() == [0, 2, 3]


def test_a_single_module() -> None:
    """With several entries even one module is chosen or not."""
    only = nn.Linear(F, 3).double()
    x, actions = torch.randn(3, F, dtype=F64), torch.tensor([[0, 0], [-1, 0], [-1, -1]])
    y, _, _ = Selection(only)(x, start(x), actions)
    assert_same(y.detach(), (only(x) * torch.tensor([[2.0], [1.0], [0.0]])).detach())


@pytest.mark.parametrize("name", ["linear", pytest.param("deep", marks=pytest.mark.long)])
def test_compile(name: str) -> None:
    selection, _ = made(name, unused_grad="zeros")
    generator = seeds.generator(0)

    def call(x: Tensor, actions: Tensor, w: Tensor) -> Tensor:
        y: Tensor = selection(*Initialization()(x)[:2], actions, weights=w)[0]
        return y

    calls = [
        (torch.randn(size, F, dtype=F64, generator=generator).requires_grad_(),
         torch.randint(-1, K, (size, k), generator=generator),
         torch.randn(size, k, dtype=F64, generator=generator).requires_grad_())
        for size in (8, 5, 13)
    ]  # fmt: skip
    check_compiled(call, calls, parameters=list(selection.parameters()), backend="eager")


# ------------------------------------------------------------------------------------------------------ with a gating


class Gated(nn.Module):
    """A gating and a mixture by it; samples whose first feature is negative take no part."""

    def __init__(self) -> None:
        super().__init__()
        seeds.manual_seed(0)
        self.gate, self.select = TopKGating(K, F, 2, capacity=1.5), linears(K)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, meta, actions = self.gate(*Initialization()(x)[:2], mask=x[:, 0] > 0)
        y, meta, _ = self.select(y, meta, actions)
        return y, meta.aux_loss


@each_backend
def test_export(backend: str) -> None:
    generator = seeds.generator(0)
    example, *others = [torch.randn(size, F, generator=generator) for size in (7, 2, 33)]

    class Rounded(Gated):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, loss = super().forward(x.double())
            return y.float(), loss.float()  # sums in another order agree once rounded

    with use_backend(backend):
        check_exported(Rounded().double(), example, others, {0: torch.export.Dim("batch", min=2, max=4096)})


def test_weights_come_from_the_gating() -> None:
    seeds.manual_seed(0)
    gating, selection = TopKGating(K, F, 2), linears(K, outputs=5)
    x = torch.randn(7, F)
    _, meta, actions = gating(x, start(x))
    y, _, _ = selection(x, meta, actions)
    assert torch.equal(y, selection(x, start(x), actions, weights=meta.mixtures[0].weights)[0])
    assert torch.equal(Sequential(gating, selection)(x)[0], y)
    y.square().sum().backward()
    assert gating.router.weight.grad is not None and gating.router.weight.grad.any()
    with pytest.raises(ValueError, match="weights: expected those of these actions"):
        selection(x, meta, actions.clone())
    with pytest.raises(ValueError, match="weights: expected those of these actions"):  # a joined batch's own
        selection(x, meta[:3] + start(x[3:]), actions)
    selection(x, meta, actions.clone(), weights=torch.ones(7, 2))
    plain = actions[:, 0]
    assert torch.equal(selection(x, meta, plain)[0], selection(x, start(x), plain)[0])
    assert torch.equal(selection(x, meta, plain[:, None])[0], selection(x, start(x), plain)[0])
    _, meta, actions = TopKGating(K, F, 1)(x, start(x))
    with pytest.raises(ValueError, match="weights: expected those of these actions"):
        selection(x, meta, actions.clone())


def test_several_gatings_of_one_batch() -> None:
    """Views of it and layers of it are told apart by their actions."""
    seeds.manual_seed(0)
    gatings, selection = [TopKGating(K, F, 2) for _ in range(2)], linears(K)
    x = torch.randn(7, F)
    meta = start(x)
    rows = slice(0, 3), slice(3, 7)
    actions = [gate(x[r], meta[r])[2] for gate, r in zip(gatings, rows, strict=True)]
    for gate, r, a in zip(gatings, rows, actions, strict=True):
        y, _, _ = selection(x[r], meta[r], a)
        assert torch.equal(y, selection(x[r], start(x[r]), a, weights=gate.route(x[r]).weights)[0])
    assert len(meta.mixtures) == 2 and meta.mixtures[0].actions[3:].eq(-1).all()


def test_bad_input() -> None:
    selection, x = linears(3), torch.randn(4, F)
    meta, a, w = start(x), torch.tensor([[0, 2], [1, 1], [-1, 0], [2, 2]]), torch.rand(4, 2)
    wrong: list[tuple[type[Exception], str, Any, Any]] = [
        (ValueError, r"weights: expected one per action, \[4, 2\], got \[4, 1\]", a, w[:, :1]),
        (ValueError, r"weights: expected one per action, \[4, 2\], got \[4\]", a, w[:, 0]),
        (TypeError, "weights: expected a floating-point tensor of actions' shape, got list", a, [1.0]),
        (TypeError, "weights: expected a floating-point tensor, got torch.int64", a, w.long()),
        (TypeError, r"actions: expected an integer tensor \[B, k\], got torch.float32", a.float(), w),
        (TypeError, r"actions: expected an integer tensor \[B, k\], got torch.bool", a > 0, w),
        (ValueError, r"actions: expected k per sample, shape \[4, k\], k at least 1, got \[3, 2\]", a[1:], w[1:]),
        (ValueError, r"actions: expected k per sample, .*got \[4, 0\]", a[:, :0], None),
        (ValueError, r"actions: expected k per sample, .*got \[4, 2, 1\]", a[:, :, None], w[:, :, None]),
        (IndexError, "actions: expected indices below 3, got 3 of 8 out of range", a + (a == 2), w),
        (ValueError, "actions: expected one per sample to choose among 3 modules by, got None", None, w),
    ]
    for error, message, actions, weights in wrong:
        with pytest.raises(error, match=message):
            selection(x, meta, actions, weights=weights)
    with pytest.raises(ValueError, match="mask: expected one per sample"):
        selection(x, meta, a, torch.ones(3, dtype=torch.bool), weights=w)
