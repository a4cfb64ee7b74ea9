"""``task_mask`` and ``batch_norm_mask_relu`` on the backends this process has, against the definition."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastroute
from fastroute import functional, use_backend
from fastroute.ops.batch_norm_mask_relu import plain as batch_norm_plain
from fastroute.ops.batch_norm_mask_relu import reference as batch_norm_mask_relu_reference
from fastroute.ops.task_mask import reference as reference
from tests.helpers import seeds, strategies
from tests.helpers.backends import HERE, each_backend, needs_native
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.layouts import Fenced
from tests.helpers.opcheck import assert_all_same, assert_same, check_compiled, check_exported, gradcheck

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
each_dtype = pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=lambda d: str(d).removeprefix("torch."))
each_relu = pytest.mark.parametrize("relu", [False, True], ids=["mask", "relu"])
each_place = pytest.mark.parametrize("inplace", [False, True], ids=["out", "inplace"])
T = 7


def random_mapping(C: int, tasks: int = T, seed: int = 0) -> Tensor:
    return (torch.rand(tasks, C, generator=seeds.generator(seed)) < 0.5).float()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=seeds.generator(seed), dtype=F64).to(dtype)


def some_tasks(kind: str, B: int, seed: int = 0) -> int | Tensor:
    if kind == "int":
        return 3
    if kind == "scalar":
        return torch.tensor(3)
    tasks = torch.randint(0, T, (B,), generator=seeds.generator(seed))
    return tasks.int() if kind == "int32" else tasks


each_kind = pytest.mark.parametrize("kind", ["int", "scalar", "each", "int32"])


# ---------------------------------------------------------------------------------------------------- how x may lie


def channels_last(t: Tensor) -> Tensor:
    """The channel axis stored last, at any rank."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def gappy(t: Tensor) -> Tensor:
    """Samples and channels out of a larger tensor, NaN between."""
    wide = t.new_full((t.shape[0], 2 * t.shape[1] + 1, *t.shape[2:]), math.nan)
    wide[:, 1::2] = t
    return wide[:, 1::2]


def cropped(t: Tensor) -> Tensor:
    """A window of a larger picture, NaN around it."""
    if t.dim() < 3:
        return gappy(t)
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def cropped_last(t: Tensor) -> Tensor:
    return cropped(t.movedim(1, -1)).movedim(-1, 1)


def turned(t: Tensor) -> Tensor:
    """Axes stored in the opposite order."""
    axes = tuple(reversed(range(t.dim())))
    return t.permute(axes).contiguous().permute(axes)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (torch.Tensor.contiguous, channels_last, gappy, cropped, cropped_last, turned)
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)

#: [B, C, ...]: below, at and beyond vectors; planes of one element; empty ones; more threads' worth in the last two.
SHAPES = (
    (3, 5), (1, 1), (2, 17, 1), (4, 33), (2, 3, 7), (2, 16, 4, 4), (3, 19, 5, 3), (1, 2, 3, 2, 5), (0, 4, 3), (2, 4, 0),
    (2, 0, 3), (5, 40, 31, 33), (300, 1030),
)  # fmt: skip
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def expected_mask(x: Tensor, mapping: Tensor, task: int | Tensor, relu: bool) -> Tensor:
    """Sample by sample, by indexing."""
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        t = int(task[b] if isinstance(task, Tensor) and task.dim() else task)
        channels = mapping[t] > 0.5
        y[b, channels] = x[b, channels].relu() if relu else x[b, channels]
    return y


@each_backend
@each_dtype
@each_relu
@each_place
@each_shape
def test_values(backend: str, dtype: torch.dtype, relu: bool, inplace: bool, shape: tuple[int, ...]) -> None:
    mapping, x = random_mapping(shape[1]), randn(*shape, dtype=dtype)
    for kind in ("int", "each"):
        task = some_tasks(kind, shape[0])
        given = x.clone()
        with use_backend(backend):
            y = functional.task_mask(given, mapping, task, relu=relu, inplace=inplace)
        assert y.dtype == dtype and torch.equal(y, expected_mask(x, mapping, task, relu))
        assert (y is given) == inplace and (inplace or torch.equal(given, x))


@each_backend
@each_layout
@each_kind
@each_relu
def test_layouts(backend: str, layout: Callable[[Tensor], Tensor], kind: str, relu: bool) -> None:
    """Any strides, forward and backward, in place or not; y lies as x does."""
    for shape in ((3, 5), (2, 19, 6), (3, 17, 5, 4), (2, 4, 3, 2, 3)):
        x, g = layout(randn(*shape)), randn(*shape, seed=1)
        mapping, task = random_mapping(shape[1]), some_tasks(kind, shape[0])
        exact = expected_mask(x, mapping, task, relu)
        slope = expected_mask(torch.where((exact > 0) | (not relu), g, 0), mapping, task, False)
        with use_backend(backend):
            leaf = x.detach().requires_grad_()
            y = functional.task_mask(leaf, mapping, task, relu=relu)
            assert torch.equal(y, exact) and y.stride() == torch.empty_like(x).stride()
            for grad in (g, layout(g), channels_last(g)):
                assert torch.equal(torch.autograd.grad(y, leaf, grad, retain_graph=True)[0], slope)
            uniform = torch.ones(()).expand(shape)  # what comes from a sum
            (ones,) = torch.autograd.grad(y, leaf, uniform)
            assert torch.equal(
                ones, expected_mask(((exact > 0) | (not relu)).float().expand(shape), mapping, task, False)
            )
            overwritten = layout(randn(*shape))
            assert functional.task_mask(overwritten, mapping, task, relu=relu, inplace=True) is overwritten
            assert torch.equal(overwritten, exact) and overwritten.stride() == x.stride()


