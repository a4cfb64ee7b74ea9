"""The kernels of ``task_mask`` against the definition: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import functional, use_backend
from fastroute.ops.batch_norm_mask_relu import reference as batch_norm_mask_relu_reference
from fastroute.ops.task_mask import reference as reference
from tests.helpers import seeds
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.covering import in_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T = 7
each_relu = pytest.mark.parametrize("relu", [False, True], ids=["mask", "relu"])


@pytest.fixture(autouse=True)
def in_triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.fixture(params=[False, True], ids=["32-bit", "64-bit"])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastroute.kernels import task_mask

    monkeypatch.setattr(task_mask, "force_wide", request.param)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(shape, generator=seeds.generator(seed), dtype=torch.float64)
    return made.to(DEVICE, dtype)


def mapping_of(C: int) -> Tensor:
    return (torch.rand(T, C, generator=seeds.generator(0)) < 0.5).float().to(DEVICE)


def tasks_of(kind: str, B: int) -> int | Tensor:
    each = torch.randint(0, T, (B,), generator=seeds.generator(0))
    return {"int": 3, "scalar": torch.tensor(3).to(DEVICE), "each": each.to(DEVICE)}[kind]


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def gappy(t: Tensor) -> Tensor:
    """Channels of a larger tensor, NaN between."""
    wide = t.new_full((t.shape[0], 2 * t.shape[1] + 1, *t.shape[2:]), torch.nan)
    wide[:, 1::2] = t
    return wide[:, 1::2]


def cropped(t: Tensor) -> Tensor:
    """A window of a larger picture: no axis of positions joins the next."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), torch.nan)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


LAYOUTS = {f.__name__: f for f in (torch.Tensor.contiguous, channels_last, gappy, cropped)}
SHAPES = ((3, 5), (2, 4, 2100), (3, 17, 5, 4), (2, 300, 3, 3), (2, 3, 2, 3, 4), (0, 3, 2))


def fill(t: Tensor, value: float, mapping: Tensor, task: int | Tensor) -> Tensor:
    """t with its dead channels spoiled."""
    tasks = (task, 0) if isinstance(task, Tensor) else (None, task)
    return torch.where(reference.over(reference.live(mapping, *tasks), t), t, value)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kind", ["int", "scalar", "each"])
@each_relu
def test_values(shape: tuple[int, ...], kind: str, relu: bool, width: None) -> None:
    """Forward and backward; what is in dead channels is not looked at."""
    for layout in (torch.Tensor.contiguous, channels_last):
        mapping, task = mapping_of(shape[1]), tasks_of(kind, shape[0])
        x = layout(fill(randn(*shape), torch.nan, mapping, task))
        g = fill(randn(*shape, seed=1), torch.inf, mapping, task)
        leaf, other = x.requires_grad_(), x.detach().requires_grad_()
        y, exact = functional.task_mask(leaf, mapping, task, relu=relu), reference.task_mask(other, mapping, task, relu)
        assert torch.equal(y, exact) and y.stride() == torch.empty_like(x).stride()
        (dx,), (exact_dx,) = torch.autograd.grad(y, leaf, g), torch.autograd.grad(exact, other, g)
        assert torch.equal(dx, exact_dx)


@in_pairs(layout=LAYOUTS, dtype=[torch.float32, torch.bfloat16, torch.float16], relu={"mask": False, "relu": True})
def test_layouts(layout: Callable[[Tensor], Tensor], dtype: torch.dtype, relu: bool) -> None:
    mapping, task = mapping_of(6), tasks_of("each", 3)
    x = layout(randn(3, 6, 5, 4, dtype=dtype))
    exact = reference.task_mask(x, mapping, task, relu)
    y = functional.task_mask(x, mapping, task, relu=relu)
    assert torch.equal(y, exact) and y.dtype == dtype and y.stride() == torch.empty_like(x).stride()
    assert functional.task_mask(x, mapping, task, relu=relu, inplace=True) is x and torch.equal(x, exact)


def test_a_task_that_does_not_exist() -> None:
    """Zero, like its gradient: on a GPU nobody looks."""
    tasks, mapping, x = torch.tensor([1, T, -1, 2**40], device=DEVICE), mapping_of(5).fill_(1), randn(4, 5, 3)
    kernels = torch.ops.fastroute
    for made in (
        kernels._task_mask_gate_triton(x, None, mapping, tasks, 0),
        kernels._task_mask_rectify_triton(x, mapping, tasks, 0),
    ):
        assert made[0].any() and not made[1:].any()
        assert not kernels._task_mask_gate_triton(x, made, mapping, tasks, 0)[1:].any()


