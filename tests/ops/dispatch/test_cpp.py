"""The CUDA C++ plan where there is no GPU: its algorithm on the host, every .cu compiled, and when it is offered."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastroute.ops import backends
from fastroute.ops.backends import Case, decide, missing, offered
from fastroute.ops.dispatch import op as dispatch
from tests.helpers import seeds
from tests.ops.dispatch.test_op import defined

ROOT = Path(__file__).resolve().parents[3]
CXX = next((c for c in (os.environ.get("CXX", "c++"), "g++", "clang++") if shutil.which(shlex.split(c)[0])), None)
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The algorithm with loops for threads, under the sanitizers where the compiler has them."""
    if CXX is None:
        pytest.skip("no C++ compiler")
    made = tmp_path_factory.mktemp("plan") / "plan"
    command = [*shlex.split(CXX), "-std=c++20", "-O1", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    command += [str(ROOT / "tests/ops/dispatch/plan_host.cpp"), "-o", str(made)]
    sanitized = subprocess.run([*command, "-fsanitize=address,undefined"], capture_output=True, text=True, check=False)
    if sanitized.returncode:
        subprocess.run(command, check=True)
    return made


def run(program: Path, calls: list[tuple[Tensor, int, int, int]]) -> list[list[int]]:
    """(actions, K, warps or 0, backwards) -> order, offsets and beyond, one after the other."""
    lines = [
        " ".join(map(str, (len(a), K, a.stride(0), warps, backwards, *a.as_strided((_span(a),), (1,)).tolist())))
        for a, K, warps, backwards in calls
    ]
    ran = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr[-4000:]
    return [list(map(int, line.split())) for line in ran.stdout.splitlines()]


def _span(a: Tensor) -> int:
    return (len(a) - 1) * a.stride(0) + 1 if len(a) else 0


@pytest.mark.long
def test_the_algorithm(program: Path) -> None:
    """Whatever the number of warps and the order of threads, the plan is the definition's."""
    generator = seeds.generator(0)
    calls = []
    for N in (0, 1, 31, 32, 33, 64, 500, 1025):
        for K in (1, 5, 33, 371, 372, dispatch.NATIVE_MODULES):
            actions = torch.randint(-2, K + 2, (N,), generator=generator)
            apart = torch.stack([actions, actions.flip(0)], 1)[:, 0]
            calls += [(actions, K, 0, 0), (actions, K, 0, 1), (apart, K, 1, 0)]
        calls += [(torch.full((N,), 2), 3, warps, 1) for warps in (1, 3, 32)]
        calls += [(torch.randint(-1, 4, (N,), generator=generator), 4, warps, 0) for warps in (2, 5, 32)]
    calls += [(torch.randint(0, 20, (dispatch.NATIVE_ENTRIES,), generator=generator), 20, 0, 0)]
    extremes = torch.tensor([torch.iinfo(torch.int64).min, 1, torch.iinfo(torch.int64).max, 1 << 32])
    calls += [(extremes, 2, 0, 0)]
    for (actions, K, *_), found in zip(calls, run(program, calls), strict=True):
        order, offsets, beyond = defined(actions, K)
        assert found == [*order, *offsets, beyond], (len(actions), K)


def test_limits_are_those_of_the_source() -> None:
    text = (ROOT / "csrc/common/dispatch_plan.h").read_text()
    assert f"kPlanEntries = {dispatch.NATIVE_ENTRIES};" in text
    assert dispatch.NATIVE_MODULES == 48 * 1024 // 8 - 2


@pytest.mark.long
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=[s.name for s in SOURCES])
def test_cuda_sources_compile(source: Path, tmp_path: Path) -> None:
    """Against the headers of whatever build of torch is here."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations and NVCC is not None
    include = Path(spec.submodule_search_locations[0]) / "include"
    command = [NVCC, "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-arch=sm_90"]
    command += ["-Xptxas=-v", f"-I{ROOT / 'csrc'}", f"-I{include}", "-c", str(source), "-o", str(tmp_path / "made.o")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "0 bytes spill stores" in ran.stderr and "warning" not in ran.stderr.lower(), ran.stderr


def test_when_it_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = offered()["dispatch"]["native"].devices
    assert devices == ("cpu", "cuda") and offered()["grouped_linear"]["native"].devices == ("cpu",)
    assert missing("native", "mps", devices) == "native kernels exist for CPU and CUDA tensors only, these are on mps"
    monkeypatch.setattr(backends, "extension", lambda: ("here", ""))
    monkeypatch.setattr(backends, "build_info", lambda: {"cuda": False, "cuda_reason": "this torch is a CPU build"})
    assert missing("native", "cuda", devices) == "the C++ extension has no CUDA part: this torch is a CPU build"
    monkeypatch.setattr(backends, "build_info", lambda: {"cuda": True})
    assert missing("native", "cuda", devices) is None
    assert missing("native", "cuda") == "native kernels exist for CPU tensors only, these are on cuda"

    def decided(N: int, K: int) -> backends.Decision:
        return decide(Case("dispatch", "cuda", torch.int64, (("N", N), ("K", K))), "auto")

    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    assert decided(dispatch.NATIVE_ENTRIES, dispatch.NATIVE_MODULES).backend == "native"
    for N, K in ((dispatch.NATIVE_ENTRIES + 1, 3), (3, dispatch.NATIVE_MODULES + 1)):
        made = decided(N, K)
        assert made.backend == "reference" and "up to 16384 entries and 6142 modules" in made.rejected["native"]
