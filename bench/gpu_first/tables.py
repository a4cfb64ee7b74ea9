"""Tuning tables: a setting of the kernels, its candidates (the present one first), and the time with each."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch

from bench import harness
from bench.gpu_first import records, workloads
from bench.gpu_first.workloads import Call


class Table(NamedTuple):
    """``module.name`` takes each of ``values`` (``None``: as it is) while ``work`` is timed."""

    what: str
    module: str
    name: str
    values: Sequence[Any]
    work: Callable[[str, bool], Call]


def _million(device: str, dry: bool, training: bool = False) -> Call:
    return workloads.vector_routing(device, 500 if dry else 1_000_000, 100, 32 if dry else 1024, 32, training=training)


def _trained_million(device: str, dry: bool) -> Call:
    return _million(device, dry, training=True)


def _mixture(device: str, dry: bool) -> Call:
    sizes = (64, 2, 4, 32, 16) if dry else (32_768, 8, 128, 2048, 768)
    return workloads.mixture(device, *sizes, torch.float32 if dry else torch.bfloat16)


def _matrix(device: str, dry: bool) -> Call:
    return workloads.matrix_routing(device, *((2, 20, 5) if dry else (16, 4096, 64)))


def _rewards(device: str, dry: bool) -> Call:
    return workloads.rewards(device, *((16, 3) if dry else (1024, 20)))


def _experts(device: str, dry: bool, training: bool = False) -> Call:
    sizes = (64, 2, 4, 32, 16) if dry else (32_768, 8, 128, 2048, 768)
    return workloads.experts(device, *sizes, torch.float32 if dry else torch.bfloat16, training=training)


def _outputs(m: int) -> Callable[[str, bool], Call]:
    return lambda device, dry: workloads.vector_routing(device, 200 if dry else 50_000, m, 32 if dry else 256, 32)


TABLES = (
    *(Table(f"second designs: {what}", *setting, [None, other], work) for other, what, setting, work in (
        (True, "vector_routing, 1,000,000 rows, forward: later passes read x in half its bytes",
         ("vector_routing.launch", "force_narrow"), _million),
        (False, "vector_routing, 1,000,000 rows, training: dx at once", ("vector_routing.launch", "force_left"),
         _trained_million),
        (False, "vector_routing, 1,000,000 rows, forward: TF32 operands as they are taken",
         ("vector_routing.launch", "force_turned"), _million),
        (False, "expert_ffn, 128 experts, training: gate and product in one", ("expert_ffn", "force_fused"), _mixture),
        (False, "matrix_routing, 4096 to 64, training: outputs in the kernels",
         ("matrix_routing.launch", "force_folded"), _matrix),
        (True, "networks.Loss, 3 decisions, forward: rewards in the kernel", ("trajectory_loss", "force_rewards"),
         _rewards),
    )),
    Table("vector_routing, 1,000,000 rows, forward: bytes of a chunk", "vector_routing.plan", "SCRATCH",
          [None, 16 << 20, 32 << 20, 128 << 20], _million),
    Table("grouped_linear, 128 experts, forward: tiles", "grouped_linear.plan", "_TENSOR_CORE_TILES",
          [None, ((128, 128), (64, 128), (64, 64), (32, 64), (32, 32), (16, 32), (16, 16))], _experts),
    Table("grouped_linear, 128 experts, forward: row tiles of a group", "grouped_linear.launch", "GROUP", [None, 4, 16],
          _experts),
    *(Table(f"vector_routing, {m} outputs: one pass or two phases", "vector_routing.launch", "force_one_pass",
            [None, True, False], _outputs(m)) for m in (32, 64, 128, 256)),
    Table("dispatch, 8192 entries: up to how many are ranked", "dispatch", "RANKED", [None, 2048],
          lambda device, dry: workloads.plan(device, 8192, 128)),
    Table("grouped_linear, 128 experts, training: rows of a piece", "grouped_linear.plan", "PIECE", [None, 256, 1024],
          lambda device, dry: _experts(device, dry, training=True)),
)  # fmt: skip


def _forget_plans() -> None:
    """Plans are kept by their arguments, and a setting is none of them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastroute.kernels."):
            for member in vars(module).values():
                if hasattr(member, "cache_clear"):
                    member.cache_clear()


def _time(call: Call, device: str, rounds: int) -> float:
    """The median in ms, warm."""
    call()
    sample = harness.sampler(device)
    return 1e3 * statistics.median(sample(call).time for _ in range(rounds))


@contextmanager
def setting(table: Table, value: Any) -> Iterator[Any]:
    """While it lasts, the table's name is ``value``; gives what it is then."""
    module = import_module(f"fastroute.kernels.{table.module}")
    before = getattr(module, table.name)
    made = before if value is None else value
    setattr(module, table.name, made)
    _forget_plans()
    try:
        yield made
    finally:
        setattr(module, table.name, before)
        _forget_plans()


def make(dry: bool) -> None:
    device = "cpu" if dry or not torch.cuda.is_available() else "cuda"
    torch.backends.cuda.matmul.allow_tf32 = True
    for table in TABLES:
        call: Call | None = None
        for value in table.values:
            found: dict[str, Any] = {"table": table.what, "setting": f"{table.module}.{table.name}"}
            try:
                with setting(table, value) as made:
                    found["value"] = str(made) + " (now)" * (value is None)
                    call = call or table.work(device, dry)
                    found["ms"] = _time(call, device, 2 if dry else 9)
            except Exception as error:
                found["message"] = f"{type(error).__name__}: {error}"
            records.write("table", **found)
        del call
        if device == "cuda":
            torch.cuda.empty_cache()
