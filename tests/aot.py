"""Triton kernels compiled where there is no GPU: record the launches that an op would make, compile them, report.

* ``record(call)`` runs functions of ``fastroute.kernels`` on meta tensors (no memory, any size) and keeps the launches;
  ``record_ops(call)`` does the same for public functions and layers, gradients included.
* ``warm(launch, arch)`` compiles one exactly as its launch would: through Triton's own warm-up, under a driver that
  reports a GPU, so types, divisibility and ``do_not_specialize`` are Triton's. It leaves the kernel in Triton's disk
  cache (TRITON_CACHE_DIR) under the key that a launch on such a GPU looks up. The key has Triton's and ptxas' versions,
  the kernels' source, the architecture and TRITON_ variables in it; ``move_cache`` makes a copied cache valid.
* ``compile_for(launch, arch)`` reads shared memory, registers, spills and instructions from the machine code.
* ``facts_of(launch)`` finds 32-bit integers that could overflow, and memory that is read and written.

TRITON_INTERPRET must be off when triton is first imported. ``python -m tests.aot table`` prints all test files' cases.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests import ranges

#: Bytes that a block may use, and those of a multiprocessor's first-level cache, shared memory included, by compute
#: capability: tables "Technical Specifications per Compute Capability" of the CUDA programming guide.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
FIRST_LEVEL = {80: 192 << 10, 86: 128 << 10, 89: 128 << 10, 90: 256 << 10, 100: 256 << 10, 120: 128 << 10}
OTHERS = (80, 100)  #: one of each other kind than sm_90, which tests compile for, too
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

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a kernel takes on one architecture. Machine code is read, in half a second, when it is asked for."""

    kernel: str
    case: str
    arch: int
    grid: tuple[int, ...]
    tile: str  #: the constants that say how large a block's tile is, with warps and stages
    shared: int  #: bytes per block
    registers: int  #: per thread
    stack: int  #: bytes per thread: spilled registers, 0 is none
    threads: int  #: per block
    tensor_ops: dict[str, int]  #: matrix instructions by kind, as they stand in the code
    cubin: bytes = dataclasses.field(repr=False)

    @cached_property
    def opcodes(self) -> list[str]:
        pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)"
        return re.findall(pattern, _dumped(self.cubin, "--dump-sass"), re.MULTILINE)

    @property
    def math(self) -> dict[str, int]:
        """Matrix instructions and scalar multiply-adds of the machine code."""
        found = Counter(op.split(".")[0] for op in self.opcodes)
        return {op: found[op] for op in ("HGMMA", "UTCHMMA", "HMMA", "DFMA", "FFMA") if found[op]}

    @property
    def loads(self) -> dict[str, int]:
        """Loads from global memory, by bytes of a thread's access."""
        return _by_bytes(self.opcodes, "LDG")

    @property
    def copies(self) -> dict[str, int]:
        """Asynchronous copies from global to shared memory, likewise."""
        return _by_bytes(self.opcodes, "LDGSTS")

    @property
    def stores(self) -> dict[str, int]:
        """Stores to global memory, likewise."""
        return _by_bytes(self.opcodes, "STG")


def spills_stay_near(r: Report) -> bool:
    """What a block spills fits into its multiprocessor's first-level cache, beside its shared memory."""
    return r.shared + r.stack * r.threads <= FIRST_LEVEL[r.arch]


@contextmanager
def _recording(arch: int) -> Iterator[list[Launch]]:
    """Launches through ``fastroute.kernels.launch`` are kept, not made; plans see the shared memory of ``arch``."""
    found: list[Launch] = []

    def keep(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **constants: Any) -> None:
        found.append(Launch(kernel, grid, args, warps, stages, constants))

    with (
        mock.patch("fastroute.kernels.launch.launch", keep),
        mock.patch("fastroute.kernels.launch.SHARED", SHARED_LIMIT[arch]),
    ):
        yield found


_planned_for = 90  #: the architecture that launches are recorded for, unless their recorder says otherwise


def record(call: Callable[[], Any], arch: int | None = None) -> list[Launch]:
    """The launches that ``call`` makes of kernels on meta tensors, without making them."""
    with _recording(arch or _planned_for) as found:
        call()
    return found


