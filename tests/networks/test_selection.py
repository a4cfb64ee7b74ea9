"""Selection: like modules run together and unlike ones slice by slice, both exactly as one by one in a plain loop.

Axes: B samples, K modules.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import use_backend
from fastroute.networks import MLP, Selection, Trajectory, grouped_modules
from fastroute.ops.backends import extension
from fastroute.ops.grouped_linear.op import MOST_PLANNED
from tests.helpers import seeds
from tests.helpers.backends import each_backend
from tests.helpers.networks import F, gradients, linears, start
from tests.helpers.opcheck import assert_same

F64 = torch.float64
ACTIONS = torch.tensor([2, 0, -1, 2, 2, 0, 3, -5, 0, 2, 3, 0])  # nobody takes module 1
B, K = len(ACTIONS), 4


def one_by_one(modules: Any, x: Tensor, actions: Tensor) -> Tensor:
    """Sample by sample, zeros for those that match nothing."""
    made = [modules[int(a)](x[b : b + 1])[0] if a >= 0 else None for b, a in enumerate(actions)]
    like = next(y for y in made if y is not None)
    return torch.stack([torch.zeros_like(like) if y is None else y for y in made])


def conv(k: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))


#: How to make module k, and the shape of a sample. Grouped, all of them.
ALIKE: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda k: nn.Linear(F, 5), (F,)),
    "no-bias": (lambda k: nn.Linear(F, 5, bias=False), (F,)),
    "linear-relu": (lambda k: nn.Sequential(nn.Linear(F, 5), nn.ReLU()), (F,)),
    "relu-first": (lambda k: nn.Sequential(nn.ReLU(), nn.Linear(F, 5)), (F,)),
    "mlp": (lambda k: MLP(F, 3, (7, 5)), (F,)),
    "deep": (
        lambda k: nn.Sequential(
            nn.Linear(F, 8), nn.LayerNorm(8), nn.GELU(), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)), nn.RMSNorm(8)
        ),
        (F,),
    ),
    "norm-without-parameters": (
        lambda k: nn.Sequential(nn.LayerNorm(F, elementwise_affine=False), nn.Linear(F, 2)), (F,)),
    "norm-alone": (lambda k: nn.LayerNorm(F), (F,)),
    "tokens": (lambda k: nn.Sequential(nn.Linear(F, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)), (5, F)),
    "tokens-in-two-axes": (lambda k: nn.Linear(F, 3), (2, 5, F)),
    "norm-over-two-axes": (lambda k: nn.Sequential(nn.LayerNorm((5, F)), nn.Flatten(), nn.Linear(5 * F, 3)), (5, F)),
    "conv": (conv, (3, 9, 8)),
    "conv-linear": (
        lambda k: nn.Sequential(nn.Conv2d(3, 2, (3, 2), dilation=(2, 1)), nn.SiLU(), nn.Flatten(), nn.Linear(70, 4)),
        (3, 9, 8),
    ),
    "conv-first-no-bias": (lambda k: nn.Conv2d(3, 2, 1, bias=False), (3, 4, 4)),
    "free": (lambda k: nn.Tanh(), (F,)),
    "identity": (lambda k: nn.Identity(), (3, 2)),
}  # fmt: skip


class Own(nn.Linear):
    """A user's class, whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


#: Not grouped, for one reason or another.
UNLIKE: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "different-classes": (lambda k: nn.Linear(F, F) if k % 2 else nn.Tanh(), (F,)),
    "different-depths": (lambda k: MLP(F, F, (4,) * k), (F,)),
    "different-widths-inside": (lambda k: nn.Sequential(nn.Linear(F, 3 + k), nn.ReLU(), nn.Linear(3 + k, 2)), (F,)),
    "different-activations": (lambda k: nn.Sequential(nn.Linear(F, 3), nn.ReLU() if k else nn.Tanh()), (F,)),
    "different-options": (lambda k: nn.Sequential(nn.Linear(F, 3), nn.LeakyReLU(0.1 * k)), (F,)),
    "some-biases": (lambda k: nn.Linear(F, 3, bias=k % 2 == 0), (F,)),
    "own-class": (lambda k: Own(F, 3), (F,)),
    "grouped-conv": (lambda k: nn.Conv2d(4, 4, 3, groups=2), (4, 5, 5)),
    "circular-conv": (lambda k: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "same-conv": (lambda k: nn.Conv2d(2, 4, 3, padding="same"), (2, 5, 5)),
    "conv1d": (lambda k: nn.Conv1d(2, 4, 3), (2, 7)),
    "parametrized": (lambda k: nn.utils.parametrizations.weight_norm(nn.Linear(F, 3)), (F,)),
    "batchnorm-in-eval": (lambda k: nn.Sequential(nn.Linear(F, 3), nn.BatchNorm1d(3)).eval(), (F,)),
}  # fmt: skip
STACKS = {**ALIKE, **UNLIKE}


