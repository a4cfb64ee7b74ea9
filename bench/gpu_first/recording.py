"""A pytest plugin that runs the GPU's tests and rows on meta tensors and compiles the kernels that they would launch.

Whatever asks for "cuda" gets "meta", and ``torch.cuda`` answers for an H100. A test ends where it first needs a value;
what it launched until then is compiled for the cache. ``python -m bench.gpu_first cache`` loads it.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench.gpu_first import tables
from tests import aot
from tests.helpers import seeds

ARCH = "GPU_FIRST_ARCH"
#: ``time.monotonic()`` after which nothing more is compiled.
END = "GPU_FIRST_CACHE_END"

_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", multi_processor_count=132, shared_memory_per_block_optin=227 << 10,
    total_memory=85 << 30, major=9, minor=0, L2_cache_size=50 << 20,
)  # fmt: skip
_NOTHING = ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode", "manual_seed_all")
_ANSWERS = {
    "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
    "get_device_properties": _H100, "get_device_name": _H100.name, "mem_get_info": (80 << 30, 85 << 30),
    "memory_allocated": 0, "max_memory_allocated": 0, "is_current_stream_capturing": False,
}  # fmt: skip


def _moved(value: Any) -> Any:
    if isinstance(value, torch.device | str) and str(value).split(":")[0] == "cuda":
        return torch.device("meta")
    return value


class _OnMeta(TorchFunctionMode):
    """CUDA's device is "meta", and nothing is drawn."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0].to("meta")
        given = {k: _moved(v) for k, v in (kwargs or {}).items() if k != "generator"}
        return func(*map(_moved, args), **given)


@contextmanager
def _on_an_h100() -> Iterator[None]:
    with _OnMeta(), mock.patch("torch.cuda.device", lambda _: nullcontext()):
        yield


def _settle_for_answers() -> None:
    for name in _NOTHING:
        setattr(torch.cuda, name, lambda *_, **__: None)
    for name, answer in _ANSWERS.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    generator = seeds.generator
    seeds.generator = lambda seed=0, device="cpu": generator(seed)


class _NoTruth:
    """Nothing is compared on meta tensors."""

    exact: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def excess(self, found: Any) -> tuple[str, float]:
        return "", 0.0


def _race(benchmark: Any, subject: Any, rivals: Any, *_: Any, **__: Any) -> None:
    """One pass of each of fastroute's contestants; the last, as its sampler would not return."""
    for one in (subject, *rivals):
        if one.name.startswith("fastroute") and not one.name.endswith("graph"):
            one.results()
    raise RuntimeError("that was all")


def pytest_configure(config: pytest.Config) -> None:
    _settle_for_answers()
    if config.pluginmanager.hasplugin("benchmark") and config.getoption("--benchmark-only", False):
        from bench import harness

        harness.Truth, harness.race = _NoTruth, _race  # type: ignore[assignment, misc]


counts = {"calls": 0, "with launches": 0, "compiled": 0, "failed": 0}
_seen: set[Any] = set()


def _key(launch: Any) -> Any:
    """As much as tells most launches apart: Triton's own key decides."""

    def kind(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype
        return (value == 1, value % 16 == 0, value >= 2**31) if isinstance(value, int) else type(value)

    return launch.kernel, str(launch.constants), launch.warps, launch.stages, tuple(map(kind, launch.args))


def _compile(launch: Any) -> None:
    """Into Triton's cache, under the key of a launch on the GPU; its launcher, which is C, as well."""
    from triton.backends.nvidia import driver

    kernel = aot.warm(launch, int(os.environ[ARCH]))
    # nothing here can load it
    with mock.patch.object(driver, "library_dirs", lambda: [_stubs()]), suppress(ImportError):
        driver.CudaLauncher(kernel.src, kernel.metadata)


@cache
def _stubs() -> str:
    """A folder with what stands for the driver's library when something is linked; the GPU machine has the real one."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    folder = Path(tempfile.mkdtemp())
    here = Path(driver.__file__)
    source = (here.parent / "driver.c").read_text()
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", source + here.read_text())))
    (folder / "stub.c").write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in names))
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so", "stub.c"]
    subprocess.run(command, cwd=folder, check=True)
    (folder / "libcuda.so.1").symlink_to("libcuda.so")
    ctypes.CDLL(str(folder / "libcuda.so"), mode=ctypes.RTLD_GLOBAL)  # or it would be compiled for every kernel anew
    with suppress(ImportError):
        compile_module_from_src(
            src=source, name="cuda_utils", library_dirs=[str(folder)], include_dirs=driver.include_dirs,
            libraries=driver.libraries,
        )  # fmt: skip
    return str(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Run the test until it needs a value, then compile what it launched."""
    if time.monotonic() > float(os.environ[END]):
        pytest.skip("no time left to compile")
    names = pyfuncitem._fixtureinfo.argnames
    given = {name: pyfuncitem.funcargs[name] for name in names}
    vector = sys.modules.get("bench.bench_vector_routing")
    if vector is not None:
        vector.MANY = 1 << 60

    def call() -> None:
        with suppress(Exception, pytest.skip.Exception, pytest.fail.Exception), _on_an_h100():
            pyfuncitem.obj(**given)

    compile_all(pyfuncitem.nodeid, call)
    return True


def compile_all(name: str, call: Callable[[], object]) -> None:
    """What ``call`` would launch, but for what was compiled before."""
    launches = aot.record_ops(call, int(os.environ[ARCH]))
    counts["calls"] += 1
    counts["with launches"] += bool(launches)
    for launch in launches:
        if (key := _key(launch)) in _seen or time.monotonic() > float(os.environ[END]):
            continue
        _seen.add(key)
        try:
            _compile(launch)
            counts["compiled"] += 1
        except Exception as error:
            counts["failed"] += 1
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.__stderr__)


def compile_tables(made: Sequence[tables.Table] = tables.TABLES) -> None:
    """The launches of the tuning tables, with every setting."""
    _settle_for_answers()
    torch.backends.cuda.matmul.allow_tf32 = True
    for table in made:
        for value in table.values:
            with tables.setting(table, value), suppress(Exception):
                compile_all(table.what, lambda table=table: table.work("meta", False)())
    print(", ".join(f"{n} {what}" for what, n in counts.items()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(", ".join(f"{n} {what}" for what, n in counts.items()))
