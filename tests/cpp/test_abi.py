"""The extension compiles for arm64 too, and needs nothing of torch but its stable ABI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastroute.ops import backends
from tests.helpers.subprocesses import ROOT

ARM64 = "aarch64-linux-gnu-"
#: torch's C interface, and Python's, of which the limited API is all that the headers show; what linkers leave weak;
#: and, weak as well, what tells the libraries of torch's products how many threads to use.
_THREADS = r"MKL_Set_Num_Threads_Local|omp_(set_num|get_max)_threads"
ALLOWED = re.compile(rf"U (aoti_torch_|torch_|_?Py)\w+|w (aoti_torch_\w+|__gmon_start__|_ITM_\w+|{_THREADS})")


def output(*command: str, **environment: str) -> str:
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


def unstable(library: Path, nm: str) -> list[str]:
    """Undefined symbols that are neither of the stable ABI nor, with a version, of a system's library."""
    symbols = output(nm, "-D", "-C", "--undefined-only", "--with-symbol-versions", str(library)).splitlines()
    assert any("torch_call_dispatcher" in line for line in symbols)
    return [line for line in map(str.strip, symbols) if "@" not in line and not ALLOWED.fullmatch(line)]


@pytest.mark.skipif(backends.extension()[0] is None, reason="the C++ extension is not built")
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="there is no GNU nm")
def test_the_stable_abi_is_enough() -> None:
    where, _ = backends.extension()
    assert where is not None and unstable(Path(where), "nm") == []


@pytest.mark.skipif(backends.extension()[0] is None, reason="the C++ extension is not built")
@pytest.mark.skipif(sys.platform != "linux", reason="libraries have no versions of symbols")
def test_it_runs_on_linux_as_old_as_torchs_wheels_do() -> None:
    """manylinux_2_28, whatever compiler built it: see csrc/common/older_linux.cpp."""
    if backends.build_info()["cuda"]:
        pytest.skip(
            "nvcc puts CUDA's static runtime in, which takes the functions of the C library that it is linked on"
        )
    where, _ = backends.extension()
    assert where is not None
    for name, newest in ((rb"GLIBC_2\.", 28), (rb"GLIBCXX_3\.4\.", 24), (rb"CXXABI_1\.3\.", 11)):
        found = [int(version) for version in re.findall(name + rb"(\d+)(?:\.\d+)*\0", Path(where).read_bytes())]
        assert found and max(found) <= newest, (name, max(found))


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which(f"{ARM64}g++") is None,
    reason="there is no aarch64-linux-gnu-g++: apt-get install g++-aarch64-linux-gnu",
)
def test_arm64(tmp_path: Path) -> None:
    """Compiled and linked by setup.py itself, against an empty libtorch_cpu."""
    empty = ROOT / "build" / "arm64"  # of one name each time, which is part of what setup.py keeps objects by
    empty.mkdir(parents=True, exist_ok=True)
    stub = f"{ARM64}g++ -shared -x c++ /dev/null -o".split()
    output(*stub, str(empty / "libtorch_cpu.so"))
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    unoptimized = {"CXXFLAGS": "-O0", "FASTROUTE_BUILD": "require", "FASTROUTE_SANITIZE": "0"}
    output(*build, CXX=f"{ARM64}g++ -L{empty}", **unoptimized)
    (library,) = (tmp_path / "fastroute").glob("_C*.so")
    assert "AArch64" in output(f"{ARM64}readelf", "-h", str(library))
    assert unstable(library, f"{ARM64}nm") == []