def made(name: str, seed: int = 0, **options: Any) -> tuple[Selection, Tensor]:
    seeds.manual_seed(seed)
    make, shape = STACKS[name]
    selection = Selection(*[make(k) for k in range(K)], **options).double()
    with torch.no_grad():  # norms start with ones and zeros, which would hide a mix-up
        for p in selection.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return selection, torch.randn(B, *shape, dtype=F64)


@each_backend
@pytest.mark.parametrize("name", STACKS)
def test_the_same_as_one_by_one(name: str, backend: str) -> None:
    selection, x = made(name)
    both: list[dict[str, Tensor | None]] = []
    for apart in (False, True):
        selection.zero_grad()
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            y = one_by_one(selection._submodules, leaf, ACTIONS) if apart else selection(leaf, start(x), ACTIONS)[0]
            y.backward(torch.randn(y.shape, dtype=F64, generator=seeds.generator(1)))
        assert leaf.grad is not None and (apart or not y[ACTIONS < 0].any()) and not leaf.grad[ACTIONS < 0].any()
        both.append({"y": y.detach(), "x": leaf.grad, **gradients(selection)})
    for key, expected in both[1].items():
        got = both[0][key]
        assert (got is None) == (expected is None), f"{key}: a gradient in one way only"
        if got is not None and expected is not None:
            assert_same(got, expected, key)


@pytest.mark.parametrize("name", STACKS)
def test_which_are_grouped(name: str) -> None:
    selection, _ = made(name)
    assert (grouped_modules.are_alike(list(selection._submodules))) == (name in ALIKE)


@each_backend
@pytest.mark.parametrize("name", ["linear", "deep", "conv", "tokens", "different-depths", "norm-alone", "identity"])
@pytest.mark.parametrize("actions", [[-1] * 5, [3] * 5, [], [2], [-1]], ids=str)
def test_extreme_batches(name: str, actions: list[int], backend: str) -> None:
    selection, x = made(name)
    x, given = x[: len(actions)].requires_grad_(), torch.tensor(actions, dtype=torch.int64)
    with use_backend(backend):
        y, _, _ = selection(x, start(x), given)
        expected = selection._submodules[0](x.detach()[:1] if len(x) else torch.zeros(1, *x.shape[1:], dtype=F64))
        assert y.shape == (len(actions), *expected.shape[1:]) and y.dtype == F64
        if -1 in actions or not actions:
            assert not y.any()
        else:
            assert_same(y.detach(), one_by_one(selection._submodules, x, given).detach())
        if y.requires_grad:
            y.sum().backward()
            for key, p in selection.named_parameters():
                assert (p.grad is not None) == (int(key.split(".")[1]) in actions), key


@pytest.mark.parametrize("name", ["linear", "conv", "own-class"])
@pytest.mark.parametrize("backward", [True, False], ids=["", "no-grad"])
def test_unused_grad(name: str, backward: bool) -> None:
    selection, x = made(name, unused_grad="zeros")
    with torch.set_grad_enabled(backward):
        y, _, _ = selection(x, start(x), ACTIONS)
    if not backward:
        assert not y.requires_grad
        return
    y.sum().backward()
    grads = {k: g for k, g in gradients(selection).items() if k.startswith("_submodules.1.")}
    assert grads and all(g is not None and not g.any() for g in grads.values()), grads


