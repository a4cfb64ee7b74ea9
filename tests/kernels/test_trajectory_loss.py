"""``trajectory_loss`` in Triton against its definition in float64: compiled on a GPU, else in Triton's interpreter.

Axes: B (b) samples, T decisions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastroute import ops, use_backend
from fastroute.kernels import trajectory_loss as kernels
from fastroute.ops.trajectory_loss import laid_out
from fastroute.reference import trajectory_loss as reference
from fastroute.reference.trajectory_loss import KINDS, SILENT
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.opcheck import opcheck
from tests.helpers.poison import poisoned_memory
from tests.helpers.trajectory_losses import arguments, loss_case, loss_op, loss_truth

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    with poisoned_memory():
        yield


def on_device(case: Case) -> Case:
    return replace(
        case,
        inputs={k: None if t is None else t.to(DEVICE) for k, t in case.inputs.items()},
        cotangents={k: t.to(DEVICE) for k, t in case.cotangents.items()},
    )


@each_dtype
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != SILENT])
def test_losses(kind: str, dtype: torch.dtype) -> None:
    for T, masked, options in ((3, True, {"gamma": 0.7}), (2, False, {"normalize": False})):
        kinds = (kind,) * T
        cases = [on_device(loss_case(kinds, 67, dtype, masked=masked, seed=seed)) for seed in range(3)]
        op, truth = loss_op("triton", kinds, **options), loss_truth(kinds, **options)
        check(op, truth, cases, dtype=dtype)


@pytest.mark.parametrize("B", [0, 1, 127, 128, 129, 400])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "full"])
def test_every_kind_at_once(B: int, masked: bool) -> None:
    """Two more than a kernel is written out for, three times, so that there are several and a short one."""
    kinds = (*KINDS, "WPL", "SARSA", *reversed(KINDS))[: 3 * kernels.CHUNK + 2]
    cases = [on_device(loss_case(kinds, B, masked=masked, seed=seed)) for seed in range(2)]
    op, truth = loss_op("triton", kinds, gamma=0.7), loss_truth(kinds, gamma=0.7)
    check(op, truth, cases, dtype=torch.float32)


def test_what_is_not_a_number_stays_in_its_sample() -> None:
    """And what a mask leaves out is nowhere."""
    case = on_device(loss_case(KINDS, 9, masked=True))
    op = loss_op("triton", KINDS, gamma=0.7)
    clean, others = evaluate(op, case), torch.arange(9, device=DEVICE) != 2
    for name, t in case.inputs.items():
        if t is None or t.dtype == torch.bool:
            continue
        bad = t.clone()
        bad[2] = math.nan
        found = evaluate(op, case.with_inputs(**{name: bad}))
        for k, expected in clean.items():
            assert torch.equal(found[k][others], expected[others])  # type: ignore[index]
        on = case.inputs.get(f"active.{name[3:]}") if "." in name else None
        if name in case.wrt:
            assert bool(found["loss"][2].isfinite()) == (on is not None and not on[2])  # type: ignore[index]


def test_agrees_with_the_reference_in_its_layout() -> None:
    """The op's contract: both are given the same lists, with slopes and without."""
    kinds = ("WPL", "REINFORCEBl2", SILENT, "EGreedyAAC")
    given = arguments(kinds, dict(on_device(loss_case(kinds, 50, masked=True)).inputs))
    args = (given["f"], *laid_out(**given), 0.7, True)
    for want in (True, False):
        (loss, slopes), (expected, rows) = kernels.forward(*args, want), reference.forward(*args, want)
        assert slopes.shape == rows.shape == (len(args[1]) if want else 0, 50)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(slopes, rows)
    opcheck(torch.ops.fastroute._trajectory_loss_triton.default, (*args, True), grad=False)


def test_compile() -> None:
    """One graph for any batch size; the op is one node of it."""
    torch._dynamo.reset()
    kinds = ("WPL", "REINFORCEBl2", "QLearning", SILENT)
    counter = CompileCounterWithBackend("aot_eager")

    def call(**inputs: Tensor | None) -> dict[str, Tensor | None]:
        return {"loss": ops.trajectory_loss(**arguments(kinds, inputs), gamma=0.7)}

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    with use_backend("triton"):
        for B in (16, 7, 33):
            case = on_device(loss_case(kinds, B, masked=True))
            found, expected = (evaluate(fn, case) for fn in (compiled, call))
            assert all(torch.equal(t, expected[name]) for name, t in found.items())  # type: ignore[arg-type]
            assert counter.frame_count == 1


def test_float64_goes_elsewhere() -> None:
    given = arguments(("AAC",), dict(on_device(loss_case(("AAC",), 4, torch.float64)).inputs))
    with use_backend("triton"), pytest.raises(RuntimeError, match="not float64"):
        ops.trajectory_loss(**given)
