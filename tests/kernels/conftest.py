"""Where kernels can run: compiled on a GPU, or interpreted in a process that chose so before importing triton.

Triton reads TRITON_INTERPRET when it is imported, and other tests import it too, so nothing here sets the variable:
``test_interpreted`` runs the interpreter's share of this folder in a process of its own.
"""

from __future__ import annotations

import os

import torch

collect_ignore = (
    []
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    else ["test_vector_routing.py", "test_trajectory_loss.py", "test_dispatch.py", "test_policy.py"]
)
