"""``model.loss``: upstream's total, and labels that are missing, against deleting them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.multitask import EqualWeights, MTLModel, Uncertainty, task_losses
from tests.helpers import seeds
from tests.helpers.budget import Yardstick
from tests.helpers.multitask import README_TASKS, load, readme

pytestmark = pytest.mark.filterwarnings("ignore:'auto' multiplies:UserWarning")  # which has a test of its own

#: PyTorch's losses that compare elements: the loss, and what to make a target of random numbers from.
ELEMENTS: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Tensor]]] = {
    "mse": (nn.MSELoss, lambda r: r),
    "l1": (nn.L1Loss, lambda r: r),
    "smooth": (lambda **k: nn.SmoothL1Loss(beta=0.4, **k), lambda r: r),
    "huber": (lambda **k: nn.HuberLoss(delta=0.3, **k), lambda r: r),
    "logits": (nn.BCEWithLogitsLoss, lambda r: (r > 0).to(r.dtype)),
    "weighted logits": (
        lambda **k: nn.BCEWithLogitsLoss(torch.rand(3).double(), pos_weight=torch.rand(3).double(), **k),
        lambda r: (r > 0).to(r.dtype),
    ),
    "poisson": (lambda **k: nn.PoissonNLLLoss(full=True, **k), lambda r: (4 * r.abs()).round()),
    "margin": (nn.SoftMarginLoss, lambda r: torch.sign(r)),
}
REDUCTIONS = ("mean", "sum")


def one(x: Tensor, y: Any, loss: Any, mask: Tensor | None = None) -> tuple[Tensor, Tensor | bool]:
    losses, present = task_losses({"t": x}, {"t": y}, {"t": loss}, None if mask is None else {"t": mask})
    return losses["t"], present["t"]


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-14), (a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ELEMENTS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 9999), B=st.integers(1, 6), by_mask=st.booleans())
def test_masking_elements_equals_deleting_them(name: str, reduction: str, seed: int, B: int, by_mask: bool) -> None:
    seeds.manual_seed(seed)
    make, target = ELEMENTS[name]
    loss = make(reduction=reduction)
    x = torch.randn(B, 3, dtype=torch.float64, requires_grad=True)
    y = target(torch.randn(B, 3, dtype=torch.float64))
    there = torch.rand(B, 3) < 0.6
    hidden = y if by_mask else y.masked_fill(~there, math.nan)
    got, some = one(x, hidden, loss, there if by_mask else None)
    (grad,) = torch.autograd.grad(got, x)
    assert (grad[~there] == 0).all() and grad.isfinite().all()
    assert bool(some) == bool(there.any())
    if not there.any():
        assert got == 0
        return
    each = copy.copy(loss)
    each.reduction = "none"
    values = each(x, y)[there]
    expected = values.mean() if reduction == "mean" else values.sum()
    same(got, expected)
    same(grad, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prediction_without_a_label_may_be_anything(bad: float) -> None:
    x = torch.tensor([[1.0], [bad]], requires_grad=True)
    for loss, y in ((nn.MSELoss(), [[2.0], [math.nan]]), (nn.BCEWithLogitsLoss(), [[1.0], [math.nan]])):
        total, _ = one(x, torch.tensor(y), loss)
        (grad,) = torch.autograd.grad(total, x)
        assert total.isfinite() and grad.isfinite().all() and grad[1] == 0


@pytest.mark.parametrize("name", ELEMENTS)
def test_without_missing_labels_it_is_pytorch(name: str) -> None:
    seeds.manual_seed(0)
    make, target = ELEMENTS[name]
    for reduction in REDUCTIONS:
        loss = make(reduction=reduction)
        x, y = torch.randn(5, 3).double(), target(torch.randn(5, 3).double())
        same(one(x, y, loss)[0], loss(x, y))


CLASS_LOSSES = {
    "plain": lambda **k: nn.CrossEntropyLoss(**k),
    "smooth": lambda **k: nn.CrossEntropyLoss(label_smoothing=0.1, **k),
    "weighted": lambda **k: nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 3.0, 0.5]).double(), **k),
    "both": lambda **k: nn.CrossEntropyLoss(
        torch.tensor([0.2, 1.0, 3.0, 0.5]).double(), label_smoothing=0.2, ignore_index=1, **k
    ),
    "nll": lambda **k: nn.NLLLoss(torch.tensor([0.2, 1.0, 3.0, 0.5]).double(), ignore_index=-1, **k),
}


@pytest.mark.parametrize("trailing", [(), (2,)])
@pytest.mark.parametrize("form", ["ignored", "mask", "nan"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_classes(name: str, reduction: str, form: str, trailing: tuple[int, ...]) -> None:
    seeds.manual_seed(1)
    loss = CLASS_LOSSES[name](reduction=reduction)
    x = torch.randn(6, 4, *trailing, dtype=torch.float64)
    if name == "nll":
        x = x.log_softmax(1)
    x.requires_grad_()
    labels = torch.randint(4, (6, *trailing))
    there = torch.rand(6, *trailing) < 0.6
    labels[0], there[0] = 0, True  # where there is none, PyTorch gives NaN
    marked = labels.masked_fill(~there, loss.ignore_index)
    expected = loss(x, marked)
    wanted = torch.autograd.grad(expected, x)[0]
    given = {
        "ignored": (marked, None),
        "mask": (labels, there),
        "nan": (labels.double().masked_fill(~there, math.nan), None),
    }[form]
    got, some = one(x, given[0], loss, given[1])
    same(got, expected)
    same(torch.autograd.grad(got, x)[0], wanted)
    assert some


def test_no_class_label_at_all() -> None:
    """PyTorch gives NaN."""
    for loss in (nn.CrossEntropyLoss(), CLASS_LOSSES["weighted"]()):
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        total, some = one(x, torch.full((3,), -100), loss)
        assert total == 0 and not some
        assert (torch.autograd.grad(total, x)[0] == 0).all()


def test_probabilities() -> None:
    seeds.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.rand(5, 3, dtype=torch.float64).softmax(1)
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1)
    same(one(x, y, loss)[0], loss(x, y))
    hidden = y.clone()
    hidden[1, 2] = math.nan
    kept = [0, 2, 3, 4]
    same(one(x, hidden, loss)[0], loss(x[kept], y[kept]))
    same(one(x, y, loss, torch.arange(5) != 1)[0], loss(x[kept], y[kept]))


def test_kl_divergence() -> None:
    x, y = torch.randn(5, 3).double().log_softmax(1), torch.rand(5, 3).double().softmax(1)
    for reduction in ("mean", "sum", "batchmean"):
        loss = nn.KLDivLoss(reduction=reduction)
        same(one(x, y, loss)[0], loss(x, y))
        same(one(x, y, loss, torch.arange(5) < 2)[0], loss(x[:2], y[:2]))


def test_functions_of_pytorch() -> None:
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 2, 1, 1])
    same(one(x, y, F.cross_entropy, torch.arange(4) < 3)[0], F.cross_entropy(x[:3], y[:3]))
    same(one(x, x + 1, F.l1_loss, torch.arange(4) < 3)[0], F.l1_loss(x[:3], x[:3] + 1))


def test_shapes_are_not_broadcast() -> None:
    """[B] against [B, 1] would be [B, B]."""
    x, y = torch.randn(6, 1).double(), torch.randn(6).double()
    same(one(x, y, nn.MSELoss())[0], F.mse_loss(x[:, 0], y))
    same(one(x, torch.arange(6), nn.MSELoss())[0], F.mse_loss(x[:, 0], torch.arange(6.0).double()))
    scores = torch.randn(6, 3).double()
    labels = torch.arange(6) % 3
    same(one(scores, labels[:, None], nn.CrossEntropyLoss())[0], F.cross_entropy(scores, labels))
    same(one(scores[0], labels[0], nn.CrossEntropyLoss())[0], F.cross_entropy(scores[0], labels[0]))


@pytest.mark.parametrize("shapes", [((10, 1), (10,)), ((10,), (10, 1)), ((10, 4, 1), (10, 4)), ((10, 1, 4), (10, 4))])
@pytest.mark.parametrize("kind", ["function", "module", "partial", "subclass", "hooked", "per element", "known"])
def test_no_loss_broadcasts_its_target(kind: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Whoever wrote it: [B, 1] against [B] is a number per sample."""

    class Own(nn.Module):
        def forward(self, p: Tensor, t: Tensor) -> Tensor:
            return ((p - t) ** 2).mean()

    class PerElement(nn.Module):
        reduction = "none"

        def forward(self, p: Tensor, t: Tensor) -> Tensor:
            return (p - t) ** 2

    class Mine(nn.MSELoss): ...

    hooked = nn.MSELoss()
    hooked.register_forward_hook(lambda *_: None)
    loss = {
        "function": lambda p, t: ((p - t) ** 2).mean(), "module": Own(), "subclass": Mine(), "hooked": hooked,
        "partial": partial(F.mse_loss, reduction="mean"), "per element": PerElement(), "known": nn.MSELoss(),
    }[kind]  # fmt: skip
    seeds.manual_seed(0)
    x, y = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    same(one(x, y, loss)[0], ((x.flatten() - y.flatten()) ** 2).mean())
    if kind in ("per element", "known"):
        first = torch.arange(10) < 3  # [B]
        same(one(x, y, loss, first)[0], ((x[:3].flatten() - y[:3].flatten()) ** 2).mean())