@each_backend
@hypothesis.given(data=st.data())
def test_any_call(backend: str, data: st.DataObject) -> None:
    sizes = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 33, 70]))
    shape = tuple(data.draw(st.lists(sizes, min_size=2, max_size=5)))
    hypothesis.assume(math.prod(shape) < 40_000)
    tasks, seed = data.draw(st.integers(1, 9)), data.draw(strategies.seeds)
    mapping = (torch.rand(tasks, shape[1], generator=seeds.generator(seed)) < data.draw(
        st.sampled_from([0.0, 0.2, 0.5, 1.0]))).to(data.draw(st.sampled_from([F32, BF16, torch.bool])))  # fmt: skip
    task: int | Tensor = data.draw(st.integers(0, tasks - 1))
    if data.draw(st.booleans()):
        task = torch.randint(0, tasks, shape[:1], generator=seeds.generator(seed))
    x = randn(*shape, seed=seed, dtype=data.draw(strategies.dtypes(F32, F64, BF16)))
    x = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](x)
    relu, inplace = data.draw(st.booleans()), data.draw(st.booleans())
    exact = expected_mask(x, mapping, task, relu)
    with use_backend(backend):
        assert torch.equal(functional.task_mask(x, mapping, task, relu=relu, inplace=inplace), exact)


@each_backend
@each_dtype
@each_relu
@each_place
def test_dead_channels_are_not_looked_at(backend: str, dtype: torch.dtype, relu: bool, inplace: bool) -> None:
    """Zeros for NaN and infinity, forward and backward; what is not a number stays in its live channel."""
    mapping = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    for shape in ((2, 4, 20), (2, 4), (2, 4, 3, 3)):
        for bad in (math.nan, math.inf, -math.inf):
            for layout in (torch.Tensor.contiguous, channels_last):
                x = layout(randn(*shape, dtype=dtype))
                x[:, 1] = bad
                x[0, 0] = bad
                leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
                with use_backend(backend):
                    y = functional.task_mask(leaf * 1 if inplace else leaf, mapping, 0, relu=relu, inplace=inplace)
                    grad = torch.full_like(y, math.nan)
                    grad[:, [0, 2]] = 1
                    (slope,) = torch.autograd.grad(y, leaf, grad)
                assert not y[:, [1, 3]].any() and not slope[:, [1, 3]].any()
                want = x[0, 0].relu() if relu else x[0, 0]
                assert torch.equal(y[0, 0].nan_to_num(7.0), want.nan_to_num(7.0))
                assert y[1, 0].isfinite().all() and y[:, 2].isfinite().all()


@each_backend
def test_zero_is_positive(backend: str) -> None:
    """No -0.0 in dead channels, which would show in a reciprocal."""
    x = -torch.ones(2, 4, 40)
    with use_backend(backend):
        for relu in (False, True):
            y = functional.task_mask(x, torch.zeros(1, 4), 0, relu=relu)
            assert not y.signbit().any()


@each_backend
@each_relu
def test_half_precision_dtypes(backend: str, relu: bool) -> None:
    """The reference takes every floating dtype; others say which they do not."""
    x, mapping = randn(2, 5, 9, dtype=F16), random_mapping(5)
    with use_backend("auto" if backend == "native" else backend):
        assert torch.equal(functional.task_mask(x, mapping, 2, relu=relu), expected_mask(x, mapping, 2, relu))
    if backend == "native":
        with use_backend(backend), pytest.raises(fastroute.BackendUnavailable, match="float16"):
            functional.task_mask(x, mapping, 2)


# -------------------------------------------------------------------------------------------------------- gradients


def case_of(shape: tuple[int, ...], task: int | Tensor, seed: int = 0) -> Case:
    letters = "bcdhw"[: len(shape)]
    return Case({"x": randn(*shape, seed=seed, dtype=F64)}, {"y": randn(*shape, seed=seed + 1, dtype=F64)},
                {"x": letters, "y": letters}, ("x",))  # fmt: skip


@each_backend
@pytest.mark.parametrize("kind", ["int", "each"])
@each_relu
@each_place
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, cropped])
def test_gradcheck(backend: str, kind: str, relu: bool, inplace: bool, layout: Callable[[Tensor], Tensor]) -> None:
    task, mapping = some_tasks(kind, 3), random_mapping(4)
    case = case_of((3, 4, 2, 3), task)

    def call(x: Tensor) -> dict[str, Tensor]:
        return {"y": functional.task_mask(layout(x * 1), mapping, task, relu=relu, inplace=inplace)}

    with use_backend(backend):
        gradcheck(call, case)