def test_dropped_samples_pass_on_request() -> None:
    for name in ("linear-relu", "different-classes"):
        selection, _ = made(name, dropped="identity")
        if name == "linear-relu":
            selection = linears(K, dropped="identity").double()
        x = torch.randn(B, F, dtype=F64, requires_grad=True)
        mask = torch.arange(B) % 3 > 0
        y, _, _ = selection(x, start(x), ACTIONS, mask)
        out = (ACTIONS < 0) | ~mask
        assert torch.equal(y[out], x[out])
        assert_same(y[~out].detach(), one_by_one(selection._submodules, x, ACTIONS)[~out].detach())
        y[out].sum().backward()
        assert x.grad is not None and torch.equal(x.grad, out.double()[:, None].expand(B, F))
    selection, x = made("linear", dropped="identity")
    with pytest.raises(ValueError, match=r"dropped='identity': .*\[12, 6\].*\[12, 5\]"):
        selection(x, start(x), ACTIONS)


# ------------------------------------------------------------------------------------------------- dtypes and shapes


@each_backend
@pytest.mark.parametrize("name", ["linear", "mlp", "deep", "norm-alone", "conv", "different-depths"])
def test_dtypes_follow_the_modules(name: str, backend: str) -> None:
    with use_backend(backend):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            selection, x = made(name)
            y, _, _ = selection.to(dtype)(x.to(dtype), start(x), ACTIONS)
            assert y.dtype == dtype
            y.float().sum().backward()
            assert all(p.grad is None or p.grad.dtype == dtype for p in selection.parameters())
        selection, x = made(name)
        selection, x = selection.float(), x.float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _, _ = selection(x, start(x), ACTIONS)
            expected = one_by_one(selection._submodules, x, ACTIONS)
        assert y.dtype == expected.dtype == (torch.float32 if name == "norm-alone" else torch.bfloat16)
        y.float().sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.float32
        exact = one_by_one(selection.double()._submodules, x.double(), ACTIONS)
        spacing = torch.finfo(y.dtype).eps * float(exact.abs().max())
        error, plain = (float((t.double() - exact).abs().max()) for t in (y.detach(), expected.detach()))
        assert error <= 2 * plain + spacing


def test_the_spatial_size_may_change() -> None:
    selection, _ = made("conv")
    for size in ((9, 8), (16, 16), (4, 5)):
        x = torch.randn(B, 3, *size, dtype=F64)
        assert_same(selection(x, start(x), ACTIONS)[0], one_by_one(selection._submodules, x, ACTIONS))


@pytest.mark.parametrize("limit", ["_UNFOLDED_BYTES", "_UNFOLDED_BYTES_OF_A_MODULE"])
def test_large_images_are_not_unfolded(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    selection, x = made("conv")
    expected = selection(x, start(x), ACTIONS)[0]
    monkeypatch.setattr(grouped_modules, limit, 100)
    monkeypatch.delattr(torch.nn.functional, "unfold")
    assert_same(selection(x, start(x), ACTIONS)[0].detach(), expected.detach())


def test_dropout_is_drawn_per_element() -> None:
    seeds.manual_seed(0)
    selection = Selection(*[nn.Sequential(nn.Identity(), nn.Dropout(0.5)) for _ in range(3)])
    x, actions = torch.ones(3000, 4), torch.arange(3000) % 3
    y = selection(x, start(x), actions)[0]
    kept = (y == 2).float().mean()
    assert set(y.unique().tolist()) == {0.0, 2.0} and abs(float(kept) - 0.5) < 5 * 0.5 / 12000**0.5
    assert torch.equal(selection.eval()(x, start(x), actions)[0], x)


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True), nn.Dropout(0.5, inplace=True)])
@pytest.mark.parametrize("where", ["alone", "first", "last"])
def test_working_in_place_leaves_the_input_alone(act: nn.Module, where: str) -> None:
    seeds.manual_seed(0)

    def module() -> nn.Module:
        one = copy.deepcopy(act)
        if where == "alone":
            return one
        return nn.Sequential(one, nn.Linear(F, F)) if where == "first" else nn.Sequential(nn.Linear(F, F), one)

    for actions in (torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 0, 0])):
        selection = Selection(*[module() for _ in range(3)])
        x = torch.randn(4, F)
        before = x.clone()
        y, _, _ = selection(x, start(x), actions)
        assert torch.equal(x, before)
        leaf = x.clone().requires_grad_()
        (leaf * 1).retain_grad()
        selection(leaf, start(x), actions)[0].sum().backward()
        assert torch.equal(leaf.detach(), before) and y.shape == x.shape