def test_a_target_of_another_kind_comes_as_it_is() -> None:
    seen: list[Any] = []
    loss = lambda p, t: seen.append(t) or p.sum()  # noqa: E731
    labels = torch.arange(10) % 3
    one(torch.randn(10, 3), labels, loss)
    assert seen[0] is labels


def test_a_mask_of_probabilities() -> None:
    """[B], or of their shape."""
    x, y = torch.randn(5, 3).double(), torch.rand(5, 3).double().softmax(1)
    kept = torch.tensor([True, False, True, True, False])
    whole = torch.ones(5, 3, dtype=torch.bool)
    whole[1, 2] = whole[4] = False
    expected = F.cross_entropy(x[kept], y[kept])
    for mask in (kept, kept[:, None], whole):
        same(one(x, y, nn.CrossEntropyLoss(), mask)[0], expected)


def test_half_precision_is_summed_in_float32() -> None:
    x, y = torch.full((70_000, 1), 3.0, dtype=torch.float16), torch.zeros(70_000, 1, dtype=torch.float16)
    assert one(x, y, nn.MSELoss())[0] == 9.0  # the sum is past float16's largest number


def test_alike_tasks_together_are_what_they_are_alone() -> None:
    seeds.manual_seed(0)
    shared = torch.rand(3).double()
    kinds = [nn.MSELoss(), nn.MSELoss(), nn.L1Loss(), nn.MSELoss(reduction="sum"), nn.BCEWithLogitsLoss(),
             nn.BCEWithLogitsLoss(pos_weight=shared), nn.BCEWithLogitsLoss(pos_weight=shared),
             nn.BCEWithLogitsLoss(pos_weight=torch.rand(3).double()), lambda a, b: (a - b).abs().max()]  # fmt: skip
    names = [f"t{i}" for i in range(len(kinds))] + [f"c{i}" for i in range(4)]
    losses = dict(zip(names, [*kinds, *(nn.CrossEntropyLoss() for _ in range(4))], strict=True))
    x = {n: torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for n in names}
    y: dict[str, Any] = {n: torch.rand(5, 3).double() if n[0] == "t" else torch.randint(3, (5,)) for n in names}
    y["t1"][2] = math.nan
    y["c2"][:] = -100
    masks = {"t2": torch.rand(5, 3) < 0.5, "c3": torch.rand(5) < 0.5, "c1": torch.ones(5, dtype=torch.bool)}
    found, present = task_losses(x, y, losses, masks)
    assert list(found) == names
    for n in names:
        alone, some = one(x[n], y[n], losses[n], masks.get(n))
        same(found[n], alone)
        same(torch.autograd.grad(found[n], x[n], retain_graph=True)[0], torch.autograd.grad(alone, x[n])[0])
        assert bool(present[n]) == bool(some)


