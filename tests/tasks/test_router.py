"""TaskRouter: its masks, its laws, its checkpoints, and the task that is active."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastroute
from fastroute.tasks import TaskRouter, set_task
from tests.helpers import seeds
from tests.helpers.budget import check
from tests.helpers.cases import evaluate
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_same, gradcheck
from tests.helpers.poison import poisoned_memory
from tests.helpers.tasks import T, case, generator, images, masked, router, small_vgg, tasks_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("sigma", "off"),
    [(3, 3), (0, 0), (8, 8), (9, 8), (0.0, 0), (0.5, 4), (0.3, 2), (1.0, 8), (1, 1), (0.1, 0), (np.int64(2), 2)],
)
def test_sigma(sigma: Any, off: int) -> None:
    made = TaskRouter(8, 4, sigma)
    mapping = made.get_unit_mapping()
    assert mapping.dtype == torch.float32 and mapping.shape == (4, 8) and not mapping.requires_grad
    assert (mapping.sum(1) == 8 - off).all() and ((mapping == 0) | (mapping == 1)).all()
    assert list(made.state_dict()) == (["_unit_mapping"] if off else []) and not list(made.parameters())


def test_draws() -> None:
    """NumPy's global generator: one draw for a unit and a task, none if no unit is off, whatever torch's seed."""
    np.random.seed(3)
    drawn = np.random.rand(4, 8)
    expected = drawn.argsort(1).argsort(1) >= 3
    np.random.seed(3)
    TaskRouter(8, 4, 0)
    seeds.manual_seed(1)
    for options in ({}, {"dtype": torch.float64}, {"inplace": True}):
        np.random.seed(3)
        assert (TaskRouter(8, 4, 3, **options).get_unit_mapping().numpy() == expected).all()
    follows = np.random.rand()
    np.random.seed(3)
    np.random.rand(32)
    assert np.random.rand() == follows


def test_a_torch_generator() -> None:
    """Masks from it alone; every unit equally likely."""
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    a, b, other = (router(64, 20, seed=seed).get_unit_mapping() for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    counts = router(16, 2000, 0.25).get_unit_mapping().sum(0)
    assert ((counts - 1500).abs() < 5 * (2000 * 0.75 * 0.25) ** 0.5).all()  # five standard deviations


@given(C=st.integers(1, 40), tasks=st.integers(1, 30), off=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_coverage_and_balance(C: int, tasks: int, off: int, seed: int) -> None:
    keeps = C - min(off, C)
    options: dict[str, Any]
    for options in ({"balanced": True}, {"no_orphans": True}, {"no_orphans": True, "balanced": True}):
        if options.get("no_orphans") and keeps * tasks < C:
            with pytest.raises(ValueError, match=f"no_orphans: expected room for all {C} units, got {keeps * tasks} "):
                router(C, tasks, off, seed, **options)
            continue
        mapping = router(C, tasks, off, seed, **options).get_unit_mapping()
        assert (mapping.sum(1) == keeps).all()
        used = mapping.sum(0)
        if options.get("balanced"):
            assert used.max() - used.min() <= 1
        if options.get("no_orphans"):
            assert used.min() >= 1


def test_options_change_as_little_as_they_must() -> None:
    """The same draws: a first task is drawn as without ``balanced``, and masks without orphans stay as they are."""
    plain = router(12, 6, 3, seed=1).get_unit_mapping()
    assert plain.sum(0).min() > 0
    assert torch.equal(router(12, 6, 3, seed=1, no_orphans=True).get_unit_mapping(), plain)
    assert torch.equal(router(12, 6, 3, seed=1, balanced=True).get_unit_mapping()[0], plain[0])
    few = router(12, 3, 8, seed=0).get_unit_mapping()
    orphans = int((few.sum(0) == 0).sum())
    assert orphans > 0
    adopted = router(12, 3, 8, seed=0, no_orphans=True).get_unit_mapping()
    assert int((few != adopted).sum()) == 2 * orphans


# -------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 8), (4, 8, 5), (4, 8, 3, 2), (4, 8, 2, 3, 2), (0, 8, 2), (4, 8, 0), (1, 8, 1, 1)]
)
def test_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype, inplace: bool) -> None:
    """Exactly, and so is its gradient, for one task and for one per sample; in a channels-last layout too."""
    layer = router(inplace=inplace)
    g = torch.randn(shape, generator=generator(1)).to(dtype)
    for last in (False, True):
        for task in (2, torch.tensor(4), tasks_of(shape[0]), tasks_of(shape[0]).to(torch.int32)):
            leaf = torch.randn(shape, generator=generator(2)).to(dtype).requires_grad_()
            x = leaf * 1
            x = x.to(memory_format=torch.channels_last) if last and x.dim() == 4 else x
            with poisoned_memory():
                y = layer(x, task)
                (dx,) = torch.autograd.grad(y, leaf, g)
            index = task if isinstance(task, int) else task.long()
            assert y.dtype == dtype and y.stride() == x.stride() and (y is x) == inplace
            assert torch.equal(y, masked(leaf, layer.get_unit_mapping(), index))
            assert torch.equal(dx, masked(g, layer.get_unit_mapping(), index))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_budget(dtype: torch.dtype) -> None:
    layer = router()
    check(
        lambda x, task: {"y": layer(x, task)},
        lambda x, task: {"y": masked(x, layer.get_unit_mapping(), task)},
        case().to(dtype), dtype=dtype,
    )  # fmt: skip


@given(
    sizes=st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(0, 9), st.integers(1, 4)),
    rank=st.integers(2, 4),
    tasks=st.integers(1, 6),
    sigma=st.floats(0, 1),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    inplace=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_layout_and_dtype(
    sizes: tuple[int, ...],
    rank: int,
    tasks: int,
    sigma: float,
    layout: str,
    dtype: torch.dtype,
    inplace: bool,
    seed: int,
) -> None:
    shape = sizes[:rank]
    layer, task = router(shape[1], tasks, sigma, seed, inplace=inplace), tasks_of(shape[0], tasks, seed)
    x = LAYOUTS[layout](torch.randn(shape, generator=generator(seed)).to(dtype))
    expected = masked(x, layer.get_unit_mapping(), task)
    with poisoned_memory():
        y = layer(x, task)
    assert y.dtype == dtype and torch.equal(y, expected) and (y is x) == inplace


def test_gradcheck() -> None:
    layer = router()
    for inplace in (False, True):
        layer.inplace = inplace
        gradcheck(lambda x, task: {"y": layer(x.sin(), task).cos()}, case((3, 8, 2)))
    layer.inplace, x = False, torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: layer(t, 3).square(), x)


def test_permuting_samples_with_their_tasks() -> None:
    layer, order = router(), torch.tensor([2, 0, 3, 1])
    before = evaluate(lambda x, task: {"y": layer(x, task)}, case())
    after = evaluate(lambda x, task: {"y": layer(x, task)}, case().select("b", order))
    for name in ("y", "dx"):
        assert torch.equal(after[name], before[name][order])  # type: ignore[index, arg-type]


def test_a_batch_of_tasks_is_its_tasks_one_by_one() -> None:
    layer, x, tasks = router(), torch.randn(7, 8, 3), tasks_of(7)
    y = layer(x, tasks)
    for b, task in enumerate(tasks.tolist()):
        assert torch.equal(y[b : b + 1], layer(x[b : b + 1], task))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("make", [
    lambda: TaskRouter(8, 5, 3), lambda: TaskRouter(8, 5, 3, inplace=True), lambda: TaskRouter(8, 5, 3, axis=-1),
    lambda: fastroute.RoutedLinear(8, 8, output_router=TaskRouter(8, 5, 3)),
    lambda: fastroute.live(nn.Sequential(nn.Linear(8, 8), TaskRouter(8, 5, 3), nn.ReLU(), nn.Linear(8, 3))),
    lambda: fastroute.VGG(nn.Sequential(nn.Conv2d(8, 8, 1), TaskRouter(8, 5, 3), nn.ReLU()), 5, True, 0, (1, 1)),
])  # fmt: skip
def test_one_task_with_an_axis_is_that_of_all(make: Any, compiled: bool) -> None:
    """[1] is what ones(B) times it is, wherever a task is given; any other number of tasks has to be B."""
    layer = make()
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer
    for B in (1, 4):
        x = torch.randn(B, 8, 1, 1) if isinstance(layer, fastroute.VGG) else torch.randn(B, 8)
        for task in (3, 1):
            expected = layer(x.clone(), task)
            given = torch.tensor([task])
            torch.testing.assert_close(run(x.clone(), given), expected)
            if not isinstance(layer, fastroute.RoutedLinear):
                set_task(layer, given)
                assert torch.equal(layer.active_task, given)
                torch.testing.assert_close(run(x.clone()), expected)
        with pytest.raises(ValueError, match="task: expected"):
            layer(x.clone(), torch.tensor([0, 1, 2]))


def test_masking_is_deleting() -> None:
    """What follows sees the units of the task alone: as if the others were not there."""
    layer, head, x = router(), nn.Linear(8, 3).double(), torch.randn(4, 8, dtype=torch.float64)
    for task in range(T):
        live = layer.get_unit_mapping()[task].bool()
        slim = nn.functional.linear(x[:, live], head.weight[:, live], head.bias)
        assert_same(head(layer(x, task)).detach(), slim.detach())
        (dw,) = torch.autograd.grad(head(layer(x, task)).sum(), head.weight)
        assert (dw[:, ~live] == 0).all() and (dw[:, live] != 0).all()


def test_nothing_comes_through_a_closed_unit() -> None:
    layer, x = router(), torch.randn(4, 8, 3)
    closed = layer.get_unit_mapping()[1] == 0
    expected = layer(x, 1)
    x[:, closed] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert torch.equal(layer(x, 1), expected)


def test_in_place() -> None:
    """Autograd knows: what saved x complains, and a leaf is refused; without gradients x is written to."""
    layer, x = router(inplace=True), torch.randn(4, 8)
    kept = x.clone()
    assert layer(x, 1) is x and torch.equal(x, masked(kept, layer.get_unit_mapping(), 1))
    saved = (kept.clone().requires_grad_() * 1).exp()
    out = layer(saved, 1).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    with pytest.raises(ValueError, match="leaf that requires grad"):
        layer(kept.clone().requires_grad_(), 1)


def test_vmap_over_tasks() -> None:
    for inplace in (False, True):
        layer, x = router(inplace=inplace), torch.randn(3, 8, 2)
        kept = x.clone()
        y = torch.vmap(lambda t, layer=layer, x=x: layer(x, t))(torch.arange(T))
        assert torch.equal(x, kept)
        for task in range(T):
            assert torch.equal(y[task], masked(x, layer.get_unit_mapping(), task))
        grads = torch.vmap(torch.func.grad(lambda x, t, layer=layer: layer(x * 1, t).sum()), (None, 0))(
            x, torch.arange(T)
        )
        assert torch.equal(grads, layer.get_unit_mapping()[:, None, :, None].expand(T, 3, 8, 2))


def test_autocast_and_half_models() -> None:
    layer, x = router(), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(nn.Linear(8, 8)(x), 1)
    assert y.dtype == torch.bfloat16
    for dtype in DTYPES:
        cast = copy.deepcopy(layer).to(dtype)
        assert cast.get_unit_mapping().dtype == dtype
        assert torch.equal(cast(x, 1), layer(x, 1)) and torch.equal(cast(x.to(dtype), 1), layer(x.to(dtype), 1))


def test_explain() -> None:
    (decision,) = fastroute.explain(router(), torch.randn(2, 8, 3))
    assert decision.case.op == "task_mask"


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_both_ways() -> None:
    source, target = router(seed=1), router(seed=2)
    assert not torch.equal(source.get_unit_mapping(), target.get_unit_mapping())
    stored = io.BytesIO()
    torch.save(source.state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    upstream = nn.Module()
    upstream._unit_mapping = nn.Parameter(torch.zeros(T, 8))
    upstream.load_state_dict(state, strict=True)
    for found in (state, upstream.state_dict(), dict(upstream.named_parameters()), upstream.state_dict(keep_vars=True)):
        for assign in (False, True):
            target = router(seed=2)
            target.load_state_dict(found, strict=True, assign=assign)
            assert torch.equal(target.get_unit_mapping(), source.get_unit_mapping())
            assert list(target.state_dict()) == ["_unit_mapping"] and not list(target.parameters())


def test_checkpoints_without_masks() -> None:
    """With no unit off there is none in either's state dict."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), TaskRouter(8, 4, 0))
    state = {"0.weight": torch.zeros(8, 3, 1, 1), "0.bias": torch.zeros(8)}
    model.load_state_dict(state, strict=True)
    assert list(model.state_dict()) == list(state)
    assert (model[1].get_unit_mapping() == 1).all()  # type: ignore[operator]