@each_backend
@each_relu
def test_second_derivative(backend: str, relu: bool) -> None:
    mapping, x = random_mapping(4), randn(3, 4, 5, dtype=F64).requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradgradcheck(lambda x: functional.task_mask(x, mapping, 1, relu=relu).square(), x)


@each_backend
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_in_place_of_a_view_whose_memory_is_negated(learns: bool, relu: bool, backend: str) -> None:
    """As of any other: what is kept is kept, in the memory of the view, too."""
    z, mapping = torch.randn(4, 3, dtype=torch.complex64), torch.tensor([[1.0, 1, 0], [0, 1, 1]])
    leaf = z.clone().requires_grad_(learns)
    memory = leaf * 1
    x = memory.conj().imag
    assert x.is_neg()
    with use_backend(backend):
        expected = functional.task_mask(x.clone(), mapping, 1, relu=relu)
        y = functional.task_mask(x, mapping, 1, relu=relu, inplace=True)
    assert y is x and torch.equal(x, expected) and torch.equal(memory.imag, -expected)
    if learns:
        y.sum().backward()
        alive = (expected != 0).float()
        assert torch.equal(leaf.grad.imag, -alive) and not leaf.grad.real.any()  # type: ignore[union-attr]


@each_backend
@each_relu
def test_in_place_is_known_to_autograd(backend: str, relu: bool) -> None:
    mapping, leaf = random_mapping(4), randn(3, 4, 5).requires_grad_()
    with use_backend(backend):
        saved = (leaf * 1).exp()
        functional.task_mask(saved, mapping, 1, relu=relu, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()
        plain, kept = torch.randn(3, 4), randn(3, 4).requires_grad_()
        for x in (plain, kept * 1):
            before = x._version
            assert functional.task_mask(x, mapping, 1, relu=relu, inplace=True)._version > before
        with pytest.raises(ValueError, match=r"^x: .*leaf that requires grad"):
            functional.task_mask(leaf, mapping, 1, relu=relu, inplace=True)
        with torch.no_grad():
            assert functional.task_mask(leaf, mapping, 1, inplace=True, relu=relu) is leaf
        with pytest.raises(ValueError, match=r"^x: .*expanded"):
            functional.task_mask(torch.ones(1, 4).expand(3, 4), mapping, 1, inplace=True)
        with torch.inference_mode():
            x = torch.ones(2, 4)
            assert torch.equal(functional.task_mask(x, mapping, 1, inplace=True, relu=relu), mapping[[1, 1]])
        base = randn(3, 8, 5).requires_grad_() * 1
        part = base[:, ::2]  # a view: its base's gradient is rebased
        functional.task_mask(part, mapping, 1, relu=relu, inplace=True)
        base.sum().backward()


def test_a_mapping_has_no_gradient() -> None:
    """Upstream's is a Parameter."""
    mapping = nn.Parameter(random_mapping(4))
    x = randn(2, 4).requires_grad_()
    functional.task_mask(x, mapping, 1).sum().backward()
    assert mapping.grad is None and torch.equal(x.grad, mapping[1].expand(2, 4))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- batch normalisation


def bn_case(shape: tuple[int, ...], dtype: torch.dtype = F64, seed: int = 0, affine: bool = True) -> Case:
    letters, C = "bcdhw"[: len(shape)], shape[1]
    inputs = {
        "x": randn(*shape, seed=seed, dtype=F64) * 1.5 + 0.7,
        "weight": randn(C, seed=seed + 2, dtype=F64) if affine else None,
        "bias": randn(C, seed=seed + 3, dtype=F64) if affine else None,
        "running_mean": randn(C, seed=seed + 4, dtype=F64), "running_var": randn(C, seed=seed + 5, dtype=F64).exp(),
    }  # fmt: skip
    axes = {"x": letters, "y": letters, **{k: "c" for k in inputs if k != "x"}, "mean": "c", "var": "c"}
    made = Case(inputs, {"y": randn(*shape, seed=seed + 1, dtype=F64)}, axes, ("x", "weight", "bias"))
    return made.to(dtype)


def bn_op(backend: str, mapping: Tensor, task: int | Tensor, training: bool, **options: Any) -> Any:
    def call(x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> dict[str, Tensor]:
        running = running_mean.clone(), running_var.clone()
        with use_backend(backend):
            y = functional.batch_norm_mask_relu(
                x, mapping, task, *running, weight, bias, training, 0.1, 1e-5, **options
            )
        return {"y": y, "mean": running[0], "var": running[1]}

    return call


def bn_truth(mapping: Tensor, task: int | Tensor, training: bool, **options: Any) -> Any:
    def call(x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> dict[str, Tensor]:
        running = running_mean.clone(), running_var.clone()
        y = batch_norm_mask_relu_reference.batch_norm_mask_relu(
            x, mapping, task, *running, weight, bias, training, 0.1, 1e-5, **options
        )
        return {"y": y, "mean": running[0], "var": running[1]}

    return call


BN_SHAPES = ((6, 5), (4, 3, 17), (3, 19, 5, 3), (2, 6, 3, 2, 5), (5, 16, 33, 8))


@each_backend
@each_dtype
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", BN_SHAPES, ids=lambda s: "x".join(map(str, s)))
@each_relu
def test_batch_norm(backend: str, dtype: torch.dtype, training: bool, shape: tuple[int, ...], relu: bool) -> None:
    mapping = random_mapping(shape[1])
    for kind in ("int", "each"):
        task = some_tasks(kind, shape[0])
        fn, truth = (partial(f, mapping=mapping, task=task, training=training, relu=relu) for f in (bn_op, bn_truth))
        cases = [bn_case(shape, dtype, seed) for seed in range(2)]
        if dtype == F64:
            found, exact = evaluate(fn(backend), cases[0]), evaluate(truth(), cases[0])
            assert_all_same(found, exact)
        else:
            stored = dtype if backend == "reference" else None  # which makes y before it masks
            found = check(fn(backend), truth(), cases, dtype=dtype, stored=stored)
        dead = ~reference.over(reference.live(mapping, task if kind == "each" else None, 3), found["y"]).expand(shape)  # type: ignore[arg-type]
        assert not found["y"][dead].any()  # type: ignore[index]
        if kind == "int":
            assert not found["dx"][dead].any()  # type: ignore[index]
            for name in ("dweight", "dbias"):
                assert not found[name][mapping[3] == 0].any()  # type: ignore[index]


@each_backend
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, cropped])
def test_batch_norm_gradcheck(backend: str, training: bool, layout: Callable[[Tensor], Tensor]) -> None:
    task, mapping = torch.tensor([0, 2, 1, 2]), random_mapping(4)
    call = bn_op(backend, mapping, task, training)
    gradcheck(lambda x, **rest: {"y": call(layout(x), **rest)["y"]}, bn_case((4, 4, 2, 3)))


@each_backend
@each_layout
def test_batch_norm_layouts(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    for shape in ((6, 5), (4, 17, 5, 4)):
        mapping, task, case = random_mapping(shape[1]), some_tasks("each", shape[0]), bn_case(shape)
        exact = evaluate(bn_truth(mapping, task, True), case)
        call = bn_op(backend, mapping, task, True)
        found = evaluate(lambda x, call=call, **rest: call(layout(x), **rest), case)
        assert_all_same(found, exact)


@each_backend
def test_batch_norm_options(backend: str) -> None:
    """Without parameters, without running statistics, with only some gradients wanted, with momentum."""
    mapping, shape = random_mapping(5), (4, 5, 6)
    x, g = randn(*shape, dtype=F64), randn(*shape, dtype=F64, seed=1)
    for weight in (None, randn(5, dtype=F64)):
        for bias in (None, randn(5, dtype=F64, seed=3)):
            for wants_x, wants_p in ((True, False), (False, True), (True, True)):
                results = []
                for fn in (functional.batch_norm_mask_relu, batch_norm_mask_relu_reference.batch_norm_mask_relu):
                    leaf = x.clone().requires_grad_(wants_x)
                    p = [None if t is None else t.clone().requires_grad_(wants_p) for t in (weight, bias)]
                    with use_backend(backend):
                        y = fn(leaf, mapping, 1, None, None, *p, True, 0.3, 1e-3)  # type: ignore[operator]
                    ends = [t for t in (leaf, *p) if t is not None and t.requires_grad]
                    results.append([y, *(torch.autograd.grad(y, ends, g) if ends else ())])
                for a, b in zip(*results, strict=True):
                    assert_same(a.detach(), b.detach())


@each_backend
def test_batch_norm_in_half_precision_with_float_parameters(backend: str) -> None:
    mapping, shape = random_mapping(6), (4, 6, 7)
    fn, truth = bn_op(backend, mapping, 2, True), bn_truth(mapping, 2, True)
    case = bn_case(shape, F32)
    x, g = case.inputs["x"].bfloat16(), case.cotangents["y"].bfloat16()  # type: ignore[union-attr]
    case = Case({**case.inputs, "x": x}, {"y": g}, case.axes, case.wrt)
    found, expected = evaluate(fn, case), evaluate(truth, case)
    for name, t in expected.items():
        assert t is not None and found[name].dtype == t.dtype, name  # type: ignore[union-attr]
        assert (found[name] - t).norm() <= 2**-7 * t.norm(), name  # type: ignore[operator]  # bfloat16's spacing


@each_backend
def test_statistics_of_dead_channels(backend: str) -> None:
    """Running statistics are those of BatchNorm alone, whatever the task, over several steps."""
    plain, ours = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    mapping = random_mapping(5)
    for step in range(4):
        x = randn(3, 5, 4, 4, seed=step)
        plain(x)
        with use_backend(backend):
            functional.batch_norm_mask_relu(
                x, mapping, step, ours.running_mean, ours.running_var, ours.weight, ours.bias, True, 0.1, 1e-5
            )
    spacing = torch.finfo(F32).eps
    for a, b in ((ours.running_mean, plain.running_mean), (ours.running_var, plain.running_var)):
        assert a is not None and b is not None and (a - b).abs().max() <= 4 * spacing * b.abs().max()


@pytest.mark.parametrize("backend", [*HERE, "definition"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@each_relu
def test_batch_norm_is_moved_by_nothing_masked(backend: str, training: bool, layout: Any, relu: bool) -> None:
    """NaN and infinity in what is masked, and in its gradient: a gradient of zero there, elsewhere that without them.

    In training they count in a channel's statistics, which are then PyTorch's.
    """
    mapping = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 0, 1]])
    for shape, task in (((6, 5), 1), ((4, 5, 3, 6), 1), ((4, 5, 3, 6), torch.tensor([0, 1, 1, 0]))):
        tasks = task if isinstance(task, Tensor) else torch.tensor([task])
        live = reference.over(mapping[tasks] != 0, torch.empty(shape))
        reached = live.any(0, keepdim=True) if training else live
        case, results = bn_case(shape), []
        dead = reached.any(0).flatten(1)[:, 0].logical_not() if len(shape) > 2 else ~reached.any(0)
        for bad in (0.0, math.nan, math.inf):
            inputs = {**case.inputs, "x": layout(torch.where(reached, case.inputs["x"], bad))}
            if not training:  # as a step in training has left them
                for name in ("running_mean", "running_var"):
                    inputs[name] = torch.where(dead, bad, case.inputs[name])  # type: ignore[arg-type]
            g = torch.where(live, case.cotangents["y"], bad)
            call = (bn_truth(mapping, task, training, relu=relu) if backend == "definition"
                    else bn_op(backend, mapping, task, training, relu=relu))  # fmt: skip
            results.append(found := evaluate(call, Case(inputs, {"y": g}, case.axes, case.wrt)))
            assert not found["dx"][~reached.expand(shape)].any()  # type: ignore[index]
            for name in ("dweight", "dbias"):
                assert not found[name][dead].any(), name  # type: ignore[index]
            for name in ("y", "dx", "dweight", "dbias"):
                assert_same(found[name], results[0][name])
            if training:
                m, v = (case.inputs[name].clone() for name in ("running_mean", "running_var"))  # type: ignore[union-attr]
                torch.nn.functional.batch_norm(inputs["x"], m, v, None, None, True, 0.1)  # type: ignore[arg-type]
                torch.testing.assert_close((found["mean"], found["var"]), (m, v), equal_nan=True)


@pytest.mark.parametrize("first", ["alike", "far"])
@pytest.mark.parametrize("mean", [0, 100, -1000, 2**14])
@pytest.mark.parametrize(("backend", "layout", "shape"), [
    pytest.param(backend, layout, shape, id=f"{backend}-{name}-{shape}")
    for backend in HERE
    for name, layout in (("planes", torch.Tensor.contiguous), ("rows", channels_last))
    for shape in ((4, 3, 64), (64, 3), (300, 3, 4))
    # PyTorch's own sums over rows are one chain
    if backend != "reference" or (name == "planes" and len(shape) > 2)
])  # fmt: skip
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_batch_norm_of_large_means(
    backend: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], shape: tuple[int, ...], mean: int, first: str
) -> None:
    """Statistics keep their digits, and y is as near as that of PyTorch's two passes over contiguous channels, or
    nearer."""
    spacing = torch.finfo(dtype).eps
    apart = (randn(*shape) * 2**6).round() / 2**6  # so that all differences are exact
    if first == "far":
        apart[0, :, ...] = torch.where(
            torch.arange(apart[0].numel()).view(apart[0].shape) % apart[0, 0].numel() == 0, -float(mean), apart[0]
        )
    apart, dims = apart.double(), [d for d in range(len(shape)) if d != 1]
    x = layout((apart + mean).to(dtype)).requires_grad_()
    gain, bias = randn(3, dtype=dtype, seed=1), randn(3, dtype=dtype, seed=2)
    running = torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    with use_backend(backend):
        y = functional.batch_norm_mask_relu(x, torch.ones(1, 3), 0, *running, gain, bias, True, 1.0, 1e-5, relu=False)
    whole, count = (apart * 2**6).long(), apart.numel() // 3  # integers: both are exact
    total, squares = whole.sum(dims), (whole * whole).sum(dims)
    var = (count * squares - total * total).double() / (count * (count - 1) * 2**12)
    center = total.double() / (count * 2**6)
    roundings = 4 * count**0.5  # those of a sum are as a random walk
    if dtype == F64 and first == "far":  # but all go one way behind an outlier, in chains of at most 256
        roundings = max(roundings, min(count, 256) / 2)
    assert ((running[1] - var) / var).abs().max() <= spacing * roundings
    assert (running[0] - mean - center).abs().max() <= 2 * spacing * max(1, abs(mean))
    if dtype == F32:
        over = [1, 3] + [1] * (len(shape) - 2)
        biased = (var * (count - 1) / count).view(over)
        factor, term = (t.double().view(over) for t in (gain, bias))
        exact = (apart - center.view(over)) / (biased + 1e-5).sqrt() * factor + term
        plain = torch.nn.functional.batch_norm(x.contiguous(), None, None, gain, bias, True)
        assert (y - exact).norm() <= 1.05 * (plain - exact).norm() + spacing * exact.norm() / 4
        # what is rounded off the mean is not lost: of 2^14 it would be 2^-10
        if backend != "reference":
            assert (y - exact).abs().max() <= 2 * spacing * max(exact.abs().max(), 1)
            wide, g = x.detach().double().requires_grad_(), randn(*shape, seed=3)
            exact = torch.nn.functional.batch_norm(wide, None, None, gain.double(), bias.double(), True)
            (dx,), (exact,) = torch.autograd.grad(y, x, g), torch.autograd.grad(exact, wide, g.double())
            assert (dx - exact).norm() <= spacing * exact.norm()