# ------------------------------------------------------------------------------------------------- modules as objects


def test_a_module_twice_in_the_list() -> None:
    for shared in (nn.Linear(F, F).double(), Own(F, F).double()):
        other = type(shared)(F, F).double()
        selection = Selection(shared, other, shared)
        x, actions = torch.randn(6, F, dtype=F64), torch.tensor([0, 2, 1, 2, 0, 2])
        grads = []
        for y in (selection(x, start(x), actions)[0], one_by_one(selection._submodules, x, actions)):
            selection.zero_grad()
            y.square().sum().backward()
            grads.append([p.grad.clone() for p in selection.parameters() if p.grad is not None])
        assert len(grads[0]) == 4
        for got, expected in zip(*grads, strict=True):
            assert_same(got, expected)
        selection.zero_grad()
        selection(x, start(x), torch.zeros(6, dtype=torch.int64))[0].sum().backward()  # by one of its places
        assert shared.weight.grad is not None and other.weight.grad is None


def test_hooks_are_run() -> None:
    for which in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        for inner in (False, True):
            selection = Selection(*[nn.Sequential(nn.Linear(F, F), nn.ReLU()) for _ in range(3)])
            x, calls = torch.randn(5, F), []
            expected = selection(x, start(x), torch.tensor([0, 1, 1, 1, 2]))[0]
            target: Any = selection._submodules[1]
            handle = getattr(target[0] if inner else target, which)(lambda *_, calls=calls: calls.append(1))
            y = selection(x.requires_grad_(), start(x), torch.tensor([0, 1, 1, 1, 2]))[0]
            y.sum().backward()
            assert calls == [1], which
            torch.testing.assert_close(y, expected)
            handle.remove()
            selection(x, start(x), torch.tensor([0, 1, 1, 1, 2]))[0].sum().backward()
            assert calls == [1]


def test_modules_may_be_exchanged() -> None:
    """What is remembered of the list does not outlive a change of it."""
    selection, x = made("linear-relu")
    for change in (
        lambda: selection._submodules.__setitem__(2, nn.Sequential(nn.Linear(F, 5), nn.ReLU()).double()),
        lambda: selection._submodules[0].__setitem__(1, nn.Tanh()),
        lambda: setattr(selection._submodules[2][0], "weight", nn.Parameter(torch.randn(5, F, dtype=F64))),
        lambda: setattr(selection._submodules[0][0], "bias", None),
        lambda: selection._submodules.append(nn.Sequential(nn.Linear(F, 5), nn.ReLU()).double()),
        lambda: nn.utils.parametrizations.weight_norm(selection._submodules[3][0]),
        lambda: selection._submodules[2].__setitem__(0, Own(F, 5).double()),
        lambda: selection._submodules[3].append(nn.Sigmoid()),
    ):
        selection(x, start(x), ACTIONS)
        change()
        assert_same(selection(x, start(x), ACTIONS)[0], one_by_one(selection._submodules, x, ACTIONS))


def test_options_may_change() -> None:
    seeds.manual_seed(0)
    selection = Selection(
        *[nn.Sequential(nn.Linear(F, 4), nn.LeakyReLU(0.1), nn.LayerNorm(4)) for _ in range(4)]
    ).double()
    x = torch.randn(B, F, dtype=F64)
    for name, value in (("1.negative_slope", 0.5), ("2.eps", 0.1)):
        selection(x, start(x), ACTIONS)
        index, option = name.split(".")
        for modules in (selection._submodules[:1], selection._submodules):
            for m in modules:
                setattr(m[int(index)], option, value)
            assert_same(selection(x, start(x), ACTIONS)[0], one_by_one(selection._submodules, x, ACTIONS), name)