REFUSED = [
    ({"0._unit_mapping": torch.ones(4, 8)}, r"0._unit_mapping: expected masks \[5, 8\] \(tasks, units\), got \[4, 8\]"),
    ({"0._unit_mapping": torch.ones(5, 8, 1)}, r"got \[5, 8, 1\] from the checkpoint"),
    ({"0._unit_mapping": torch.full((5, 8), 0.95)}, "expected masks of zeros and ones, got other numbers"),
    ({"0._unit_mapping": torch.full((5, 8), torch.nan)}, "expected masks of zeros and ones"),
    ({}, 'Missing key.*"0._unit_mapping"'),
    ({"0._unit_mapping": torch.ones(5, 8), "0.other": torch.ones(1)}, 'Unexpected key.*"0.other"'),
]


@pytest.mark.parametrize(("state", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_checkpoints_that_do_not_fit(state: dict[str, Tensor], message: str) -> None:
    model = nn.Sequential(router())
    before = model[0].get_unit_mapping().clone()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    if "0.other" not in state:
        assert torch.equal(model[0].get_unit_mapping(), before)  # type: ignore[operator]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied: Any) -> None:
    layer = router()
    layer.set_active_task(2)
    other = copied(layer)
    other.set_active_task(3)
    x = torch.randn(2, 8)
    assert layer.active_task == 2 and other.active_task == 3
    assert torch.equal(layer(x), layer(x, 2)) and torch.equal(other(x), layer(x, 3))


def test_meta() -> None:
    """Made without memory, then given some and its masks: the active task follows."""
    layer = TaskRouter(8, T, 0.5, device="meta")
    layer.set_active_task(3)
    source, x = router(), torch.randn(2, 8)
    assert layer(x.to("meta")).device.type == "meta"
    for made in (copy.deepcopy(layer).to_empty(device="cpu"), copy.deepcopy(layer)):
        made.load_state_dict(source.state_dict(), assign=True)
        assert made.active_task == 3 and torch.equal(made(x), source(x, 3))
        assert made._active_id.device.type == "cpu" and int(made._active_id) == 3


# ------------------------------------------------------------------------------------------------------ active tasks


def test_the_active_task() -> None:
    layer, x = router(), torch.randn(4, 8, 3)
    assert layer.active_task == 0 and torch.equal(layer(x), layer(x, 0))
    assert layer.set_active_task(3) == 3 and layer.active_task == 3
    assert torch.equal(layer(x), layer(x, 3)) and torch.equal(layer(x, 1), masked(x, layer.get_unit_mapping(), 1))
    layer.active_task = np.int64(2)
    assert layer.active_task == 2 and torch.equal(layer(x), layer(x, 2))
    for tasks in (torch.tensor(4), tasks_of(4), tasks_of(4).to(torch.uint8)):
        assert layer.set_active_task(tasks) is tasks and layer.active_task is tasks
        assert torch.equal(layer(x), layer(x, tasks.long()))
    layer.use_routing = False
    assert layer(x) is x


def test_a_switch_between_forward_and_backward() -> None:
    """Losses of several tasks, then one backward pass: each has the mask it was computed with."""
    model, x = small_vgg().double(), images().double()
    total = torch.zeros((), dtype=torch.float64)
    for task in range(T):
        set_task(model, task)
        total = total + model(x).square().sum()
    together = torch.autograd.grad(total, list(model.features.parameters()))
    alone = [torch.autograd.grad(model(x, task).square().sum(), list(model.features.parameters())) for task in range(T)]
    for got, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert_same(got, torch.stack(parts).sum(0))


def test_set_task_and_the_apply_idiom() -> None:
    def change(m: Any) -> None:
        if hasattr(m, "active_task"):
            m.set_active_task(task)

    x = images()
    for task in (3, torch.tensor(1), tasks_of(6), 0):
        models: list[Any] = [small_vgg() for _ in range(4)]
        for m in models[1:]:  # masks are NumPy's
            m.load_state_dict(models[0].state_dict())
        set_task(models[0], task)
        models[1].apply(change)
        models[2].set_active_task(task)
        expected = models[3](x, task)
        for m in models[:3]:
            assert all(r.active_task is task for r in m.modules() if isinstance(r, TaskRouter))
            assert m.active_task is task and torch.equal(m(x), expected)
    shared = router()
    set_task(nn.ModuleDict({"a": nn.Sequential(shared), "b": shared}), 4)
    assert shared.active_task == 4


def test_set_task_reaches_what_users_wrote() -> None:
    class Own(nn.Module):
        active_task = 0

        def set_active_task(self, task: int) -> None:
            self.active_task = task

    model = nn.Sequential(Own(), router())
    set_task(model, 2)
    assert model[0].active_task == model[1].active_task == 2


def test_in_inference_mode() -> None:
    """A task set there is still good for training under torch.compile."""
    layer, x = router(), torch.randn(2, 8, requires_grad=True)
    with torch.inference_mode():
        layer.set_active_task(1)
        layer(torch.randn(2, 8))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert torch.equal(x.grad, masked(torch.ones(2, 8), layer.get_unit_mapping(), 1))  # type: ignore[arg-type]