@each_backend
def test_batch_norm_of_nothing(backend: str) -> None:
    """As ``batch_norm``: running statistics stay."""
    for shape in ((0, 3, 4), (2, 3, 0)):
        x, running = torch.zeros(shape).requires_grad_(), (torch.zeros(3), torch.ones(3))
        with use_backend(backend):
            y = functional.batch_norm_mask_relu(x, MAP, 0, *running, None, None, True, 0.1, 1e-5)
        y.sum().backward()
        assert y.shape == shape and not running[0].any() and running[1].all() and x.grad is not None


# --------------------------------------------------------------------------------------------------------------- laws


@each_backend
@each_relu
def test_samples_are_independent(backend: str, relu: bool) -> None:
    mapping, tasks, x = random_mapping(9), some_tasks("each", 6), randn(6, 9, 5)
    with use_backend(backend):
        y = functional.task_mask(x, mapping, tasks, relu=relu)
        order = torch.randperm(6, generator=seeds.generator(0))
        assert torch.equal(functional.task_mask(x[order], mapping, tasks[order], relu=relu), y[order])  # type: ignore[index]
        parts = [functional.task_mask(x[b : b + 1], mapping, int(tasks[b]), relu=relu) for b in range(6)]  # type: ignore[index]
        assert torch.equal(torch.cat(parts), y)
        names = torch.randperm(T, generator=seeds.generator(1))
        assert torch.equal(functional.task_mask(x, mapping[names.argsort()], names[tasks], relu=relu), y)
        assert torch.equal(functional.task_mask(y, mapping, tasks, relu=relu), y)


