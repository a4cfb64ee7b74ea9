"""The C++ between fences, and under AddressSanitizer and UndefinedBehaviorSanitizer with its allocations all NaN."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpp.test_boundary import fuzz
from tests.helpers.backends import needs_native
from tests.helpers.subprocesses import ROOT, check_python
from tests.ops.vector_routing import cpp_cases as cases

CXX = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)


def runtime(name: str) -> str | None:
    """The compiler's shared library of that name, if it has one."""
    if CXX is None:
        return None
    found = subprocess.run(
        [*CXX.split(), f"-print-file-name={name}"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return found if Path(found).is_absolute() and Path(found).exists() else None


LIBRARIES = [runtime("libasan.so"), runtime("libstdc++.so")]


@pytest.mark.long
@needs_native
def test_native_between_fences() -> None:
    """The same calls of the extension as it was built."""
    cases.run()


ENVIRONMENT: dict[str, str | None] = {
    "LD_PRELOAD": " ".join(filter(None, LIBRARIES)),
    # new[] gives NaN, however much of it; torch's own leaks at exit are not ours to find
    "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sanitized build."""
    if CXX is None:
        pytest.skip("there is no C++ compiler")
    if None in LIBRARIES:
        pytest.skip("the compiler has no shared AddressSanitizer")
    folder = tmp_path_factory.mktemp("sanitized")
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    environment = {**os.environ, "FASTROUTE_SANITIZE": "1", "FASTROUTE_BUILD": "require"}
    built = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    (found,) = (folder / "fastroute").glob("_C*.so")
    return str(found)


@pytest.mark.long
def test_native_under_sanitizers(library: str) -> None:
    printed = check_python(
        f"from tests.ops.vector_routing import cpp_cases as cases; cases.load({library!r}); cases.run()", ENVIRONMENT
    )
    assert printed.splitlines()[-1] == "no findings"


@pytest.mark.long
def test_random_calls_under_sanitizers(library: str, tmp_path: Path) -> None:
    fuzz(20_000, tmp_path / "trace", library, ENVIRONMENT)