def record_ops(call: Callable[[], Any], arch: int = 90) -> list[Launch]:
    """The launches that ops and layers in ``call`` would make on a GPU; all its tensors are on "meta".

    Every op runs what it is registered to run on CUDA, with the backend that it would choose there.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from fastroute.ops import backends

    decide, autocast = backends.decide, torch.autocast

    class OnGpu(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace != "fastroute":
                return func(*args, **(kwargs or {}))
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))

    def chosen(case: Any, request: str) -> Any:
        return decide(dataclasses.replace(case, device="cuda"), request)

    def cast(device: str, **options: Any) -> Any:
        return autocast("cpu" if device == "meta" else device, **options)

    backends._taken.cache_clear()  # what ran on "meta" before
    try:
        with (
            mock.patch.object(backends, "decide", chosen),
            mock.patch("torch.autocast", cast),
            _recording(arch) as found,
            OnGpu(),
        ):
            call()
    finally:
        backends._taken.cache_clear()
    return found


class _Driver:
    """Of a GPU that is not there. Triton keeps kernels by device, whose number is the architecture's."""

    def __init__(self, arch: int, device: int | None = None) -> None:
        self.arch, self.device = arch, arch if device is None else device

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def warm(launch: Launch, arch: int) -> Any:
    """The compiled kernel of a launch on compute capability ``arch``, from Triton's cache if it is there."""
    from triton.runtime import driver

    with mock.patch.object(driver, "_active", _Driver(arch)):
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **options, **launch.constants)


_known_irs: dict[Any, str] = {}


def first_ir(launch: Launch) -> str:
    """Triton's own IR of a launch, before anything that depends on an architecture.

    Made once for launches that differ in which of their arguments are multiples of 16: it computes the same.
    """
    from triton.compiler.compiler import make_backend
    from triton.runtime import driver

    made = []

    def lower(
        key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: Any
    ) -> None:
        from triton._C.libtriton import ir

        what = launch.kernel, str(signature), str(constants), str(options)
        if what in _known_irs:
            made.append(_known_irs[what])
            return
        kernel, backend, context = launch.kernel, make_backend(active.get_current_target()), ir.context()
        source = kernel.ASTSource(kernel, signature, constants, attributes)
        ir.load_dialects(context)
        backend.load_dialects(context)
        codegen, modules, stages = backend.get_codegen_implementation(options), backend.get_module_map(), {}
        backend.add_stages(stages, options, source.language)
        module = source.make_ir(active.get_current_target(), options, codegen, modules, context)
        made.append(_known_irs.setdefault(what, str(stages["ttir"](module, {}))))

    active = _Driver(90, device=-1)
    with mock.patch.object(driver, "_active", active), mock.patch.object(launch.kernel, "_do_compile", lower):
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        launch.kernel.warmup(*launch.args, grid=launch.grid, **options, **launch.constants)
    return made[0]


class Facts(NamedTuple):
    """What a launch does, whatever the architecture."""

    overflows: list[ranges.Overflow]  #: 32-bit integers that may not hold what they should
    shared: set[tuple[str, str]]  #: (an argument that is read, one that is written), in the same memory


def facts_of(launch: Launch) -> Facts:
    """Found by interval arithmetic over the launch's IR: no code is made, so it takes some 50 ms."""
    import torch

    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    tensors = {name: a for name, a in arguments.items() if isinstance(a, torch.Tensor)}
    longest = max((size for t in tensors.values() for size in t.shape), default=0)
    found = ranges.facts(first_ir(launch), launch.grid, arguments, longest)
    storage = {name: t.untyped_storage()._cdata for name, t in tensors.items()}
    both = {(r, w) for r in found.read for w in found.written if storage[r] == storage[w]}
    return Facts(found.overflows, both)


def move_cache(folder: Path) -> int:
    """Make the kernels of a cache that was copied to ``folder`` found there; how many they are.

    Triton notes a kernel's files with their whole paths.
    """
    groups = list(folder.glob("*/__grp__*.json"))
    for group in groups:
        names = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
        group.write_text(json.dumps({"child_paths": here}))
    return len(groups)