@each_backend
def test_folded_into_the_affine_map(backend: str) -> None:
    """One task for all: BatchNorm with masked weight and bias, then ReLU, is the same function."""
    mapping, x = random_mapping(5), randn(4, 5, 6, dtype=F64)
    weight, bias = randn(5, dtype=F64, seed=1), randn(5, dtype=F64, seed=2)
    with use_backend(backend):
        y = functional.batch_norm_mask_relu(x, mapping, 2, None, None, weight, bias, True, 0.1, 1e-5)
    folded = torch.nn.functional.batch_norm(x, None, None, weight * mapping[2], bias * mapping[2], True).relu()
    assert_same(y, folded)


# ------------------------------------------------------------------------------------------------- what PyTorch expects


@pytest.fixture
def recompiles() -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@each_backend
@pytest.mark.parametrize(("kind", "inplace"), [("int", False), ("scalar", True)], ids=["int", "scalar in place"])
def test_twenty_tasks_are_one_graph(backend: str, inplace: bool, kind: str, recompiles: Any) -> None:
    """A task tensor is one graph; an int costs a second one, the first time it changes, and no more."""
    mapping, x = random_mapping(5, 20), randn(3, 5, 4)

    def call(x: Tensor, task: int | Tensor) -> Tensor:
        return functional.task_mask(x * 2, mapping, task, relu=True, inplace=inplace).square()

    with use_backend(backend):
        compiled = torch.compile(call, fullgraph=True, backend=recompiles)
        for t in range(20):
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            for leaf, fn in zip(leaves, (call, compiled), strict=True):
                fn(leaf, t if kind == "int" else torch.tensor(t)).sum().backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)  # type: ignore[arg-type]
    assert recompiles.frame_count == (1 if kind == "scalar" else 2)


