"""What needs Triton's interpreter, in processes of their own: the kernels' tests, and upstream's numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
WHAT = {
    "kernels": ["tests/kernels/test_vector_routing.py"],
    **{
        name: [f"tests/kernels/test_{name}.py"]
        for name in ("dispatch", "policy", "trajectory_loss", "task_mask", "soft_assignment", "matrix_routing")
    },
    "golden": ["tests/capsules/test_golden.py", "-k", "test_float32 and triton"],
    "definable": ["tests/capsules/test_definable.py", "-k", "test_golden_float32 and triton"],
    "matrix": ["tests/capsules/test_matrix.py", "-k", "in_float32 and triton and (base_3d or dict or var)"],
    "stream": ["tests/capsules/test_stream.py", "-k", "test_error_budget and triton"],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run compiled here")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets them already")
@pytest.mark.parametrize("what", WHAT.values(), ids=WHAT)
def test_interpreted(what: list[str]) -> None:
    path = os.pathsep.join([p for p in sys.path if p])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *what]
    ran = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-6000:] + ran.stderr[-2000:]