class PerSample(nn.Module):
    """A user's own loss, a value per sample."""

    reduction = "none"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().sum(1) if x.dim() == 2 else (x - y).square()


def test_own_losses() -> None:
    x, y = torch.randn(4, 2, dtype=torch.float64, requires_grad=True), torch.randn(4, 2).double()
    seen: list[Any] = []

    def plain(a: Tensor, b: Any) -> Tensor:
        seen.append(b)
        return (a - b).abs().sum(1)

    same(one(x, y, plain)[0], (x - y).abs().sum(1).mean())
    assert seen[0] is y
    assert one(x, y.masked_fill(y == y[0, 0], math.nan), plain)[0].isnan()  # it is called with what there is
    with pytest.raises(ValueError, match=r"mask\['t'\]: expected one of PyTorch's losses.*got function"):
        one(x, y, plain, torch.ones(4, dtype=torch.bool))
    hidden = y.clone()
    hidden[1] = math.nan
    kept = [0, 2, 3]
    got = one(x, hidden, PerSample())[0]
    same(got, (x - y)[kept].square().sum(1).mean())
    grad = torch.autograd.grad(got, x)[0]
    assert grad.isfinite().all() and (grad[1] == 0).all()
    same(one(x[:, 0], hidden[:, 0], PerSample())[0], (x - y)[kept, 0].square().mean())
    assert one(x, {"any": "thing"}, lambda a, b: a.sum())[0] == x.sum()


