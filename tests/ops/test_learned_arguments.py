"""Every floating-point argument of every op has its gradient, or is one that the op's page says has none."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from fastroute import functional, use_backend
from tests.helpers.backends import each_backend
from tests.helpers.cases import evaluate
from tests.helpers.opcheck import assert_same, gradcheck
from tests.helpers.routing_cases import Size

from .calls import CALLS

SIZE = Size(2, 3, 3, 2, 2)


@each_backend
@pytest.mark.parametrize("name", CALLS)
def test_every_gradient_is_right(backend: str, name: str) -> None:
    """All at once against finite differences, and each alone: then nothing else asks for a graph."""
    call = CALLS[name]
    case = call.case(SIZE, torch.float64)
    learned = tuple(k for k in case.wrt if case.inputs[k] is not None and k not in call.constants)
    fn = use_backend(backend)(call.fn)
    if call.truth is None:
        gradcheck(
            lambda **given: {k: t for k, t in fn(**given).items() if k in case.cotangents}, replace(case, wrt=learned)
        )
    expected = evaluate(call.truth or fn, replace(case, wrt=learned))
    for argument in learned:
        found, right = evaluate(fn, replace(case, wrt=(argument,)))[f"d{argument}"], expected[f"d{argument}"]
        assert found is not None and right is not None, argument
        assert_same(found, right, argument)


@each_backend
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.constants])
def test_constants_have_none(backend: str, name: str) -> None:
    call = CALLS[name]
    case = call.case(SIZE, torch.float64)
    found = evaluate(use_backend(backend)(call.fn), case)
    page = inspect.getdoc(getattr(functional, call.op))
    assert page is not None and "no gradient" in page
    for argument in call.constants:
        assert found.get(f"d{argument}") is None, argument


@each_backend
@pytest.mark.parametrize("name", CALLS)
def test_hooks_are_given_tensors(backend: str, name: str) -> None:
    """Of whatever arguments, and whichever result is learnt from: autograd gives them None where a function does."""
    call = CALLS[name]
    case = call.case(SIZE, torch.float64)
    seen: list[object] = []
    given = {k: t.clone() if t is not None else None for k, t in case.inputs.items()}
    learned = [t.requires_grad_() for k, t in given.items() if t is not None and k in case.wrt]
    for t in learned:
        t.register_hook(seen.append)
    for y in use_backend(backend)(call.fn)(**given).values():
        for again in (False, True) if y is not None and y.requires_grad else ():
            torch.autograd.grad(y.sum(), learned, create_graph=again, retain_graph=True, allow_unused=True)
    assert seen and all(isinstance(g, torch.Tensor) for g in seen)


def test_the_table_has_every_floating_point_argument() -> None:
    for name, call in CALLS.items():
        case = call.case(SIZE, torch.float64)
        floats = {k for k, t in case.inputs.items() if t is not None and t.is_floating_point()}
        if name not in ("efficient_routing", "efficient_routing, linear"):  # there is one with a learned prior
            assert floats == {k for k in case.wrt if case.inputs[k] is not None}, name
