"""The Triton kernels of ``matrix_routing`` against the iteration with every vote held: compiled, or interpreted."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastroute import use_backend
from fastroute.kernels.matrix_routing import launch as matrix_routing
from fastroute.kernels.matrix_routing import plan as matrix_routing_plan
from fastroute.kernels.matrix_routing.plan import MAX_CAPSULE, MAX_OUTPUTS, capsule, plan
from fastroute.ops.matrix_routing.contract import Capsules
from fastroute.ops.matrix_routing.op import matrix_routing as matrix_routing_op
from fastroute.ops.matrix_routing.reference import matrix_routing as reference
from tests.helpers import seeds
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.routing_cases import some_mask

from .oracle import AXES, Size, backend_step, literal, matrix_case

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
OUTPUTS = {"a_out": (2, 5), "mu_out": (2, 5, 2, 4), "sig2_out": (2, 5, 2, 4)}
SMALL = Size(2, 7, 5, 2, 3, 4)
ROUTINGS = {"first": {"first": True}, "next": {}}
PARAMETERS = {"own": {"shared": False}, "shared": {"shared": True}}
each_routing = pytest.mark.parametrize("routing", ROUTINGS)
each_kind = pytest.mark.parametrize("parameters", PARAMETERS)


def cases(size: Size = SMALL, count: int = 2, **options: Any) -> list[Case]:
    return [matrix_case(size, device=DEVICE, seed=seed, **options) for seed in range(count)]


def agree(some: list[Case], p_model: str = "gaussian", *, start: float | None = None) -> None:
    op, truth = backend_step(matrix_routing, p_model, start=start), literal(p_model)
    check(op, truth, some, dtype=torch.float32)


@each_kind
@pytest.mark.parametrize(("routing", "p_model"), [("first", "gaussian"), ("next", "gaussian"), ("next", "skm")])
def test_kinds(routing: str, p_model: str, parameters: str) -> None:
    agree(cases(**ROUTINGS[routing], **PARAMETERS[parameters]), p_model)


@pytest.mark.parametrize(
    ("dtype", "parameters"), [(torch.bfloat16, "own"), (torch.float16, "shared")], ids=["bf16-own", "fp16-shared"]
)
def test_half_precision_parameters(dtype: torch.dtype, parameters: str) -> None:
    """Widened when read: sums and votes are in float32."""
    agree(cases(dtype=dtype, **PARAMETERS[parameters]))


@each_kind
@pytest.mark.parametrize(
    "size",
    [Size(5, 1, 2, 1, 1, 1), Size(1, 6, 17, 1, 3, 1), Size(3, 4, 3, 3, 17, 5), Size(1, 3, 2, 1, 33, 9)],
    ids=str,
)
def test_sizes(size: Size, parameters: str) -> None:
    """The last is two steps of a matrix product. Few numbers, and so many draws."""
    agree(cases(size, **PARAMETERS[parameters]))


MASKS = {
    "own": some_mask(2, 7, 5),
    "shared": some_mask(7, 5).expand(2, 7, 5),
    "transposed": some_mask(2, 5, 7).mT,
    "all": torch.ones(2, 7, 5, dtype=torch.bool),
}


@each_routing
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, routing: str) -> None:
    parameters = {"shared": mask == "shared"}
    agree(cases(mask=MASKS[mask], **ROUTINGS[routing], **parameters))


@each_kind
def test_adds_to_the_buffers_of_later_iterations(parameters: str) -> None:
    agree(cases(**PARAMETERS[parameters]), start=1.0)


@each_kind
def test_chunks_and_splits(parameters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch for few inputs, then for few samples: partial sums are put together."""
    size = Size(3, 7, 4, 2, 2, 2)
    for scratch in (500, 100):
        monkeypatch.setattr(matrix_routing_plan, "SCRATCH", scratch)
        monkeypatch.setattr(matrix_routing_plan, "_split", lambda rows, step, others, sms: 2 * step)
        made = plan(*size, shared=parameters == "shared", backward=True)
        assert made.rows < size.n or made.batch < size.B
        agree(cases(size, count=1, **PARAMETERS[parameters]))


@each_kind
def test_votes_far_from_zero(parameters: str) -> None:
    """A variance of 1 around 1000, where sums of squares would keep nothing of it."""
    agree(cases(Size(2, 9, 3, 2, 2, 2), shift=1000.0, **PARAMETERS[parameters]))


