"""``matrix_routing`` on a GPU: real sizes, gradients, a CUDA graph, no synchronisation, over 2**31 elements.

Axes: B batch, n inputs, m outputs, c rows of a capsule's matrix, d its columns before, h its columns after routing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import use_backend
from fastroute.ops.matrix_routing.contract import Capsules
from fastroute.ops.matrix_routing.op import matrix_routing
from fastroute.ops.matrix_routing.reference import matrix_routing as reference
from tests.helpers import seeds
from tests.helpers.budget import check, yardstick_of
from tests.helpers.cases import Case, evaluate
from tests.helpers.graphs import check_captured

from .oracle import AXES, Size, backend_step, literal, matrix_case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

KINDS = {"own": {"shared": False}, "shared": {"shared": True}}
each_kind = pytest.mark.parametrize("kind", KINDS)
OUTPUTS = ("a_out", "mu_out", "sig2_out")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Keep a failed capture from reaching the next test, and products in full float32."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.empty_cache()


def step_op(p_model: str = "gaussian") -> Any:
    from fastroute.kernels.matrix_routing import launch as kernels

    return backend_step(kernels, p_model)


@each_kind
@pytest.mark.parametrize(
    "size",
    [Size(4, 1000, 64, 4, 4, 4), Size(33, 300, 10, 1, 64, 64), Size(2, 777, 33, 3, 5, 9), Size(1, 500, 1000, 2, 2, 2)],
    ids=str,
)
@pytest.mark.parametrize(("routing", "p_model"), [("first", "gaussian"), ("next", "gaussian"), ("next", "skm")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_real_sizes(size: Size, routing: str, p_model: str, dtype: torch.dtype, kind: str) -> None:
    options = {"first": routing == "first", "dtype": dtype, "device": "cuda", **KINDS[kind]}
    cases = [matrix_case(size, seed=seed, **options) for seed in range(2)]
    check(step_op(p_model), literal(p_model), cases, dtype=torch.float32)


@each_kind
def test_masked(kind: str) -> None:
    size = Size(3, 500, 20, 4, 4, 4)
    mask = torch.rand(3, 500, 20, generator=seeds.generator(0)) < 0.5
    mask[:, 7] = True
    cases = [matrix_case(size, mask=mask, seed=seed, device="cuda", **KINDS[kind]) for seed in range(3)]
    check(step_op(), literal(), cases, dtype=torch.float32)


def layer_case(size: Size, kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """All iterations, from activations to activations; input 1 of sample 0 is dropped."""
    B, n, m, c, d, h = size
    n1 = 1 if kind == "shared" else n
    generator = seeds.generator(seed)
    shapes = {"a_inp": (B, n), "mu_inp": (B, n, c, d), "W": (n1, m, d, h), "B": (n1, m, c, h)}
    shapes |= {"use": (n1, m), "ign": (n1, m)}
    inputs: dict[str, Tensor | None] = {}
    for name, shape in shapes.items():
        scale = d**-0.5 if name == "W" else 1.0
        inputs[name] = (torch.randn(shape, generator=generator) * scale).to("cuda", dtype)
    inputs["a_inp"][0, 1] = -math.inf  # type: ignore[index]
    ends = {"a_out": (B, m), "mu_out": (B, m, c, h), "sig2_out": (B, m, c, h)}
    cotangents = {name: torch.randn(shape, generator=generator).cuda() for name, shape in ends.items()}
    return Case(inputs, cotangents, {**AXES, "a_inp": "bi", "B": "ijch"}, tuple(shapes))


def layer(backend: str, n_iters: int = 3) -> Any:
    def op(a_inp: Tensor, mu_inp: Tensor, **w: Tensor) -> dict[str, Tensor | None]:
        with use_backend(backend):
            return dict(
                zip(OUTPUTS, matrix_routing(a_inp, mu_inp, Capsules(*w.values()), n_iters=n_iters), strict=True)
            )

    return op


def truth(a_inp: Tensor, mu_inp: Tensor, **w: Tensor) -> dict[str, Tensor | None]:
    made = reference(a_inp, mu_inp, Capsules(*w.values()), n_iters=3)
    return {name: getattr(made, name) for name in OUTPUTS}


@each_kind
def test_auto_takes_triton(kind: str) -> None:
    case = layer_case(Size(2, 100, 7, 4, 4, 4), kind)
    auto, triton = (evaluate(layer(backend), case) for backend in ("auto", "triton"))
    assert all(torch.equal(t, triton[name]) for name, t in auto.items())  # type: ignore[arg-type]


@each_kind
def test_all_iterations(kind: str) -> None:
    cases = [layer_case(Size(4, 500, 20, 4, 4, 4), kind, seed) for seed in range(4)]
    check(layer("triton"), truth, cases, dtype=torch.float32)


@each_kind
def test_captures_in_a_graph_without_synchronising(kind: str) -> None:
    """Forward and backward replay on new values to the bits of a plain call."""
    case, other = (layer_case(Size(3, 700, 20, 4, 4, 4), kind, seed) for seed in range(2))
    check_captured(layer("triton"), case, other)


@each_kind
def test_same_input_same_bits(kind: str) -> None:
    """A hundred times: sums that threads read back from memory would not survive a missing barrier."""
    case = layer_case(Size(40, 300, 64, 4, 4, 4), kind)
    once = evaluate(layer("triton"), case)
    for _ in range(100):
        again = evaluate(layer("triton"), case)
        assert all(torch.equal(t, again[name]) for name, t in once.items())  # type: ignore[arg-type]


def test_memory() -> None:
    """Training keeps and makes nothing as large as the votes: 268 MB here."""
    case = layer_case(Size(16, 4096, 64, 4, 4, 4), "own")
    evaluate(layer("triton"), case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = evaluate(layer("triton"), case)
    gradients = sum(t.nbytes for t in found.values() if t is not None)
    assert torch.cuda.max_memory_allocated() - before - 2 * gradients < 160 << 20


@pytest.mark.parametrize(
    ("size", "kind", "gigabytes"),
    [(Size(1, 9_000_000, 4, 4, 4, 16), "own", 60), (Size(2, 75_000_000, 3, 4, 4, 2), "shared", 60)],
    ids=["parameters", "inputs"],
)
def test_more_than_2_31_elements(size: Size, kind: str, gigabytes: int) -> None:
    """W, then mu_inp, pass 2**31 elements; only the last inputs have an open gate: they are the whole answer."""
    from fastroute.kernels.matrix_routing import launch as kernels
    from fastroute.ops.matrix_routing.contract import MatrixGrads, MatrixStep, OutputGrads, Outputs
    from fastroute.ops.matrix_routing.settling import settle

    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB")
    B, n, _, c, d, _ = size
    few = 64
    case = matrix_case(size._replace(n=few), shared=kind == "shared", device="cuda", dtype=torch.bfloat16)
    given = case.inputs
    gate = torch.zeros(B, n, device="cuda")
    gate[:, -few:] = given["gate"]  # type: ignore[assignment]
    mu_inp = torch.zeros(B, n, c, d, device="cuda")
    mu_inp[:, -few:] = given["mu_inp"]  # type: ignore[assignment]
    parameters = []
    for name in ("W", "bias", "use", "ign"):
        t = given[name]
        assert t is not None
        if kind == "own":
            whole = t.new_ones(n, *t.shape[1:])
            whole[-few:] = t
            t = whole
        parameters.append(t)
    assert max(t.numel() for t in (mu_inp, *parameters)) > 2**31
    previous = Outputs(given["a"], given["mu"], given["sig2"])  # type: ignore[arg-type]
    step = MatrixStep(gate, mu_inp, *parameters, None, previous, "gaussian")
    made = kernels.forward(step)
    out = settle(made, 1e-5)
    # The ignored inputs' activations are in a_out only where a gate is open.
    yardstick = yardstick_of(literal(), case, torch.float32)
    yardstick.check(dict(zip(OUTPUTS, out, strict=True)))
    if kind == "own":  # gradients in float32 of W alone would be twice as large
        return
    grads = MatrixGrads(
        True, torch.empty_like(gate), torch.empty_like(mu_inp),
        *(torch.empty(t.shape, device="cuda") for t in parameters),
    )  # fmt: skip
    cotangents = Outputs(*case.cotangents.values())
    kernels.backward(step, OutputGrads.of(made, cotangents, 1e-5), grads)
    assert grads.mu_inp is not None and not grads.mu_inp[:, :-few].any()
    yardstick.check({"dmu_inp": grads.mu_inp[:, -few:], "dgate": grads.gate[:, -few:]})