def compile_for(launch: Launch, arch: int, case: str = "") -> Report:
    """Compile a recorded launch for compute capability ``arch``."""
    compiled = warm(launch, arch)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    usage = _dumped(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    tensor_ops = {op: len(re.findall(rf"\s{pattern}", ptx)) for op, pattern in _TENSOR_OPS.items()}
    return Report(
        kernel=launch.name,
        case=case,
        arch=arch,
        grid=launch.grid,
        tile=_tile(launch),
        shared=compiled.metadata.shared,
        registers=int(found[1]),
        stack=int(found[2]),
        threads=32 * launch.warps,
        tensor_ops={op: count for op, count in tensor_ops.items() if count},
        cubin=cubin,
    )


_IS_BLOCK = re.compile(r"BLOCK|ROWS_|SUMS_|PIECE$|S$|CP$|J$|HP$")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def _by_bytes(opcodes: Iterable[str], kind: str) -> dict[str, int]:
    """{bytes: how many}, widest first, of one kind of access; 4 bytes are what an opcode does not mention."""
    found = Counter(
        next((_BYTES[part] for part in op.split(".")[1:] if part in _BYTES), 4)
        for op in opcodes
        if op.split(".")[0] == kind
    )
    return {str(width): found[width] for width in sorted(found, reverse=True)}


def _dumped(cubin: bytes, what: str) -> str:
    """What cuobjdump says of machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def planned(launches: Callable[[], Iterable[Launch]], arch: int) -> list[Launch]:
    """Launches as they are planned for an architecture."""
    with mock.patch("tests.aot._planned_for", arch):
        return list(launches())


def reports(name: str, launches: Callable[[], Iterable[Launch]], arch: int = 90) -> list[Report]:
    """Every launch of a case compiled for an architecture, the same kernel once."""
    _may_compile()
    seen: dict[str, Launch] = {}
    for launch in planned(launches, arch):
        seen.setdefault(warm(launch, arch).hash, launch)
    return [compile_for(launch, arch, name) for launch in seen.values()]


def reports_of_largest(cases: Mapping[str, Callable[[], Iterable[Launch]]], arch: int) -> list[Report]:
    """Every kernel in every narrowest dtype, number of warps and of stages that cases give it, in its largest tile.

    These decide how much shared memory is taken and most of the registers. Among forms of one tile, which differ in
    activations, masks and what is wanted, the largest is that with most operations in Triton's own IR.
    """
    _may_compile()
    largest: dict[Any, tuple[tuple[int, int], str, Launch]] = {}
    for name, launches in cases.items():
        for launch in planned(launches, arch):
            dtypes = {a.dtype for a in launch.args if hasattr(a, "dtype") and a.dtype.is_floating_point}
            narrowest = min(dtypes, key=lambda dtype: dtype.itemsize, default=None)
            kind = launch.name, narrowest, launch.warps, launch.stages
            size = _numbers_in_a_tile(launch), _operations(launch)
            if kind not in largest or size > largest[kind][0]:
                largest[kind] = size, name, launch
    return [compile_for(launch, arch, name) for _, name, launch in largest.values()]


def _may_compile() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        import pytest

        pytest.skip("the interpreter makes no code")


def _numbers_in_a_tile(launch: Launch) -> int:
    return math.prod(max(v, 1) for k, v in launch.constants.items() if _IS_BLOCK.match(k))


def _operations(launch: Launch) -> int:
    """Functions as erf and tanh, which are some twenty instructions each, counted as such."""
    ir = first_ir(launch)
    return ir.count(" = ") + 20 * len(re.findall(r" = (?:math|tt\.extern)", ir))


def _tile(launch: Launch) -> str:
    blocks = " ".join(f"{k}{v}" for k, v in launch.constants.items() if _IS_BLOCK.match(k))
    return f"{blocks} w{launch.warps} s{launch.stages}"


def _printed(*arguments: str) -> str:
    """What a program prints, interpreter off."""
    path = os.pathsep.join([str(_ROOT), *(p for p in sys.path if p)])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


def files() -> list[str]:
    """The folders of ``tests/ops`` that have a ``test_aot.py``.

    It has ``CASES``, their ``launches``, the ``KERNELS`` of these, and ``fits``, which asserts what is true of a report
    of any architecture.
    """
    return sorted(path.parent.name for path in _ROOT.glob("tests/ops/*/test_aot.py"))


def file_of(name: str) -> Any:
    return import_module(f"tests.ops.{name}.test_aot")


def table(arch: int = 90) -> str:
    """Markdown: every case of the test files, each kernel and tile once, on one architecture."""
    rows = [
        "| op | case | kernel | tile | registers | spilled | shared | mathematics | loads | stores |",
        "|---" * 10 + "|",
    ]
    for name in files():
        module = file_of(name)
        op = ", ".join(re.findall(r"``(\w+)``", module.__doc__ or ""))
        for case in module.CASES:
            found = reports(case, partial(module.launches, module.CASES[case]), arch)
            for r in {(r.kernel, r.tile): r for r in reversed(found)}.values():
                counts = [" ".join(f"{op} {n}" for op, n in r.math.items())]
                loads = [f"{n} x {width} B" for width, n in r.loads.items()]
                loads += [f"{n} x {width} B async" for width, n in r.copies.items()]
                counts += [", ".join(loads), ", ".join(f"{n} x {width} B" for width, n in r.stores.items())]
                cells = [
                    op,
                    r.case,
                    r.kernel,
                    r.tile,
                    r.registers,
                    f"{r.stack} B",
                    f"{r.shared / 1024:.4g} KB",
                    *counts,
                ]
                rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1:] != ["table"]:
        raise SystemExit("python -m tests.aot table")
    print(table())
