"""A case of every file of kernels, compiled for one architecture: that they still compile, and fit."""

from __future__ import annotations

import pytest

from tests import aot

from ..ops.expert_ffn import test_aot as test_expert_ffn_aot
from ..ops.grouped_linear import test_aot as test_aot_dispatch
from ..ops.matrix_routing import test_aot as test_matrix_routing_aot
from ..ops.policy import test_aot as test_aot_policy
from ..ops.soft_assignment import test_aot as test_soft_assignment_aot
from ..ops.task_mask import test_aot as test_task_mask_aot
from ..ops.trajectory_loss import test_aot as test_trajectory_loss_aot
from ..ops.vector_routing import test_aot

pytest.importorskip("triton")
CASES = {
    test_aot: "small-ieee", test_aot_dispatch: "selection", test_aot_policy: "routed", test_task_mask_aot: "last-bf16",
    test_trajectory_loss_aot: "wpl", test_soft_assignment_aot: "routing", test_matrix_routing_aot: "odd-bf16",
    test_expert_ffn_aot: "small",
}  # fmt: skip


@pytest.mark.long
def test_fits() -> None:
    found = aot.reports_of([(str(file.__file__), name) for file, name in CASES.items()], 90)
    for (file, name), reports in zip(CASES.items(), found, strict=True):
        file.check(name, reports)