@each_kind
def test_a_gate_of_zero_shuts_out_anything(parameters: str) -> None:
    some = []
    for case in cases(**PARAMETERS[parameters]):
        gate = case.inputs["gate"].clone()  # type: ignore[union-attr]
        gate[:, 4] = 0.0
        some.append(case.with_inputs(gate=gate))
    agree(some)
    clean, mu_inp = some[0], some[0].inputs["mu_inp"].clone()  # type: ignore[union-attr]
    mu_inp[:, 4] = math.nan
    op = backend_step(matrix_routing)
    expected, found = evaluate(op, clean), evaluate(op, clean.with_inputs(mu_inp=mu_inp))
    assert all(torch.equal(t, expected[name]) for name, t in found.items() if t is not None)  # type: ignore[arg-type]


@each_kind
def test_what_is_not_a_number_stays_in_its_sample(parameters: str) -> None:
    case = cases(Size(3, 5, 3, 2, 2, 2), count=1, **PARAMETERS[parameters])[0]
    op = backend_step(matrix_routing)
    clean = evaluate(op, case)
    mu_inp = case.inputs["mu_inp"].clone()  # type: ignore[union-attr]
    mu_inp[1, 2] = math.nan
    found = evaluate(op, case.with_inputs(mu_inp=mu_inp))
    for name in ("a_out", "mu_out", "sig2_out", "dgate", "dmu_inp", "da", "dmu", "dsig2"):
        assert torch.equal(found[name][[0, 2]], clean[name][[0, 2]])  # type: ignore[index]
        assert found[name][1].isnan().any()  # type: ignore[index]


@pytest.mark.parametrize(("wrt", "routing"), [(("mu_inp",), "next"), (("gate",), "first"), (("use",), "first")])
def test_only_some_gradients(wrt: tuple[str, ...], routing: str) -> None:
    """What is not wanted is not made, and what is has the same bits."""
    case = cases(count=1, **ROUTINGS[routing])[0]
    op = backend_step(matrix_routing)
    everything = evaluate(op, case)
    found = evaluate(op, Case(case.inputs, case.cotangents, case.axes, wrt))
    assert all(torch.equal(t, everything[name]) for name, t in found.items())  # type: ignore[arg-type]


@each_routing
@each_kind
def test_empty_batch(parameters: str, routing: str) -> None:
    case = cases(SMALL._replace(B=0), count=1, **ROUTINGS[routing], **PARAMETERS[parameters])[0]
    found = evaluate(backend_step(matrix_routing), case)
    for name, t in evaluate(literal(), case).items():
        assert found[name].shape == t.shape and not found[name].any()  # type: ignore[union-attr]


@settings(
    max_examples=4, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    size=st.builds(Size, *(st.integers(1, k) for k in (3, 5, 6, 4, 5, 4))), first=st.booleans(), shared=st.booleans(),
    masked=st.booleans(), p_model=st.sampled_from(["gaussian", "skm"]),
)  # fmt: skip
def test_any_case(size: Size, first: bool, shared: bool, masked: bool, p_model: str) -> None:
    mask = torch.rand(size[:3], generator=seeds.generator(1)) < 0.3 if masked else None
    check(
        backend_step(matrix_routing, p_model), literal(p_model),
        [matrix_case(size, first=first, shared=shared, mask=mask, device=DEVICE, seed=seed) for seed in range(2)],
        dtype=torch.float32,
    )  # fmt: skip


@each_kind
def test_all_iterations(parameters: str) -> None:
    """The op on this backend, from activations to activations.

    Many draws, since the sum of all inputs' dB cancels: what is left is 2 g2 times the rounding of mu.
    """
    n1 = 1 if parameters == "shared" else 5
    given = {"a_inp": (2, 5), "mu_inp": (2, 5, 2, 3), "W": (n1, 5, 3, 4), "B": (n1, 5, 2, 4)}
    given |= {"use": (n1, 5), "ign": (n1, 5)}
    axes = {**AXES, "a_inp": "bi", "B": "ijch"}
    some = []
    for seed in range(8 if parameters == "shared" else 3):
        generator = seeds.generator(seed)
        inputs = {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in given.items()}
        inputs["a_inp"][0, 1] = -math.inf
        ends = {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in OUTPUTS.items()}
        some.append(Case(inputs, ends, axes, tuple(given)))

    def op(a_inp: Tensor, mu_inp: Tensor, **w: Tensor) -> dict[str, Tensor | None]:
        with use_backend("triton"):
            made = matrix_routing_op(a_inp, mu_inp, Capsules(*w.values()), n_iters=2)
        return dict(zip(OUTPUTS, made, strict=True))

    def truth(a_inp: Tensor, mu_inp: Tensor, **w: Tensor) -> dict[str, Tensor | None]:
        made = reference(a_inp, mu_inp, Capsules(*w.values()), n_iters=2)
        return {name: getattr(made, name) for name in OUTPUTS}

    check(op, truth, some, dtype=torch.float32)


