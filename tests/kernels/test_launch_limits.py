"""Every op's launches at the edges of the sizes it takes: grids, 32-bit integers, memory that is read and written.

Tensors are on "meta", so sizes may be any. No tensor of a case takes more than 2^39 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

import fastroute  # noqa: F401 (ops are offered when they are imported)
from fastroute.ops import backends as _backends
from tests import aot

from ..ops.grouped_linear import test_aot as test_aot_dispatch
from ..ops.matrix_routing import test_aot as test_matrix_routing_aot
from ..ops.policy import test_aot as test_aot_policy
from ..ops.soft_assignment import test_aot as test_soft_assignment_aot
from ..ops.task_mask import test_aot as test_task_mask_aot
from ..ops.trajectory_loss import test_aot as test_trajectory_loss_aot
from ..ops.vector_routing import test_aot

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter makes no IR")

GRID = (2**31 - 1, 65535, 65535)
BATCHES = (1, 65535, 65536, 200_000)
MOST = 2**31 - 2**16 - 1  #: of what kernels say they count in 32 bits


def vector(*cases: tuple[int, ...], **options: Any) -> Iterator[aot.Launch]:
    for B, n, m, d in cases:
        yield from test_aot.launches(test_aot.Case(B, n, m, d, "bfloat16", **options))


def narrowed(*cases: tuple[int, ...]) -> Iterator[aot.Launch]:
    for case in cases:
        yield from test_aot.launches(test_aot.Case(*case, "float32", "tf32", narrow=True))


def matrix(*cases: tuple[int, ...], forms: tuple[bool, ...] = (True, False), **options: Any) -> Iterator[aot.Launch]:
    """In these forms: votes that all inputs share, or not."""
    for case in cases:
        for shared in forms:
            yield from test_matrix_routing_aot.launches(test_matrix_routing_aot.Case(*case, shared=shared, **options))


def assigned(*cases: tuple[int, ...], **options: Any) -> Iterator[aot.Launch]:
    for case in cases:
        yield from test_soft_assignment_aot.launches(test_soft_assignment_aot.Case(*case, **options))


def grouped(*cases: tuple[int, ...], **options: Any) -> Iterator[aot.Launch]:
    """With the launches of a plan, so of ``dispatch`` too."""
    for case in cases:
        yield from test_aot_dispatch.launches(test_aot_dispatch.Case(*case, "bfloat16", **options))


def chosen(*cases: tuple[int, ...], **options: Any) -> Iterator[aot.Launch]:
    """N rows, A agents, F features, K choices; and ``agent_policy``."""
    for N, A, F, K in cases:
        yield from test_aot_policy.launches(test_aot_policy.Case(N, A, F, K, K, 0, "float32", **options))


def masked(*shapes: tuple[int, ...], last: bool = False, forms: Any = test_task_mask_aot.FORMS) -> Iterator[aot.Launch]:
    for shape in shapes:
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        yield from test_task_mask_aot.launches_of(x.to(memory_format=torch.channels_last) if last else x, forms)


def lost(*sizes: int, rewards: str = "") -> Iterator[aot.Launch]:
    case = test_trajectory_loss_aot.Case(("REINFORCE", "WPL") * 5, True, rewards=rewards)
    for B in sizes:
        yield from test_trajectory_loss_aot.launches(case, B)


def batches(make: Callable[..., Iterable[aot.Launch]], *rest: int, **options: Any) -> partial[Any]:
    return partial(make, *((B, *rest) for B in BATCHES), **options)


#: Every form with large batches, and two of the four with each other size.
LIKE, UNLIKE = ((False, False), (True, True)), ((False, True), (True, False))
MASKS = {
    "batches": batches(masked, 3, 5), "batches, channels last": batches(masked, 3, 2, 2, last=True),
    "one number": partial(masked, (1, 1), (1, 1, 1, 1)), "wide": partial(masked, (2, 70_000, 200, 200), forms=LIKE),
    "long": partial(masked, (1, 1, 2**31 + 5), (3, 64, 2**27), forms=UNLIKE),
    "most rows": partial(masked, (2**31 - 2**17, 8), forms=LIKE),
    "many channels": partial(masked, (3, 2**30), (2, 2**20, 7), forms=UNLIKE),
}  # fmt: skip
POLICIES = {
    "batches": batches(chosen, 1, 8, 10, planned=False), "planned": batches(chosen, 20, 128, 20),
    "tables": batches(chosen, 7, 1, 20, tables=True), "one": partial(chosen, (1, 1, 1, 1)),
    "2^31 scores": partial(chosen, (200_000_000, 3, 64, 20)), "most choices": partial(chosen, (4096, 300, 512, 256)),
    "most rows": partial(chosen, (2**31 - 1, 1, 4, 2)), "wide": partial(chosen, (8, 100, 2**22, 250)),
}  # fmt: skip
PRODUCTS = {
    "batches": batches(grouped, 20, 128, 48), "ones": partial(grouped, (1, 1, 1, 1)),
    "most rows": partial(grouped, (MOST, 3, 16, 16), (MOST, 3, 1, 8), activation=4),
    "2^31 weights": partial(grouped, (1000, 1024, 2048, 2048), stacked=True, activation=1),
    "wide": partial(grouped, (10, 2, 2**23, 300), (10, 2, 300, 2**23), activation=1),
    "many modules": partial(grouped, (50, 2**20, 7, 9), (9000, 2**21, 1, 1), stacked=True),
}  # fmt: skip
EDGES: dict[str, dict[str, Callable[[], Iterable[aot.Launch]]]] = {
    "vector_routing": {
        "batches": batches(vector, 3, 5, 8), "linear": batches(vector, 3, 5, 8, linear=True),
        "padded": batches(vector, 20, 5, 8, masked=True), "ones": partial(vector, (1, 1, 1, 1)),
        "2^31 inputs": partial(vector, (1, 3_000_000, 100, 1024), (70, 500_000, 64, 64)),
        "most outputs": partial(vector, (3, 10, 16384, 8)), "2^31 betas": partial(vector, (1, 300_000, 8192, 16)),
        "most rows": partial(vector, (1, MOST, 2, 3)), "widest": partial(vector, (2, 3, 4, MOST)),
        "narrow": partial(narrowed, (65536, 3, 5, 8), (1, 3_000_000, 100, 1024), (1, MOST, 2, 3), (2, 3, 4, MOST)),
    },
    "dispatch": PRODUCTS,
    "grouped_linear": PRODUCTS,
    "policy": POLICIES,
    "agent_policy": POLICIES,
    "matrix_routing": {
        "batches": batches(matrix, 3, 5, 4, 4, 4), "masked": batches(matrix, 9, 5, 2, 3, 3, forms=(True,), masked=True),
        "ones": partial(matrix, (1, 1, 1, 1, 1, 1), forms=(False,)),
        "2^31 results": partial(matrix, (200_000, 4, 64, 16, 4, 16)),
        "2^31 inputs": partial(matrix, (4, 2_100_000, 10, 16, 16, 16)),
        "most rows": partial(matrix, (1, MOST, 2, 1, 2, 2)),
        "most outputs": partial(matrix, (3, 10, 16384, 2, 2, 2), forms=(True,)),
        "largest capsule": partial(matrix, (3, 10, 7, 64, 30, 64), forms=(False,)),
    },
    "soft_assignment": {
        "batches": batches(assigned, 7, 5, 8, betas="own"),
        "same votes": batches(assigned, 7, 5, 8, shared="b", betas="shared"),
        "slots": batches(assigned, 64, 7, 16, shared="m", padded=True), "ones": partial(assigned, (1, 1, 1, 1)),
        "2^31 votes": partial(assigned, (200_000, 64, 64, 64)),
        "most outputs": partial(assigned, (3, 100, 512, 8), betas="own"),
        "most rows": partial(assigned, (1, MOST, 2, 2), betas="shared"),
        "2^31 columns": partial(assigned, (1, 2, 2, MOST)),
    },
    "task_mask": MASKS,
    "batch_norm_mask_relu": MASKS,
    "trajectory_loss": {
        "batches": partial(lost, *BATCHES), "2^31 rows": partial(lost, 2**31 + 1),
        "2^31 scores": partial(lost, 50_000_000, rewards="classes"),
        "shares": partial(lost, 2**31 + 1, rewards="counted"),
    },
}  # fmt: skip

#: Memory that a launch reads and writes. Every program writes only what no other one reads.
OWN = {
    # the gradients of its rows, or of its tile of parameters, to which it adds
    ("backward_kernel", name): "rows"
    for name in ("d_gate", "d_use", "d_ign", "d_score_weight", "d_score_bias")
} | {
    ("spread_kernel", "dx"): "a tile",
    ("spread_kernel", "gate_weight_grad"): "a tile, of all samples",
    ("aggregate_kernel", "total"): "a tile of its split",
    ("aggregate_kernel", "sums"): "a tile of its split",
    ("assign_kernel", "weight"): "whole rows of pairs",
    ("assign_backward_kernel", "weight"): "whole rows of pairs",
    ("assign_backward_kernel", "slope"): "whole rows of pairs",
    ("assign_backward_kernel", "d_use"): "rows, of all samples",
    ("assign_backward_kernel", "d_ign"): "rows, of all samples",
    ("gradient_kernel", "d_W"): "outputs of its inputs, of all samples, or of its split",
    ("gradient_kernel", "d_bias"): "outputs of its inputs, of all samples, or of its split",
    **{("shared_sums_kernel", name): "a tile" for name in ("W", "bias", "use", "ign")},
    ("statistics_kernel", "running_mean"): "channels",
    ("statistics_kernel", "running_var"): "channels",
    ("forward_kernel", "loss"): "samples, of decisions that were before",
    ("mask_kernel", "x"): "a tile",  # in place
}  # fmt: skip


def numbers(launch: aot.Launch) -> list[int]:
    """The grid, the arguments, and the sizes of those that are tensors."""
    sizes = [a.numel() if isinstance(a, torch.Tensor) else a for a in launch.args]
    return [*launch.grid, *(n for n in sizes if isinstance(n, int))]


def distinct(launches: Iterable[aot.Launch]) -> list[aot.Launch]:
    """The first and the last of each kernel that is compiled alike; one of them if it is in no number the smaller."""
    found: dict[Any, list[aot.Launch]] = {}
    for launch in launches:
        kinds = tuple(a.dtype if isinstance(a, torch.Tensor) else type(a) for a in launch.args)
        found.setdefault((launch.name, str(launch.constants), kinds), []).append(launch)
    kept = []
    for first, *others in found.values():
        last = others[-1] if others else first
        less = [a <= b for a, b in zip(numbers(first), numbers(last), strict=True)]
        more = [a >= b for a, b in zip(numbers(first), numbers(last), strict=True)]
        kept += [last] if all(less) else [first] if all(more) else [first, last]
    return kept


@triton.jit
def running_sums(x, out, rows, row, WIDE: tl.constexpr):
    """grid (rows,): of what a row's 128 numbers are times their number, each 128 rows apart."""
    i = tl.program_id(0) * row
    if WIDE:
        i = tl.program_id(0).to(tl.int64) * row
    total = tl.zeros([128], tl.float32)
    for start in range(0, rows, 128):
        total += tl.load(x + i + tl.arange(0, 128)) * start
    tl.store(out + i + tl.arange(0, 128), total)


