"""What needs Triton's interpreter, in processes of their own: the kernels' tests, and upstream's numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
#: One case or two of every kernel, forward and backward.
FEW = {
    "vector_routing": (
        "test_kinds[one-pass-first-linear-made]", "test_kinds[one-pass-next]", "test_kinds[two-phase-next-linear]",
        "test_kinds[two-phase-first-made]", "test_a_layer_reads_x_once",
    ),
    "grouped_linear": (
        "test_plans[ranked-130-64]", "test_plans[counted-130-64]", "test_plans[sorted-130-64]",
        "test_linear[uneven]",
    ),
    "policy": ("test_values[fp32-softmax]", "test_agent_policy[softmax-critic]"),
    "trajectory_loss": (
        "test_agrees_with_the_reference_in_its_layout", "test_losses[WPL-fp32]",
        "test_rewards_in_the_kernel[masked-classes]", "test_a_loss_with_rewards_in_its_kernel[class-share]",
    ),
    "task_mask": ("test_values[32-bit-relu-each-3x17x5x4]", "test_batch_norm_options"),
    "soft_assignment": ("test_shared_votes[by outputs-padded]", "test_forms[routing-own]"),
    "matrix_routing": ("test_kinds[first-gaussian-own]", "test_kinds[next-gaussian-shared]"),
    "expert_ffn": ("test_both_designs[bf16-gated-silu]",),
}  # fmt: skip
EVERYTHING = {
    **{name: [f"tests/ops/{name}/test_kernels.py"] for name in FEW},
    "capsules": [
        *(f"tests/capsules/test_{name}.py" for name in ("golden", "definable", "matrix", "stream")),
        "-k",
        "triton and (test_float32 or test_golden_float32 or test_error_budget"
        " or in_float32 and (base_3d or dict or var))",
    ],
}
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run compiled here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets them already"),
]


def interpret(what: list[str]) -> None:
    path = os.pathsep.join([p for p in sys.path if p])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *what]
    ran = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-6000:] + ran.stderr[-2000:]


def test_every_kernel() -> None:
    interpret([f"tests/ops/{kernel}/test_kernels.py::{test}" for kernel, tests in FEW.items() for test in tests])


@pytest.mark.long
@pytest.mark.parametrize("what", EVERYTHING.values(), ids=EVERYTHING)
def test_interpreted(what: list[str]) -> None:
    interpret(what)