def test_hooks_of_a_loss_run() -> None:
    loss, calls = nn.MSELoss(), []
    loss.register_forward_hook(lambda *_: calls.append(1))
    one(torch.ones(2), torch.zeros(2), loss)
    assert calls == [1]


def _own_forward(loss: nn.Module) -> None:
    loss.forward = lambda a, b: (a - b).abs().pow(3).mean()


def _scaled(grads: Any, by: float = 10.0) -> Any:
    return tuple(None if g is None else by * g for g in grads)


CALLED: dict[str, Callable[[nn.Module], Any]] = {
    "a forward of its own": _own_forward,
    "hook": lambda loss: loss.register_forward_hook(lambda m, i, o: 2 * o),
    "pre-hook": lambda loss: loss.register_forward_pre_hook(lambda m, i: (2 * i[0], i[1])),
    "backward hook": lambda loss: loss.register_full_backward_hook(lambda m, i, o: _scaled(i)),
    "backward pre-hook": lambda loss: loss.register_full_backward_pre_hook(lambda m, o: _scaled(o)),
    "global hook": lambda loss: nn.modules.module.register_module_forward_hook(
        lambda m, i, o: 3 * o if m is loss else None
    ),
    "global backward hook": lambda loss: nn.modules.module.register_module_full_backward_hook(
        lambda m, i, o: _scaled(i) if m is loss else None
    ),
}


@pytest.mark.parametrize("change", CALLED)
@pytest.mark.parametrize("make", [nn.MSELoss, nn.SmoothL1Loss, lambda: nn.HuberLoss(delta=0.5)])
def test_a_loss_that_may_not_be_read_is_called(make: Callable[[], nn.Module], change: str) -> None:
    loss = make()
    handle = CALLED[change](loss)
    try:
        found = []
        for run in (lambda p, y: task_losses({"t": p}, {"t": y}, {"t": loss})[0]["t"], loss):
            p, y = torch.arange(8.0).view(4, 2).requires_grad_(), torch.ones(4, 2)
            value = run(p, y)
            value.backward()
            found.append((value, p.grad))
    finally:
        if handle is not None:
            handle.remove()
    (value, grad), (expected, wanted) = found
    assert torch.allclose(value, expected) and torch.allclose(grad, wanted)