@each_backend
@pytest.mark.parametrize(("relu", "inplace"), [(True, False), (False, True)], ids=["relu", "in place"])
def test_compile(backend: str, relu: bool, inplace: bool) -> None:
    mapping = random_mapping(5)
    calls = [(randn(B, 5, 4, seed=B, dtype=F64).requires_grad_(), some_tasks("each", B)) for B in (6, 3, 9)]

    def call(x: Tensor, tasks: Tensor) -> Tensor:
        return functional.task_mask(x * 1, mapping, tasks, relu=relu, inplace=inplace)

    with use_backend(backend):
        check_compiled(call, calls)


@each_backend
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.long)], ids=["train", "eval"])
def test_compile_batch_norm(backend: str, training: bool, recompiles: Any) -> None:
    mapping = random_mapping(5)
    norm = nn.BatchNorm1d(5).double().train(training)
    other = copy.deepcopy(norm)

    def call(x: Tensor, tasks: Tensor, norm: nn.BatchNorm1d) -> Tensor:
        return functional.batch_norm_mask_relu(
            x, mapping, tasks, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, 0.1, 1e-5
        )

    with use_backend(backend):
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=recompiles)
        for B in (4, 7, 5):
            x, tasks = randn(B, 5, 6, seed=B, dtype=F64), some_tasks("each", B)
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            for leaf, fn, n in zip(leaves, (call, compiled), (norm, other), strict=True):
                fn(leaf, tasks, n).square().sum().backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)  # type: ignore[arg-type]
        assert recompiles.frame_count == 1
    for name, t in norm.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name


