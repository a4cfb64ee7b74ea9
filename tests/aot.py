"""Triton kernels compiled where there is no GPU: record the launches an op would make, compile them for a GPU, report.

``record`` runs an op on meta tensors (no memory, any size) and keeps its launches; ``compile_for`` compiles one exactly
as its launch would, and reads shared memory, registers and stack (spills) from the machine code. TRITON_INTERPRET must
be off when triton is first imported, so a test file does this in a process of its own: ``report_of(__file__, name)``
runs the file as a program, which calls ``print_reports``, and returns what it printed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  #: bytes a block may use, by compute capability
FIRST_LEVEL = {80: 192 << 10, 90: 256 << 10, 100: 256 << 10}  #: bytes of a multiprocessor, shared memory included
#: Bytes of stack on sm_90 where Triton 3.9 needs none: older ones keep up to four registers of some kernels in memory.
SPARE = 16 if tuple(map(int, version("triton").split(".")[:2])) < (3, 9) else 0
_TENSOR_OPS = {"mma.sync": r"mma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma"}
_ROOT = Path(__file__).resolve().parents[1]


class Launch(NamedTuple):
    """A launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    warps: int
    stages: int
    constants: dict[str, Any]


class Report(NamedTuple):
    """What a kernel takes on one architecture."""

    kernel: str
    case: str
    arch: int
    grid: tuple[int, ...]
    shared: int  #: bytes per block
    registers: int  #: per thread
    stack: int  #: bytes per thread: spilled registers, 0 is none
    threads: int  #: per block
    tensor_ops: dict[str, int]  #: matrix instructions by kind, as they stand in the code
    async_copies: int


def spills_stay_near(r: Report) -> bool:
    """What a block spills fits into its multiprocessor's first-level cache, beside its shared memory."""
    return r.shared + r.stack * r.threads <= FIRST_LEVEL[r.arch]


def record(call: Callable[[], Any]) -> list[Launch]:
    """The launches that ``call`` makes through ``fastroute.kernels.launch``, without making them."""
    found: list[Launch] = []

    def keep(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **constants: Any) -> None:
        found.append(Launch(kernel, grid, args, warps, stages, constants))

    with mock.patch("fastroute.kernels.launch.launch", keep):
        call()
    return found


def _specialised(value: Any) -> tuple[str, Any, list[list[Any]]]:
    """(type, constant, attributes) that a launch with this argument compiles for."""
    import torch

    names = {
        torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
        torch.uint8: "u8", torch.int64: "i64", torch.int32: "i32",
    }  # fmt: skip
    if value is None:
        return "constexpr", None, []
    if isinstance(value, torch.Tensor):
        return "*" + names[value.dtype], None, [["tt.divisibility", 16]]
    if isinstance(value, float):
        return "fp32", None, []
    if value == 1:
        return "constexpr", 1, []
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), None, ([["tt.divisibility", 16]] if value % 16 == 0 else [])


def compile_for(launch: Launch, arch: int, case: str = "") -> Report:
    """Compile a recorded launch for compute capability ``arch`` (80, 90, 100)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[(index,)] = "constexpr", launch.constants[name]
            continue
        kind, constant, attribute = _specialised(launch.args[index])
        signature[name] = kind
        if kind == "constexpr":
            constants[(index,)] = constant
        if attribute:
            attributes[(index,)] = attribute
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, stack = _resources(compiled.asm["cubin"])
    tensor_ops = {op: len(re.findall(rf"\s{pattern}", ptx)) for op, pattern in _TENSOR_OPS.items()}
    return Report(
        kernel=launch.kernel.fn.__name__,
        case=case,
        arch=arch,
        grid=launch.grid,
        shared=compiled.metadata.shared,
        registers=registers,
        stack=stack,
        threads=32 * launch.warps,
        tensor_ops={op: count for op, count in tensor_ops.items() if count},
        async_copies=len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk\.tensor", ptx)),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def print_reports(cases: Iterable[tuple[str, list[Launch]]], archs: Iterable[int] = tuple(SHARED_LIMIT)) -> None:
    """Compile every launch, each (kernel, element types, constants, architecture) once, and print one report a line."""
    for name, launches in cases:
        seen = set()
        for launch in launches:
            key = (
                launch.kernel,
                str(launch.constants),
                launch.warps,
                tuple(getattr(a, "dtype", None) for a in launch.args),
            )
            if key in seen:
                continue
            seen.add(key)
            for arch in archs:
                print(json.dumps(compile_for(launch, arch, name)._asdict()), flush=True)


def _printed(*arguments: str) -> str:
    """What a program prints, interpreter off."""
    path = os.pathsep.join([str(_ROOT), *(p for p in sys.path if p)])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


def _read(text: str) -> list[Report]:
    return [Report(**json.loads(line)) for line in text.splitlines()]


def report_of(file: str, name: str) -> list[Report]:
    """A test file's case on every architecture."""
    found = _read(_printed(file, name))
    assert {r.arch for r in found} == set(SHARED_LIMIT)
    return found


def reports_of(cases: Sequence[tuple[str, str]], arch: int) -> list[list[Report]]:
    """Of each (test file, case) on one architecture, compiled in one process."""
    programs = [[file, name, str(arch)] for file, name in cases]
    run = "runpy.run_path(sys.argv[0], run_name='__main__'); print('--', flush=True)"
    parts = _printed("-c", f"import runpy, sys\nfor sys.argv in {programs}: {run}").split("--\n")
    found = [_read(part) for part in parts]
    assert not found.pop() and all({r.arch for r in of} == {arch} for of in found)
    return found