def test_same_input_same_bits() -> None:
    case = cases(count=1)[0]
    op = backend_step(matrix_routing)
    once, again = evaluate(op, case), evaluate(op, case)
    assert all(torch.equal(t, again[name]) for name, t in once.items())  # type: ignore[arg-type]


def test_what_is_not_supported_says_why() -> None:
    refuse = matrix_routing.unsupported
    assert refuse(DEVICE, torch.float32, 1, 9, 5, 4, 4, 4) is None
    assert "not float64" in str(refuse(DEVICE, torch.float64, 1, 9, 5, 4, 4, 4))
    assert "at most" in str(refuse(DEVICE, torch.float32, 1, 9, MAX_OUTPUTS + 1, 4, 4, 4))
    assert "not 65 x 64" in str(refuse(DEVICE, torch.float32, 1, 9, 5, 65, 4, 64))
    assert capsule(65, 64) > MAX_CAPSULE
    assert "32 bits" in str(refuse(DEVICE, torch.float32, 1, 9, 16000, 1, 400, 400))
    assert "meta" in str(refuse("meta", torch.float32, 1, 9, 5, 4, 4, 4))


FOLDED = {
    "own": (2, Size(2, 7, 5, 2, 3, 4), {}),
    "shared": (3, Size(2, 7, 5, 2, 3, 4), {"shared": True}),
    "one": (1, Size(1, 4, 1, 1, 3, 1), {}),
    "masked": (3, Size(2, 7, 5, 2, 3, 4), {"masked": True}),
    "skm": (2, Size(2, 7, 5, 3, 3, 3), {"p_model": "skm", "shared": True}),
    "batch-40": (2, Size(40, 2, 2, 1, 1, 2), {}),
}


@pytest.mark.parametrize("force", [True, False], ids=["folded", "apart"])
@pytest.mark.parametrize("name", FOLDED)
def test_both_designs(name: str, force: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_routing, "force_folded", force)
    n_iters, (B, n, m, c, d, h), options = FOLDED[name]
    n1, p_model = 1 if options.get("shared") else n, options.get("p_model", "gaussian")
    mask = some_mask(B, n, m).to(DEVICE) if options.get("masked") else None
    given = {"a_inp": (B, n), "mu_inp": (B, n, c, d), "W": (n1, m, d, h), "B": (n1, m, c, h)}
    given |= {"use": (n1, m), "ign": (n1, m)}
    ends = {"a_out": (B, m), "mu_out": (B, m, c, h), "sig2_out": (B, m, c, h)}
    some = []
    for seed in range(3):
        generator = seeds.generator(seed)
        inputs = {key: torch.randn(shape, generator=generator).to(DEVICE) for key, shape in given.items()}
        inputs["a_inp"][0, 1] = -math.inf
        cotangents = {key: torch.randn(shape, generator=generator).to(DEVICE) for key, shape in ends.items()}
        some.append(Case(inputs, cotangents, {**AXES, "a_inp": "bi", "B": "ijch"}, tuple(given)))

    def op(a_inp: Tensor, mu_inp: Tensor, **w: Tensor) -> dict[str, Tensor | None]:
        with use_backend("triton"):
            made = matrix_routing_op(a_inp, mu_inp, Capsules(*w.values()), n_iters=n_iters, p_model=p_model, mask=mask)
        return dict(zip(ends, made, strict=True))

    def truth(a_inp: Tensor, mu_inp: Tensor, **w: Tensor) -> dict[str, Tensor | None]:
        made = reference(a_inp, mu_inp, Capsules(*w.values()), n_iters=n_iters, p_model=p_model, mask=mask)
        return {key: getattr(made, key) for key in ends}

    check(op, truth, some, dtype=torch.float32)
    once, again = evaluate(op, some[0]), evaluate(op, some[0])
    assert all(torch.equal(t, again[key]) for key, t in once.items())  # type: ignore[arg-type]
