"""Where kernels can run: compiled on a GPU, or interpreted in a process that chose so before importing triton.

Triton reads TRITON_INTERPRET when it is imported, and other tests import it too, so nothing here sets the variable:
``test_interpreted`` runs the interpreter's share of this folder in a process of its own.
"""

from __future__ import annotations

import os

import torch

_runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
_kernels = (
    "vector_routing",
    "dispatch",
    "policy",
    "trajectory_loss",
    "task_mask",
    "soft_assignment",
    "matrix_routing",
    "expert_ffn",
)
collect_ignore = [] if _runs else [f"test_{name}.py" for name in _kernels]