def test_batchnorm_in_training() -> None:
    """Every module's statistics are of its own samples, in one call."""
    seeds.manual_seed(0)
    selection = Selection(*[nn.Sequential(nn.Linear(F, 3), nn.BatchNorm1d(3)) for _ in range(K)])
    apart = copy.deepcopy(selection._submodules)
    x = torch.randn(B, F)
    y, _, _ = selection(x, start(x), ACTIONS.clamp(max=2))
    for k in (0, 2):
        rows = ACTIONS.clamp(max=2) == k
        assert torch.allclose(y[rows], apart[k](x[rows]))
    for mine, theirs in zip(selection._submodules, apart, strict=True):
        for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
            assert torch.allclose(a, b)
    assert int(selection._submodules[1][1].num_batches_tracked) == 0  # type: ignore[index,arg-type]


class _Reads(nn.Linear):
    """Reads a number."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (2 if input.sum() > 0 else 1)


@pytest.mark.parametrize("count", [3, 0])
def test_no_sample_at_all_leaves_no_trace_in_the_first_of_unlike_modules(count: int) -> None:
    for first, counted in (
        (nn.Sequential(nn.Flatten(), nn.Linear(F, 3), nn.BatchNorm1d(3)), 0),
        (nn.Sequential(nn.Unflatten(1, (-1, F)), nn.Flatten(-2, -1), nn.BatchNorm1d(F), nn.Linear(F, 3)), 0),
        (nn.Sequential(_Reads(F, 3), nn.BatchNorm1d(3)), 1),
    ):
        selection, seen = Selection(first, nn.Linear(F, 3)), list[object]()
        first.register_forward_hook(lambda *hooked, seen=seen: seen.append(hooked))
        x = torch.randn(count, F)
        y, _, _ = selection(x, start(x), torch.full((count,), -1))
        assert y.shape == (count, 3) and y.dtype == torch.float32 and not y.any() and len(seen) == counted
        assert dict(first.named_buffers())[f"{'1' if counted else '2'}.num_batches_tracked"] == counted
        assert [p.shape for p in first.parameters()] == [p.shape for p in copy.deepcopy(first).parameters()]


def test_a_single_module() -> None:
    selection = Selection(nn.Linear(F, 3))
    x = torch.randn(4, F)
    for actions in (None, torch.tensor([5, -1, 0, 2])):
        y, _, given = selection(x, start(x), actions, torch.zeros(4, dtype=torch.bool))
        assert torch.equal(y, selection._submodules[0](x)) and given is actions


def test_a_list_of_modules() -> None:
    modules = [nn.Linear(F, 3) for _ in range(3)]
    for given in (modules, tuple(modules), nn.ModuleList(modules)):
        assert list(Selection(given)._submodules) == modules  # type: ignore[arg-type]


def test_outputs_that_do_not_fit() -> None:
    x, actions = torch.randn(3, F), torch.tensor([0, 1, 1])
    selection = Selection(nn.Linear(F, 3), nn.Linear(F, 1))  # a width of one is no exception
    with pytest.raises(ValueError, match=r"modules: .*module 0 gives \[3\] per sample, module 1 \[1\]"):
        selection(x, start(x), actions)

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.sum()

    with pytest.raises(ValueError, match=r"module 0: expected an output with a row per sample, got \[\]"):
        Selection(Whole(), Whole())(x, start(x), actions)


def test_deepcopy_and_pickle() -> None:
    for name in ("deep", "conv", "different-depths"):
        selection, x = made(name)
        expected = selection(x, start(x), ACTIONS)[0]
        copied = copy.deepcopy(selection)
        stored = io.BytesIO()
        torch.save(selection.state_dict(), stored)
        stored.seek(0)
        fresh, _ = made(name, seed=1)
        fresh.load_state_dict(torch.load(stored, weights_only=True), strict=True)
        whole = io.BytesIO()
        torch.save(copied, whole)
        whole.seek(0)
        for other in (copied, fresh, torch.load(whole, weights_only=False)):
            assert torch.equal(other(x, start(x), ACTIONS)[0], expected)
            with torch.no_grad():
                next(other.parameters()).add_(1)  # the copy's own
        assert torch.equal(selection(x, start(x), ACTIONS)[0], expected)


def test_moved_after_a_call() -> None:
    selection, x = made("linear-relu")
    expected = selection(x, start(x), ACTIONS)[0].detach()
    low = selection.to(torch.float32)(x.float(), start(x), ACTIONS)[0]
    assert low.dtype == torch.float32 and torch.allclose(low.double(), expected, atol=1e-5)
    assert selection.to("meta")(x.float().to("meta"), start(x), ACTIONS.to("meta"))[0].shape == (B, 5)


# ------------------------------------------------------------------------------------------------- logging, pointers


def test_logging() -> None:
    selection = linears(K)
    x = torch.randn(4, F)
    assert selection.last_selection_freeze is None
    selection.start_logging_selections()
    selection(x, start(x), torch.tensor([3, 1, 3, -1]))
    selection(x, start(x), torch.tensor([0, 0, 0, 2]), torch.tensor([1, 1, 1, 0]))
    assert selection.stop_logging_and_get_selections() == [0, 1, 3] == selection.last_selection_freeze
    selection(x, start(x), torch.tensor([2, 2, 2, 2]))  # not logged
    selection.start_logging_selections()
    selection(x, start(x), torch.tensor([2, 2, 2, 1]))
    assert selection.stop_logging_and_get_selections(add_to_old=True) == [0, 1, 2, 3]
    assert linears(K).stop_logging_and_get_selections(add_to_old=True) == []


def test_pointers() -> None:
    from tests.helpers.networks import decision

    select, decide = linears(3, store_module_pointers=True, name="layer"), decision("REINFORCE", 3)
    x = torch.randn(5, F)
    x, meta, actions = decide(x, start(x), None, torch.arange(5) > 0)
    select(x, meta, actions, torch.arange(5) > 0)
    assert select.name == "layer" and meta[0].steps == []
    for b in range(1, 5):
        assert meta[b].steps[0]["selected_modules"] is select._submodules[int(actions[b])]


@pytest.mark.parametrize("joined", [False, True])
def test_pointers_of_parts_of_a_batch(joined: bool) -> None:
    """Each decided for on its own, and given to a selection of its own, in whatever order."""
    from tests.helpers.networks import decision

    x, parts = torch.randn(5, F), (slice(0, 2), slice(2, 5))
    meta = start(x)
    views = [start(x[part]) if joined else meta[part] for part in parts]
    decided = [decision("REINFORCE", 3)(x[part], view) for part, view in zip(parts, views, strict=True)]
    selects = [linears(3, store_module_pointers=True) for _ in parts]
    for select, of_part in zip(selects, decided, strict=True):
        select(*of_part)
    if joined:
        meta = views[0] + views[1]
    for b, step in enumerate(sample.steps[0] for sample in meta):
        assert step["selected_modules"] is selects[b >= 2]._submodules[int(step["actions"])]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("K", [2, 4, 40, 100])
def test_one_call_gives_the_bits_of_a_plan_and_a_product(K: int, stacked: bool) -> None:
    """Few Linear modules are run by one op that makes the plan along."""
    seeds.manual_seed(0)
    layer = Selection(*(nn.Sequential(nn.Linear(5, 3), nn.ReLU()) for _ in range(K)), stacked=stacked)
    x, actions = torch.randn(9, 5, requires_grad=True), torch.randint(-1, K, (9,))
    leaves = [x, *layer.parameters()]

    def results() -> list[Tensor | None]:
        y = layer(x, Trajectory(9), actions)[0]
        with torch.no_grad():
            assert torch.equal(layer(x, Trajectory(9), actions)[0], y)
        return [y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)]

    calls, own = [], grouped_modules.planned
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_modules, "planned", lambda *args: calls.append(own(*args)) or calls[-1])
        made = results()
        patch.setattr(grouped_modules, "planned", lambda *args: None)
        apart = results()
    if extension()[0]:
        few = stacked or 2 * K <= MOST_PLANNED  # a stack's parameters are two, whatever K is
        assert sum(call is not None for call in calls) == 2 * few
    for one, other in zip(made, apart, strict=True):
        assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=f"actions: expected indices below {K}, got 1 of 9"):
        layer(x, Trajectory(9), torch.tensor([K, *[0] * 8]))