def norm_case(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Case:
    letters, C = "bcdhw"[: len(shape)], shape[1]
    inputs: dict[str, Tensor | None] = {
        "x": randn(*shape, seed=seed, dtype=torch.float64) * 1.5 + 0.7,
        "weight": randn(C, seed=seed + 2), "bias": randn(C, seed=seed + 3),
        "running_mean": randn(C, seed=seed + 4), "running_var": randn(C, seed=seed + 5).exp(),
    }  # fmt: skip
    axes = {"x": letters, "y": letters, **{k: "c" for k in inputs if k != "x"}, "mean": "c", "var": "c"}
    return Case(inputs, {"y": randn(*shape, seed=seed + 1)}, axes, ("x", "weight", "bias")).to(dtype)


def norm(fn: Any, mapping: Tensor, task: int | Tensor, training: bool, relu: bool) -> Any:
    def call(x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> dict[str, Tensor]:
        running = running_mean.clone(), running_var.clone()
        y = fn(x, mapping, task, *running, weight, bias, training, 0.1, 1e-5, relu=relu)
        return {"y": y, "mean": running[0], "var": running[1]}

    return call


@in_pairs(
    shape={"6x5": (6, 5), "3x7x5x3": (3, 7, 5, 3), "2x3x700": (2, 3, 700)}, training={"train": True, "eval": False},
    dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}, kind=["int", "each"],
)  # fmt: skip
def test_batch_norm(shape: tuple[int, ...], training: bool, dtype: torch.dtype, kind: str) -> None:
    mapping, task = mapping_of(shape[1]), tasks_of(kind, shape[0])
    for layout, relu in ((torch.Tensor.contiguous, True), (channels_last, False)):
        cases = [norm_case(shape, dtype, seed) for seed in range(3)]
        cases = [case.with_inputs(x=layout(case.inputs["x"])) for case in cases]  # type: ignore[arg-type]
        found = check(
            norm(functional.batch_norm_mask_relu, mapping, task, training, relu),
            norm(batch_norm_mask_relu_reference.batch_norm_mask_relu, mapping, task, training, relu),
            cases,
            dtype=dtype,
        )
        if kind == "int":
            for name in ("y", "dx"):
                assert not found[name][:, mapping[3] == 0].any()  # type: ignore[index]
            for name in ("dweight", "dbias"):
                assert not found[name][mapping[3] == 0].any()  # type: ignore[index]


def test_batch_norm_options() -> None:
    """No parameters, no running statistics, no gradient of x."""
    mapping, x, g = mapping_of(5), randn(4, 5, 6), randn(4, 5, 6, seed=1)
    spacing = torch.finfo(torch.float32).eps
    for weight in (None, randn(5, seed=2)):
        for wants_x in (True, False):
            results = []
            for fn in (functional.batch_norm_mask_relu, batch_norm_mask_relu_reference.batch_norm_mask_relu):
                leaf = x.clone().requires_grad_(wants_x)
                p = None if weight is None else weight.clone().requires_grad_()
                y = fn(leaf, mapping, 1, None, None, p, None, True, 0.1, 1e-5)  # type: ignore[operator]
                ends = [t for t in (leaf, p) if t is not None and t.requires_grad]
                results.append([y.detach(), *(torch.autograd.grad(y, ends, g) if ends else ())])
            for a, b in zip(*results, strict=True):
                assert (a - b).norm() <= 8 * spacing * b.norm()  # a handful of roundings


@pytest.mark.parametrize("first", [0.0, None], ids=["far", "alike"])
@pytest.mark.parametrize("shape", [(3, 3, 700), (300, 3, 5)], ids=str)
def test_batch_norm_of_large_means(shape: tuple[int, ...], first: float | None) -> None:
    """Statistics, y and gradients keep their digits, also where the shift of the sums is unlike the others."""
    spacing = torch.finfo(torch.float32).eps
    for layout in (torch.Tensor.contiguous, channels_last):
        x = randn(*shape) + 1000
        if first is not None:
            x[0, :, 0] = first
        x, running = layout(x).requires_grad_(), (torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE))
        y = functional.batch_norm_mask_relu(
            x, torch.ones(1, 3, device=DEVICE), 0, *running, None, None, True, 1.0, 1e-5, relu=False
        )
        var, mean = torch.var_mean(x.double(), (0, 2))
        assert ((running[1] - var) / var).abs().max() <= 32 * spacing
        assert (running[0] - mean).abs().max() <= 1000 * spacing
        wide, g = x.detach().double().requires_grad_(), randn(*shape, seed=1)
        exact = torch.nn.functional.batch_norm(wide, None, None, None, None, True)
        allowed = 17 * spacing  # half of var's 32, and a rounding
        assert ((y - exact).norm(dim=(0, 2)) <= allowed * exact.norm(dim=(0, 2))).all()
        (dx,), (exact,) = torch.autograd.grad(y, x, g), torch.autograd.grad(exact, wide, g.double())
        assert ((dx - exact).norm(dim=(0, 2)) <= allowed * exact.norm(dim=(0, 2))).all()


def test_same_input_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the width of addresses."""
    from fastroute.kernels import task_mask

    mapping, task = mapping_of(5), tasks_of("each", 6)
    call = norm(functional.batch_norm_mask_relu, mapping, task, True, True)
    case = norm_case((6, 5, 50), torch.float32, 0)
    once = evaluate(call, case)
    monkeypatch.setattr(task_mask, "force_wide", True)
    again = evaluate(call, case)
    assert all(torch.equal(once[k], again[k]) for k in once)  # type: ignore[arg-type]