class Masked(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.register_buffer("mapping", random_mapping(5))
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        x = functional.task_mask(x * 1, self.mapping, 2, inplace=self.inplace)  # type: ignore[arg-type]
        return functional.batch_norm_mask_relu(
            x,
            self.mapping,
            x[:, 0, 0].long() * 0 + 1,
            n.running_mean,
            n.running_var,  # type: ignore[arg-type]
            n.weight,
            n.bias,
            n.training,
            0.1,
            n.eps,
        )


@each_backend
@each_place
def test_export(backend: str, inplace: bool) -> None:
    example, *others = [randn(B, 5, 4, seed=B) for B in (6, 2, 33)]
    with use_backend(backend):
        check_exported(Masked(inplace).eval(), example, others, {0: torch.export.Dim("batch", min=2)})


@each_backend
@each_relu
def test_vmap(backend: str, relu: bool) -> None:
    """Over tasks, over inputs, over both, and of gradients."""
    mapping, x = random_mapping(5), randn(3, 5, 4)
    many, each = randn(T, 3, 5, 4, seed=1), torch.randint(0, T, (T, 3), generator=seeds.generator(0))
    fn = partial(functional.task_mask, relu=relu)
    with use_backend(backend):
        for axes, *given in (
            ((None, 0), x, torch.arange(T)), ((0, 0), many, torch.arange(T)), ((0, None), many, 2),
            ((None, 0), x, each), ((0, None), many, each[0]), ((1, 0), many.movedim(0, 1), each),
            ((0, None), many, torch.tensor(2)),
        ):  # fmt: skip
            found = torch.vmap(lambda x, t: fn(x, mapping, t), axes)(*given)
            rows = [
                [a.select(i, k) if i is not None else a for a, i in zip(given, axes, strict=True)] for k in range(T)
            ]  # type: ignore[union-attr]
            assert torch.equal(found, torch.stack([fn(x, mapping, t) for x, t in rows]))

            def loss(x: Tensor, t: Any) -> Tensor:
                return fn(x, mapping, t).sin().sum()

            grads = torch.vmap(torch.func.grad(loss), axes)(*given)
            assert torch.equal(grads, torch.stack([torch.func.grad(loss)(x, t) for x, t in rows]))


def test_vmap_over_mappings() -> None:
    mappings = (torch.rand(3, 2, 4, generator=seeds.generator(0)) < 0.5).float()
    found = torch.vmap(lambda m: functional.task_mask(torch.ones(2, 4), m, 1))(mappings)
    assert torch.equal(found, mappings[:, 1:].expand(3, 2, 4))


def test_explain() -> None:
    mapping = random_mapping(5)
    for backend in HERE:
        with use_backend(backend):
            for task in (1, torch.tensor(1), torch.tensor([1, 2])):
                made = fastroute.explain(lambda x, t=task: functional.task_mask(x, mapping, t), torch.randn(2, 5))
                assert [(d.backend, d.case.op) for d in made] == [(backend, "task_mask")]


# ------------------------------------------------------------------------------------------------------------ bad input

X, MAP = torch.zeros(2, 3, 4), torch.ones(5, 3)


@each_backend
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x: .*floating-point.*int64"),
        ({"x": [1.0]}, TypeError, "x: .*got list"),
        ({"x": torch.zeros(3)}, ValueError, r"x: expected \[B, C, ...\], got \[3\]"),
        ({"mapping": None}, TypeError, "mapping: .*got NoneType"),
        ({"mapping": torch.ones(5, 4)}, ValueError, r"mapping: expected \[T, 3\].*\[2, 3, 4\].*got \[5, 4\]"),
        ({"mapping": torch.ones(3)}, ValueError, r"mapping: .*got \[3\]"),
        ({"mapping": torch.ones(0, 3)}, ValueError, r"mapping: .*got \[0, 3\]"),
        ({"mapping": torch.ones(5, 3, dtype=torch.complex64)}, TypeError, "mapping: .*complex"),
        ({"mapping": torch.ones(5, 3, device="meta")}, ValueError, "mapping: expected a tensor on cpu .*meta"),
        ({"task": 5}, IndexError, "task: expected a task from 0 to 4, got 5"),
        ({"task": -1}, IndexError, "task: expected a task from 0 to 4, got -1"),
        ({"task": torch.tensor(5)}, IndexError, "task: expected a task from 0 to 4, got 5"),
        ({"task": torch.tensor([0, 7])}, IndexError, "task: expected tasks from 0 to 4, got 1 of 2 .*0, the largest 7"),
        ({"task": torch.tensor([-1, 7])}, IndexError, "task: .*got 2 of 2 out of range, the smallest -1"),
        ({"task": 1.0}, TypeError, "task: expected an int, got 1.0"),
        ({"task": True}, TypeError, "task: expected an int, got True"),
        ({"task": torch.tensor(1.0)}, TypeError, "task: .*integer tensor, got torch.float32"),
        ({"task": torch.tensor([True, False])}, TypeError, "task: .*integer tensor, got torch.bool"),
        ({"task": torch.tensor([1, 1, 1])}, ValueError, r"task: .*shape \[2\], got \[3\]"),
        ({"task": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"task: .*shape \[2\], got \[2, 1\]"),
        ({"task": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "task: expected a tensor on cpu"),
    ],
)
def test_bad_input(backend: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": X, "mapping": MAP, "task": 0, **arguments}
    with use_backend(backend):
        for call in (
            lambda: functional.task_mask(**given),
            lambda: functional.task_mask(**given, inplace=True),
            lambda: functional.batch_norm_mask_relu(
                **given,
                running_mean=None,
                running_var=None,
                weight=None,
                bias=None,
                training=True,
                momentum=0.1,
                eps=1e-5,
            ),
        ):
            with pytest.raises(error, match="^" + message):
                call()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"running_mean": torch.zeros(2)}, ValueError, r"running_mean: expected shape \[3\]"),
        ({"running_var": torch.zeros(3)}, ValueError, "running_mean: expected a tensor .* with running_var, got None"),
        ({"running_mean": torch.zeros(3)}, ValueError, "running_var: expected a tensor .* with running_mean, got None"),
        ({"training": False}, ValueError, "running_mean: .* in evaluation, got None"),
        ({"weight": torch.zeros(3, 1)}, ValueError, r"weight: expected shape \[3\]"),
        ({"bias": torch.zeros(3, dtype=torch.int64)}, TypeError, "bias: .*floating-point"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "bias: expected a tensor on cpu"),
        ({"x": torch.zeros(1, 3)}, ValueError, "x: expected more than 1 value per channel"),
    ],
)
def test_bad_batch_norm_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": X, "mapping": MAP, "task": 0, "running_mean": None, "running_var": None,
                             "weight": None, "bias": None, "training": True, "momentum": 0.1, "eps": 1e-5}  # fmt: skip
    with pytest.raises(error, match="^" + message):
        functional.batch_norm_mask_relu(**{**given, **arguments})