def test_what_is_found() -> None:
    """An offset of 2^31, if it is made in 32 bits, and memory that is read and written: in the place where that is."""

    def facts(rows: int, *, wide: bool = False, apart: bool = True) -> aot.Facts:
        x, out = (torch.empty(2**31, device="meta") for _ in range(2))
        args = x, out if apart else x, rows, 1024
        return aot.facts_of(aot.Launch(running_sums, (rows,), args, 4, 1, {"WIDE": wide}))

    assert facts(2**21) == facts(2**22, wide=True) == ([], set())
    [overflow] = facts(2**21 + 1).overflows
    assert overflow.place.startswith("test_launch_limits.py:") and overflow.range == (0, 2**31)
    assert facts(5, apart=False).shared == {("x", "out")}


CASES = {id(edges): (op, edges) for op, edges in EDGES.items()}.values()


def test_every_op_has_edges() -> None:
    offering = {op for op, backends in _backends.offered().items() if "triton" in backends}
    assert set(EDGES) == offering, "EDGES has the largest calls of every op with Triton kernels"


#: Of each op, those of `make test`.
FEW = ("batches", "one", "ones")


@pytest.mark.parametrize("op, case", [
    pytest.param(op, case, marks=() if case in FEW else pytest.mark.long) for op, edges in CASES for case in edges
])  # fmt: skip
def test_launches(op: str, case: str) -> None:
    """CUDA takes every axis of a grid, 32-bit integers do not overflow, and no program reads what others write."""
    launches = list(EDGES[op][case]())
    for launch in launches:
        assert all(0 < size <= most for size, most in zip(launch.grid, GRID, strict=False)), launch
    for launch in distinct(launches):
        facts = aot.facts_of(launch)
        assert not facts.overflows, (launch.name, launch.grid, facts.overflows)
        for read, written in facts.shared:
            assert read == written or written == "out", (launch.name, read, written)
            assert (launch.name, read) in OWN, (launch.name, read, written)


def test_larger_masks_are_not_launched() -> None:
    from fastroute.kernels import task_mask

    x, mapping = torch.empty(2**31, 8, device="meta"), torch.empty(3, 8, device="meta")
    assert aot.record(lambda: task_mask.rectify(x, mapping, None, 0)) == []


def test_larger_assignments_are_refused() -> None:
    from fastroute.kernels.soft_assignment import unsupported

    for sizes in ((2**31, 1, 2, 2), (1, 2, 2, 2**31), (2**22, 2**16, 2, 2)):
        assert "in 32 bits" in str(unsupported("cuda", torch.float32, *sizes))
    assert unsupported("cuda", torch.float32, 65536, 1000, 100, 64) is None


@pytest.mark.parametrize("backward", [False, True])
def test_rows_of_pairs_have_one_for_each_thread(backward: bool) -> None:
    """They are read and written in one place: a second thread with the same pair could read what the first wrote."""
    from fastroute.kernels.matrix_routing.plan import MAX_OUTPUTS, plan

    for m in (1, 2, 3, 4, 100, 1000, MAX_OUTPUTS):
        row = plan(2, 100, m, 2, 2, 2, shared=False, backward=backward).row
        assert row.inputs * row.outputs >= 32 * row.warps, m
