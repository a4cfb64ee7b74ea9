"""Every wrong argument is named before any work, with what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import DefinableVectorRouting, EfficientVectorRouting, use_backend
from tests.helpers import seeds
from tests.helpers.backends import each_backend

GOOD = {"n_inp": 4, "n_out": 3, "d_inp": 6, "d_out": 5}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"n_inp": 0}, ValueError, r"n_inp: expected a positive number of input vectors, or -1 for any number, got 0"),
        (
            {"n_inp": -2},
            ValueError,
            r"n_inp: expected a positive number of input vectors, or -1 for any number, got -2",
        ),
        ({"n_out": 1}, ValueError, r"n_out: expected at least 2 output vectors, got 1"),
        ({"n_out": -3}, ValueError, r"n_out: expected at least 2 output vectors, got -3"),
        ({"d_inp": 0}, ValueError, r"d_inp: expected at least 1, got 0"),
        ({"d_inp": -1}, ValueError, r"d_inp: expected at least 1, got -1"),
        ({"d_out": 0}, ValueError, r"d_out: expected at least 1, got 0"),
        ({"d_out": -5}, ValueError, r"d_out: expected at least 1, got -5"),
        ({"n_iters": 0}, ValueError, r"n_iters: expected at least 1, got 0"),
        ({"n_iters": -1}, ValueError, r"n_iters: expected at least 1, got -1"),
        ({"dtype": torch.int64}, TypeError, r"dtype: expected a floating-point dtype, got torch\.int64"),
        ({"dtype": torch.complex64}, TypeError, r"dtype: expected a floating-point dtype, got torch\.complex64"),
        ({"n_inp": 4.0}, TypeError, r"n_inp: expected an int.*4\.0"),
        ({"n_out": "3"}, TypeError, r"n_out: expected an int.*'3'|n_out: expected an int.*str"),
        ({"d_out": 2.5}, TypeError, r"d_out: expected an int.*2\.5"),
        ({"n_iters": 2.0}, TypeError, r"n_iters: expected an int.*2\.0"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_construction(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        EfficientVectorRouting(**{**GOOD, **wrong})
    assert torch.equal(torch.get_rng_state(), before), "checked after work had begun"


X = torch.zeros(2, 4, 6)


def _called(x: Any, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    return x, arguments


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (_called([[1.0]]), TypeError, r"x_inp: expected a tensor, got list"),
        (_called(X[..., :5]), ValueError, r"d_inp: expected input vectors of width 6, got 5 \(x_inp is \[2, 4, 5\]\)"),
        (_called(torch.zeros(2, 3, 6)), ValueError, r"n_inp: expected 4 input vectors, got 3 \(x_inp is \[2, 3, 6\]\)"),
        (_called(X[:, :1]), ValueError, r"n_inp: expected 4 input vectors, got 1 \(x_inp is \[2, 1, 6\]\)"),
        (_called(X[:, :0]), ValueError, r"n_inp: expected 4 input vectors, got 0 \(x_inp is \[2, 0, 6\]\)"),
        (
            _called(torch.zeros(6)),
            ValueError,
            r"x_inp: expected \[\.\.\., n_inp, d_inp\], at least 2 dimensions, got \[6\]",
        ),
        (_called(torch.zeros(())), ValueError, r"x_inp: expected .* at least 2 dimensions, got \[\]"),
        (_called(X.long()), TypeError, r"x_inp: expected a floating-point tensor, got torch\.int64"),
        (_called(X.bool()), TypeError, r"x_inp: expected a floating-point tensor, got torch\.bool"),
        (_called(X.to(torch.complex64)), TypeError, r"x_inp: expected a floating-point tensor, got torch\.complex64"),
        (_called(X.to("meta")), ValueError, r"x_inp: expected a tensor on cpu like the parameters, got one on meta"),
        (
            _called(X, mask=torch.zeros(4, 3)),
            TypeError,
            r"mask: expected a bool tensor \(True = ignore\), got torch\.float32",
        ),
        (
            _called(X, mask=torch.zeros(4, 3, dtype=torch.int64)),
            TypeError,
            r"mask: expected a bool tensor .*got torch\.int64",
        ),
        (
            _called(X, mask=torch.zeros(4, 2).bool()),
            ValueError,
            r"mask: expected a shape that broadcasts to \[2, 4, 3\] \(\.\.\., n_inp, n_out\), got \[4, 2\]",
        ),
        (
            _called(X, mask=torch.zeros(2, 4).bool()),
            ValueError,
            r"mask: expected a shape that broadcasts to \[2, 4, 3\] .*got \[2, 4\]",
        ),
        (_called(X, mask=torch.zeros(3, 4, 3).bool()), ValueError, r"mask: expected a shape .*got \[3, 4, 3\]"),
        (_called(X, mask=torch.zeros(1, 2, 4, 3).bool()), ValueError, r"mask: expected a shape .*got \[1, 2, 4, 3\]"),
        (
            _called(X, mask=torch.zeros(4, 3, device="meta").bool()),
            ValueError,
            r"mask: expected a tensor on cpu like x_inp, got one on meta",
        ),
        (_called(X, mask=[[True] * 3] * 4), TypeError, r"mask: expected a (bool )?tensor.*list"),
        (
            _called(X, lengths=[4, 5]),
            ValueError,
            r"lengths: expected values from 0 to 4 .*got 1 outside, the smallest 4, the largest 5",
        ),
        (
            _called(X, lengths=[-1, 4]),
            ValueError,
            r"lengths: expected values from 0 to 4 .*got 1 outside, the smallest -1, the largest 4",
        ),
        (_called(X, lengths=[4]), ValueError, r"lengths: expected one length per sample, shape \[2\], got \[1\]"),
        (_called(X, lengths=[4, 4, 4]), ValueError, r"lengths: expected one length per sample, shape \[2\], got \[3\]"),
        (
            _called(X, lengths=torch.tensor([[4, 4]])),
            ValueError,
            r"lengths: expected one length per sample, shape \[2\], got \[1, 2\]",
        ),
        (_called(X, lengths=4), ValueError, r"lengths: expected one length per sample, shape \[2\], got \[\]"),
        (_called(X[0], lengths=[4]), ValueError, r"lengths: expected one length per sample, shape \[\], got \[1\]"),
        (_called(X, lengths=[4.0, 2.0]), TypeError, r"lengths: expected integers, got torch\.float32"),
        (_called(X, lengths=torch.tensor([True, False])), TypeError, r"lengths: expected integers, got torch\.bool"),
        (
            _called(X, lengths=torch.zeros(2, dtype=torch.int64, device="meta")),
            ValueError,
            r"lengths: expected a tensor on cpu like x_inp, got one on meta",
        ),
    ],
)
@pytest.mark.parametrize("return_dict", [False, True], ids=["x_out", "dict"])
def test_call(call: tuple[Any, dict[str, Any]], error: type[Exception], message: str, return_dict: bool) -> None:
    module = EfficientVectorRouting(**GOOD, return_dict=return_dict)
    x, arguments = call
    with pytest.raises(error, match=message):
        module(x, **arguments)


def test_no_input_vectors() -> None:
    """n_inp = -1 takes any number of them, but one there must be: s = n**-0.5."""
    module = EfficientVectorRouting(**{**GOOD, "n_inp": -1})
    with pytest.raises(ValueError, match=r"x_inp: expected at least 1 input vector, got 0 \(x_inp is \[2, 0, 6\]\)"):
        module(X[:, :0])


def test_parameters_elsewhere() -> None:
    module = EfficientVectorRouting(**GOOD, device="meta")
    with pytest.raises(ValueError, match="x_inp: expected a tensor on meta like the parameters, got one on cpu"):
        module(X)


def _every_entry(module: EfficientVectorRouting, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    return out, torch.autograd.grad(out.square().sum(), x)[0]


@each_backend
@pytest.mark.parametrize("n_inp", [4, -1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_stays_in_its_sample(backend: str, n_inp: int, bad: float) -> None:
    seeds.manual_seed(0)
    module = EfficientVectorRouting(**{**GOOD, "n_inp": n_inp})
    clean = torch.randn(3, 4, 6)
    dirty = clean.clone()
    dirty[1, 2, 3] = bad
    others = [0, 2]
    with use_backend(backend):
        expected, found = _every_entry(module, clean), _every_entry(module, dirty)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[others], b[others])
    assert not found[0][1].isfinite().all()


@each_backend
@pytest.mark.parametrize("n_inp", [4, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_of_another_size_are_named(backend: str, n_inp: int, dtype: torch.dtype) -> None:
    """Never broadcast: one, two or all of the axes of each parameter are 1, or one is longer by one."""
    x = torch.zeros(2, 4, 6, dtype=dtype)
    for name, given in EfficientVectorRouting(**{**GOOD, "n_inp": n_inp}).named_parameters(recurse=False):
        for axis in range(given.dim()):
            size = list(given.shape)
            size[axis] = 1 if size[axis] > 1 else 2
            for return_dict in (False, True):
                module = EfficientVectorRouting(**{**GOOD, "n_inp": n_inp, "return_dict": return_dict}, dtype=dtype)
                setattr(module, name, torch.nn.Parameter(torch.zeros(size, dtype=dtype)))
                with use_backend(backend), pytest.raises(ValueError, match=r"^\w+: expected a tensor \[.*\], got \["):
                    module(x)
                if not return_dict:
                    with use_backend(backend), pytest.raises(ValueError, match=r"^\w+: expected a tensor \[.*\], got"):
                        module.stream(x)


@pytest.mark.parametrize(("n_inp", "other"), [(4, -1), (4, 5), (-1, 4)])
@pytest.mark.parametrize("kind", [EfficientVectorRouting, DefinableVectorRouting])
def test_the_number_of_inputs_is_fixed(kind: Any, n_inp: int, other: int) -> None:
    given = dict.fromkeys("AFGS", torch.nn.Identity()) if kind is DefinableVectorRouting else {"d_out": 5}
    module = kind(**given, n_inp=n_inp, n_out=3, d_inp=6)
    module.n_inp = n_inp
    with pytest.raises(ValueError, match=f"^n_inp: expected {n_inp}, which the layer was made with, got {other}"):
        module.n_inp = other
