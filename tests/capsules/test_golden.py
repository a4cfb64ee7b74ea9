"""Upstream's own numbers: every output and every gradient, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastroute
from fastroute import EfficientVectorRouting, use_backend
from fastroute.compat import heinsen_routing
from tests.helpers import golden, seeds
from tests.helpers.backends import each_backend, each_float32_backend
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.golden import Golden, assert_same_draws
from tests.helpers.routing_cases import module_case, module_op, module_truth

#: Rounding alone separates two float64 implementations: below 1e-13 here. The smallest difference in a formula that
#: these files can show is that of 1/m and upstream's float32-rounded buffer of it, 1.5e-9. This tells them apart.
FLOAT64 = 1e-10


def compare(found: golden.Found, expected: golden.Found) -> None:
    for name, numbers in expected.items():
        got = found[name]
        if numbers is None or got is None:
            assert got is numbers, f"{name}: {'no gradient' if got is None else 'a gradient'}, unlike upstream"
            continue
        assert got.dtype == numbers.dtype and got.shape == numbers.shape, name
        error, scale = float((got - numbers).abs().max()), float(numbers.abs().max())
        assert error <= FLOAT64 * scale, f"{name}: {error:.3g} from upstream, values to {scale:.3g}"


@pytest.mark.parametrize("file", golden.names("capsules", "evr_*.float64.pt"))
@each_backend
def test_float64(file: str, backend: str) -> None:
    case = Golden.read("capsules", file)
    with use_backend(backend):
        compare(case.run(case.module(fastroute)), case.expected())


def as_case(recorded: Golden) -> tuple[EfficientVectorRouting, Case]:
    module = recorded.module(fastroute)
    assert isinstance(module, EfficientVectorRouting)
    return module, module_case(module, recorded.record["inputs"]["x_inp"], recorded.record["cotangents"], recorded.mask)


@pytest.mark.parametrize("file", golden.names("capsules", "evr_*.float64.pt"))
def test_the_literal_reference(file: str) -> None:
    """The truth that all other tests rely on is itself upstream's."""
    recorded = Golden.read("capsules", file)
    module, case = as_case(recorded)
    compare(evaluate(module_truth(module), case), recorded.expected())


@pytest.mark.parametrize("file", golden.names("capsules", "evr_*.float32.pt"))
@each_float32_backend
def test_float32(file: str, backend: str) -> None:
    """Upstream's float32 counts as plain PyTorch, with the literal reference in other orders and on other inputs."""
    recorded = Golden.read("capsules", file)
    module, case = as_case(recorded)
    x = case.inputs["x_inp"]
    assert x is not None
    generator = seeds.generator(0)
    others = [case.with_inputs(x_inp=torch.randn(x.shape, generator=generator)) for _ in range(1)]
    with use_backend(backend):
        found = check(
            module_op(module), module_truth(module), [case, *others],
            dtype=torch.float32, also=[recorded.expected()],
        )  # fmt: skip
    for name, upstream in recorded.expected().items():
        got = found[name]
        assert (got is None) == (upstream is None) and (got is None or got.dtype == torch.float32), name


INITIAL = golden.load("capsules", "init_seed1234.pt")
SIZES = {"EVR(11,5,8,6)": (11, 5, 8, 6), "EVR(-1,5,8,6)": (-1, 5, 8, 6), "EVR(11,7,8,1)": (11, 7, 8, 1)}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("found_in", [fastroute, heinsen_routing], ids=["fastroute", "compat"])
def test_initial_values(name: str, found_in: Any) -> None:
    """A seed gives upstream's weights, in its order, and leaves the generator where upstream leaves it."""
    torch.manual_seed(1234)
    module = found_in.EfficientVectorRouting(*SIZES[name])
    after = torch.randn(4)
    state = module.state_dict()
    assert list(state) == list(INITIAL[name])
    for key, value in INITIAL[name].items():
        assert_same_draws(state[key], value, key)
    assert_same_draws(after, INITIAL[f"{name} next_randn"], "what comes next")


@pytest.mark.parametrize("name", SIZES)
def test_state_dicts_load_both_ways(name: str) -> None:
    upstream = INITIAL[name]
    module = EfficientVectorRouting(*SIZES[name])
    module.load_state_dict(upstream, strict=True)
    ours = module.state_dict()
    # what upstream's load_state_dict(strict=True) checks: the same keys, shapes and kinds of value
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in upstream.items()}
    assert all(torch.equal(ours[k], upstream[k]) for k in upstream)
    del ours["B_S"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"B_S\""):
        module.load_state_dict(ours, strict=True)