@each_backend
@each_relu
def test_tasks_that_only_the_device_knows(backend: str, relu: bool) -> None:
    """Where nobody looks, as under torch.compile, a sample of no task is zero and gets a zero gradient."""
    mapping, x = torch.ones(2, 3), randn(4, 3, 5)
    tasks = torch.tensor([0, 2, -1, 2**40])
    compiled = torch.compile(
        lambda x, t: functional.task_mask(x, mapping, t, relu=relu), fullgraph=True, backend="aot_eager"
    )
    leaf = x.clone().requires_grad_()
    with use_backend(backend):
        y = compiled(leaf, tasks)
        y.sum().backward()
    assert torch.equal(y[0], x[0].relu() if relu else x[0]) and not y[1:].any()
    assert leaf.grad is not None and not leaf.grad[1:].any() and leaf.grad[0].any()


@each_backend
def test_writes_nothing_else(backend: str) -> None:
    for shape, last in (((3, 17, 7), False), ((3, 17, 7), True), ((5, 33), False)):
        fence = Fenced(randn(*((shape[0], shape[2], shape[1]) if last else shape)))
        x = fence.tensor.movedim(-1, 1) if last else fence.tensor
        with use_backend(backend):
            for relu in (False, True):
                functional.task_mask(x, random_mapping(shape[1]), some_tasks("each", shape[0]), relu=relu, inplace=True)
        assert fence.intact()


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, cropped], ids=lambda f: f.__name__)
def test_opcheck(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    """Schemas, fakes and what they say of mutation."""
    x, y, mapping = layout(randn(3, 5, 4, dtype=dtype)), layout(randn(3, 5, 4, seed=1, dtype=dtype)), random_mapping(5)
    fastroute_ops = torch.ops.fastroute

    def check_op(name: str, *args: Any) -> None:
        op = getattr(fastroute_ops, f"_{name}").default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))

    for tasks in (None, torch.tensor(2), torch.tensor([0, 2, 6])):
        task = mapping, tasks, 1
        check_op("task_mask_gate_native", x, None, *task)
        check_op("task_mask_gate_native", x, y, *task)
        check_op("task_mask_rectify_native", x, *task)
        check_op("task_mask_mask__native", x.clone(memory_format=torch.preserve_format), *task, True)
        if layout is cropped:
            continue
        running, parameters = (randn(5), randn(5).exp()), (randn(5, dtype=dtype), randn(5, dtype=dtype))
        for training in (True, False):
            check_op("batch_norm_mask_relu_native", x, *task, *running, *parameters, training, 0.1, 1e-5, True)
            scale = torch.ones(5 if training else 0, dtype=F64)
            check_op(
                "batch_norm_mask_relu_native_backward",
                y,
                x,
                None,
                *task,
                *running,
                *parameters,
                scale,
                scale,
                training,
                1e-5,
                True,
                True,
            )


def test_no_samples_written_out() -> None:
    """PyTorch's own gradient of a batch norm ends the process there."""
    x, ones = torch.empty(0, 4), torch.ones(4)
    args = (None, torch.ones(3, 4), None, 1, None, None, ones, ones, ones, ones, True, 1e-5, False, True)
    made = batch_norm_plain.batch_norm_backward(x, x, *args)
    assert made[0].shape == x.shape and all(torch.equal(t, torch.zeros(4)) for t in made[1:])
