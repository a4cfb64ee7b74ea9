"""The rows that are timed, most valuable first, and what they are expected to take. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Rates(NamedTuple):
    """Of the machine, as the run measured them: GB/s of a copy, TFLOP/s of large products."""

    copy: float
    bf16: float
    tf32: float
    fp32: float


#: Where nothing was measured: an H100.
ASSUMED = Rates(copy=3000.0, bf16=700.0, tf32=400.0, fp32=50.0)
#: Microseconds from one small kernel to the next in a graph.
LAUNCH_US = 2.5


def by_bytes(gigabytes: float) -> Callable[[Rates], float]:
    return lambda r: gigabytes / r.copy * 1e3


def by_flops(gigaflop: float, rate: str, share: float = 1.0) -> Callable[[Rates], float]:
    return lambda r: gigaflop / (getattr(r, rate) * share)


def by_launches(count: float, us: float = LAUNCH_US) -> Callable[[Rates], float]:
    return lambda r: count * us / 1e3


class Prediction(NamedTuple):
    """Milliseconds of a contestant in a row.

    Attributes:
        row: the row's node id.
        formula: the same as ``ms``, in words.
        next: what to try where the row is much slower.
        who: the contestant.
        target: milliseconds that are asked for, if any.
    """

    row: str
    formula: str
    ms: Callable[[Rates], float]
    next: str
    who: str = "fastroute"
    target: float | None = None


def _vector(case: str, what: str) -> str:
    return f"bench/bench_vector_routing.py::test_vector_routing[{case}-{what}-1thread]"


_MILLION = "B1-n1000000-m100-d1024-h1024-float32-tf32"
_MILLION_FP32, _MILLION_BF16 = "B1-n1000000-m100-d1024-h1024-float32", "B1-n1000000-m100-d1024-h1024-bfloat16"
_BATCH = "B4-n2000-m1000-d1024-h2048-bfloat16"
_SMALL = "B4-n50-m10-d64-h64-float32"
_EXPERTS = "bench/bench_experts.py::test_experts[T32768-k8-K128-2048x768-bfloat16-{}-1thread]"
_SELECTION = "bench/bench_dispatch.py::test_dispatch[B1024-K20-1thread]"
_STEP = "bench/bench_networks.py::test_networks[REINFORCE-B256-K20-A20-1thread]"
_MASK = "bench/bench_task_mask.py::test_task_mask[{}-64x256x32x32-1thread]"
_MATRIX = "bench/bench_matrix_routing.py::test_matrix_routing[B16-n4096-m64-c4-d4-h4-{}-1thread]"
_HEADS = "bench/bench_multitask.py::test_multitask[heads-100-256-32-2-B64-training-1thread]"
_LIVE = "bench/bench_tasks.py::test_tasks[vgg11-B64-S224-one-training-1thread]"

PREDICTIONS = (
    Prediction(_vector(_MILLION, "forward"), "24.3 GB by its launches / copy", by_bytes(24.3),
               "vector_routing.force_narrow: 20.1 GB; SCRATCH of vector_routing_plan", target=5.0),
    Prediction(_vector(_MILLION, "training"), "63.9 GB by its launches / copy", by_bytes(63.9),
               "gradients of rows: W_A's and dx are 12 of them", target=20.0),
    Prediction(_vector(_MILLION_BF16, "forward"), "12.8 GB / copy", by_bytes(12.8), "tiles of score and aggregate"),
    Prediction(_vector(_MILLION_BF16, "training"), "37 GB / copy", by_bytes(37.0), "tiles of spread"),
    Prediction(_vector(_BATCH, "forward"), "99 GFLOP / (0.44 bf16)", by_flops(99, "bf16", 0.44),
               "tiles of score, aggregate and spread"),
    Prediction(_vector(_BATCH, "training"), "332 GFLOP / (0.44 bf16)", by_flops(332, "bf16", 0.44), "tiles of spread"),
    Prediction(_EXPERTS.format("forward"), "825 GFLOP / (0.5 bf16)", by_flops(825, "bf16", 0.5),
               "128 x 128 tiles with two blocks on a multiprocessor; GROUP"),
    Prediction(_EXPERTS.format("training"), "2474 GFLOP / (0.41 bf16)", by_flops(2474, "bf16", 0.41),
               "dx first: its loop has 12 steps"),
    Prediction(_SELECTION, "3 kernels of 5 us", by_launches(3, 5.0), "tiles of 16 x 32; one launch for both gradients",
               who="fastroute, graph", target=0.040),
    Prediction(_STEP, "100 launches of 2.5 us", by_launches(100), "trajectory_loss.force_rewards",
               who="fastroute, graph", target=0.250),
    Prediction(_vector(_SMALL, "forward"), "8 launches of 2.5 us", by_launches(8), "fewer launches per iteration",
               who="fastroute, graph"),
    Prediction(_vector(_SMALL, "training"), "30 launches of 2.5 us", by_launches(30), "fewer launches per iteration",
               who="fastroute, graph"),
    Prediction(_MASK.format("mask"), "0.0336 GB / (0.85 copy)", by_bytes(0.0336 / 0.85), "16-byte accesses in the PTX"),
    Prediction(_MASK.format("relu"), "0.235 GB / (0.85 copy)", by_bytes(0.235 / 0.85), "16-byte accesses in the PTX"),
    Prediction(_MASK.format("norm"), "0.336 GB / (0.7 copy)", by_bytes(0.336 / 0.7), "sums and normalise in one pass"),
    Prediction(_MATRIX.format("forward"), "57 GFLOP of FMA / (0.5 fp32)", by_flops(57, "fp32", 0.5),
               "numbers per thread in matrix_routing_plan"),
    Prediction(_HEADS, "300 us of the host", by_launches(1, 300.0), "a graph"),
    Prediction(_vector(_MILLION_FP32, "forward"), "615 GFLOP / (0.7 fp32)", by_flops(615, "fp32", 0.7),
               "TF32 products"),
)  # fmt: skip

#: Everything that is timed, in order.
ROWS = (
    *(p.row for p in PREDICTIONS[:2]),
    *(p.row for p in PREDICTIONS[4:14]),
    *(p.row for p in PREDICTIONS[2:4]),
    *(p.row for p in PREDICTIONS[14:]),
    _vector(_MILLION_FP32, "training"),
    _MATRIX.format("training"),
    _LIVE,
)

#: What a run without a GPU times, in small: one of each suite.
DRY_ROWS = (_vector(_SMALL, "training"), _EXPERTS.format("training"), _SELECTION, _MASK.format("mask"), _HEADS)