def test_nothing_is_read_from_the_device() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x, y, labels = torch.randn(4, 3, requires_grad=True), torch.empty(4, 3), torch.empty(4, dtype=torch.int64)
        found, present = task_losses(
            {"a": x, "b": x, "c": x}, {"a": y, "b": labels, "c": y},
            {"a": nn.MSELoss(), "b": nn.CrossEntropyLoss(), "c": PerSample()}, {"b": labels > 0},
        )  # fmt: skip
        for weighting in (EqualWeights(list(found)), Uncertainty(list(found))):
            torch.autograd.grad(weighting(found, present), x, retain_graph=True)


# ------------------------------------------------------------------------------------------------------------ a model


def test_the_readmes_numbers() -> None:
    """Upstream's total and every gradient of its README's example, within the budget of float64."""
    golden, names = load("mtl_readme.pt"), README_TASKS

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        model = MTLModel(readme(), names)
        model.load_state_dict(golden["state"])
        model.to(dtype)
        total, found = model.loss(model(golden["X"].to(dtype)), [y.to(dtype) for y in golden["y"]])
        total.backward()
        made = {"total": total.detach(), **dict(zip(names, (v.detach() for v in found.values()), strict=True))}
        return made | {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

    theirs = {"total": torch.tensor(golden["total"]), **golden["grads"]}
    theirs |= {k: torch.tensor(v) for k, v in zip(names, golden["losses"], strict=True)}
    ours, yardstick = run(torch.float32), Yardstick(lambda: run(torch.float64), torch.float32)
    assert ours.keys() == theirs.keys()
    yardstick.check(ours)
    yardstick.check({k: t.reshape(ours[k].shape) for k, t in theirs.items()}, "upstream's")


def two_tasks(**options: Any) -> MTLModel:
    seeds.manual_seed(0)
    return MTLModel(
        [
            {"name": "trunk", "layers": nn.Linear(4, 5)},
            {"name": "a", "layers": nn.Linear(5, 1), "anchor_layer": "trunk", "loss": nn.MSELoss(), "loss_weight": 0.5},
            {"name": "b", "layers": nn.Linear(5, 3), "anchor_layer": "trunk", "loss": nn.CrossEntropyLoss(),
             "loss_weight": "auto", "loss_init_val": 2.0},
            {"name": "c", "layers": nn.Linear(5, 2), "anchor_layer": "trunk"},
        ],
        ["a", "b", "c"],
        **options,
    )  # fmt: skip


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    seeds.manual_seed(1)
    return torch.randn(6, 4), {"a": torch.randn(6, 1), "b": torch.randint(3, (6,))}


def test_the_total_is_upstreams() -> None:
    model, (x, y) = two_tasks(), batch()
    out = model(x)
    outputs, losses, weights = out
    total, found = model.loss(out, y)
    expected = 0.5 * losses[0](outputs[0], y["a"]) + weights[1] * losses[1](outputs[1], y["b"])
    assert total.shape == () and torch.allclose(total, expected[0], rtol=1e-6)
    assert list(found) == ["a", "b"] and all(t.shape == () for t in found.values())
    for y_hat in (out, outputs, dict(zip("abc", outputs, strict=True))):
        for target in (y, [y["a"], y["b"], None]):
            assert torch.equal(model.loss(y_hat, target)[0], total)
    total.backward()
    assert model.b_loss.grad is not None and torch.equal(model.b_loss.grad[0], found["b"])


def test_a_learned_weight_warns() -> None:
    """Once: at each line that calls ``loss``, as Python's filter has it."""
    model, (x, y) = two_tasks(), batch()
    with pytest.warns(UserWarning, match="falls without bound") as caught:
        model.loss(model(x), y)
    assert [Path(w.filename).name for w in caught] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.loss(model(x), {"a": y["a"]})
        model.loss(model(x), y, weighting="equal")
        two_tasks(weighting="uncertainty").loss(model(x), y, weighting="geometric")


def test_targets_and_masks_of_some_tasks() -> None:
    model, (x, y) = two_tasks(), batch()
    total, found = model.loss(model(x), {"a": y["a"]})
    assert list(found) == ["a"] and torch.equal(total, found["a"] * 0.5)
    there = torch.arange(6) < 4
    part, _ = model.loss(model(x), y, mask={"b": there}, weighting="equal")
    whole, found = model.loss(model(x), {**y, "b": y["b"].masked_fill(~there, -100)}, weighting="equal")
    assert torch.equal(part, whole) and torch.equal(whole, torch.stack(list(found.values())).sum())


@pytest.mark.parametrize(
    "kind", [None, "equal", "uncertainty", "dwa", "rlw", "geometric", "stch", "famo", "imtl", {"a": 2.0, "b": 1.0}]
)
def test_a_task_without_a_label_in_the_batch(kind: Any) -> None:
    model, (x, y) = two_tasks(weighting=kind), batch()
    y["a"] = torch.full((6, 1), math.nan)
    total, found = model.loss(model(x), y)
    total.backward()
    assert total.isfinite() and found["a"] == 0
    assert (model.a.weight.grad == 0).all()
    for p in model.parameters():
        assert p.grad is None or p.grad.isfinite().all()
    assert model.b.weight.grad.abs().sum() > 0
    learned = [p for p in model.weighting.parameters()] if model.weighting is not None else []
    assert all(p.grad[0] == 0 and p.grad[1] != 0 for p in learned)


def test_a_models_weighting() -> None:
    plain, model = two_tasks(), two_tasks(weighting="uncertainty")
    own = ["weighting.log_variance", "weighting.task_names"]
    assert [*plain.state_dict(), *own] == list(model.state_dict())  # absent by default, and last
    assert list(plain.state_dict()) == list(two_tasks(weighting="equal").state_dict())  # which has nothing to keep
    assert model.weighting is not None and model.weighting.tasks == ("a", "b")
    x, y = batch()
    total, found = model.loss(model(x), y)
    assert torch.equal(total, model.weighting(found))
    twin = copy.deepcopy(model)
    assert twin.weighting is not model.weighting
    own = EqualWeights(["a", "b"])
    assert torch.equal(model.loss(model(x), y, weighting=own)[0], own(found))
    assert torch.equal(model.loss(model(x), y, weighting=[1, 2])[0], found["a"] + 2 * found["b"])
    assert two_tasks(weighting="uncertainty", dtype=torch.float64).weighting.log_variance.dtype == torch.float64


def test_functional_call_uses_the_given_weight() -> None:
    model, (x, y) = two_tasks(), batch()
    out = torch.func.functional_call(model, {"b_loss": torch.zeros(1)}, (x,))
    total, found = model.loss(out, y)
    assert torch.equal(total, 0.5 * found["a"])


@pytest.mark.parametrize("kind", [None, "uncertainty", "geometric"])
@pytest.mark.long_after(1)
def test_compiles_to_one_graph(kind: str | None) -> None:
    torch._dynamo.reset()
    model, (x, y) = two_tasks(weighting=kind), batch()
    y["a"][2] = math.nan

    def step(x: Tensor) -> Tensor:
        total, _ = model.loss(model(x), y)
        return total

    assert torch.allclose(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x, y: m.loss(m(x), {"aa": y["a"]}), ValueError, "y: there is no task 'aa'; did you mean 'a'"),
        (lambda m, x, y: m.loss(m(x), [y["a"]]), ValueError, "y: expected one for each of the 3 tasks, got 1"),
        (lambda m, x, y: m.loss(m(x), y["a"]), TypeError, "y: expected a dict by task or a list, got a tensor"),
        (lambda m, x, y: m.loss(m(x), {}), ValueError, "y: expected a target for a task with a loss"),
        (lambda m, x, y: m.loss(m(x), {"a": torch.ones(5)}), ValueError, r"y\['a'\]: expected the prediction's shape"),
        (lambda m, x, y: m.loss(m(x), {"b": torch.ones(6, 2)}), ValueError, r"y\['b'\]: expected class indices"),
        (lambda m, x, y: m.loss(m(x), y, mask={"a": torch.ones(6)}), TypeError, r"mask\['a'\]: expected a bool"),
        (lambda m, x, y: m.loss(m(x), y, mask={"a": torch.ones(5) > 0}), ValueError, r"mask\['a'\]: expected the ta"),
        (lambda m, x, y: m.loss(m(x), y, weighting="dwa"), ValueError, "'dwa' learns or remembers"),
        (lambda m, x, y: m.loss(m(x), y, weighting="uncertanty"), ValueError, "did you mean 'uncertainty'"),
        (lambda m, x, y: two_tasks(weighting={"a": 1.0}), ValueError, "weights: expected a number for 'b'"),
        (lambda m, x, y: MTLModel([{"name": "a", "layers": nn.ReLU()}], "a", weighting="equal"), ValueError,
         "weighting: expected an output with a loss"),
        (lambda m, x, y: m.task_parameters("trunk"), ValueError, "there is no task 'trunk'"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(two_tasks(), *batch())


# ---------------------------------------------------------------------------------------------- parameters by task


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in parameters]


def test_parameters_by_task() -> None:
    shared = nn.Linear(4, 4)
    model = MTLModel(
        [
            {"name": "trunk", "layers": nn.Linear(4, 4)},
            {"name": "own", "layers": nn.Linear(4, 4)},
            {"name": "deep", "layers": nn.Linear(4, 4), "anchor_layer": "trunk"},
            {"name": "a", "layers": nn.Bilinear(4, 4, 1), "anchor_layer": ["deep", "own"]},
            {"name": "b", "layers": nn.Linear(4, 1), "anchor_layer": "deep"},
            {"name": "c", "layers": nn.Sequential(shared, nn.Linear(4, 1)), "anchor_layer": "trunk"},
            {"name": "d", "layers": shared, "anchor_layer": "c_in"},
            {"name": "c_in", "layers": nn.Identity(), "anchor_layer": "trunk"},
            {"name": "idle", "layers": nn.Linear(4, 4)},
        ],
        ["a", "b", "c", "d"],
    )
    assert names_of(model, model.shared_parameters()) == [
        "trunk.weight", "trunk.bias", "deep.weight", "deep.bias", "c.0.weight", "c.0.bias",
    ]  # fmt: skip
    assert names_of(model, model.task_parameters("a")) == ["own.weight", "own.bias", "a.weight", "a.bias"]
    assert names_of(model, model.task_parameters("b")) == ["b.weight", "b.bias"]
    assert names_of(model, model.task_parameters("c")) == ["c.1.weight", "c.1.bias"]
    assert model.task_parameters("d") == []
    assert model.feature_names == ["root", "trunk", "deep"]


def test_the_chain_rule_through_the_features() -> None:
    """Each task's gradient of the shared parameters is that of its features times theirs."""
    model, (x, y) = two_tasks(), batch()
    assert model.feature_names == ["trunk"]
    features, out = model.with_features(x)
    assert torch.equal(out[0][0], model(x)[0][0]) and len(out[0]) == 3
    _, found = model.loss(out, y)
    shared = model.shared_parameters()
    assert names_of(model, shared) == ["trunk.weight", "trunk.bias"]
    for loss in found.values():
        direct = torch.autograd.grad(loss, shared, retain_graph=True)
        (at,) = torch.autograd.grad(loss, features, retain_graph=True)
        for a, b in zip(direct, torch.autograd.grad(features, shared, at, retain_graph=True), strict=True):
            assert torch.equal(a, b)
    assert model.output_tasks == ["a", "b", "c"]
