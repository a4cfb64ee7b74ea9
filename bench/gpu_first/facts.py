"""What the machine is and how fast it is: versions, the extension, copy bandwidth, matrix rates, a launch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu_first import records
from bench.gpu_first.waves import ROOT

TOOLS = ("nvcc", "compute-sanitizer", "ncu")


def _fact(name: str, value: Callable[[], Any]) -> None:
    """A fact that cannot be had is a fact as well."""
    try:
        found = value()
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    records.write("fact", name=name, value=found)
    print(f"{name}: {found}", flush=True)


def link_kernels() -> str:
    """``fastroute.kernels`` lies beside the package: a link makes it importable where nothing is installed."""
    found = find_spec("fastroute.kernels")
    if found is not None and found.origin and Path(found.origin).resolve().parent == ROOT / "kernels":
        return "found"
    (ROOT / "fastroute" / "kernels").symlink_to("../kernels")
    return "linked"


def _smi() -> str:
    asked = "name,memory.total,memory.used,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def _loads() -> bool | str:
    """Loaded in a process of its own: an extension for another torch may crash."""
    code = "import torch, fastroute, fastroute._C; fastroute.EfficientVectorRouting(8, 2, 4, 4)(torch.ones(1, 8, 4))"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    return True if ran.returncode == 0 else ran.stderr.strip().splitlines()[-1] if ran.stderr else str(ran.returncode)


def launch_microseconds(device: str) -> float:
    """Of the host, for an operator of PyTorch on one number."""
    import torch

    x = torch.zeros(1, device=device)
    for _ in range(100):
        x.add_(1)
    began = time.perf_counter()
    for _ in range(1000):
        x.add_(1)
    return (time.perf_counter() - began) * 1e3


def gather(dry: bool) -> None:
    _fact("nvidia-smi", _smi)
    for tool in TOOLS:
        _fact(tool, lambda tool=tool: shutil.which(tool) or "absent")  # type: ignore[misc]
    _fact("fastroute.kernels", link_kernels)
    _fact("extension loads", _loads)
    import torch

    from bench import harness

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda and not dry else "cpu"
    for key, value in harness.machine().items():
        _fact(key, lambda value=value: value)  # type: ignore[misc]
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        _fact("compute capability", lambda: f"{properties.major}.{properties.minor}")
        _fact("multiprocessors", lambda: properties.multi_processor_count)
        _fact("memory, GB", lambda: round(properties.total_memory / 1e9, 1))
    elif not dry:
        _fact("gpu", lambda: "torch sees none")
    _fact("launch, us", lambda: round(launch_microseconds(device), 2))
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("TF32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        bandwidth, rate = harness.rates(device, dtype, tf32, dry)
        if name == "bf16":
            _fact("copy, GB/s", lambda bandwidth=bandwidth: round(bandwidth / 1e9, 1))  # type: ignore[misc]
        _fact(f"{name}, TFLOP/s", lambda rate=rate: round(rate / 1e12, 3))  # type: ignore[misc]


def build() -> int:
    """The extension for this GPU alone, in a copy of the sources; it takes its place when it is done."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "fastroute"
        left_out = shutil.ignore_patterns(".*", "build", "*.so", "tests", "docs", "bench", "shared")
        shutil.copytree(ROOT, copy, ignore=left_out, symlinks=True)
        env = os.environ | {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "FASTROUTE_BUILD": "require"}
        began = time.monotonic()
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        ran = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
        for made in copy.glob("fastroute/_C*.so"):
            beside = ROOT / "fastroute" / f".{made.name}"
            shutil.copy(made, beside)
            beside.replace(ROOT / "fastroute" / made.name)
    ended = "built" if ran.returncode == 0 else (ran.stderr or ran.stdout)[-2000:]
    records.write("fact", name="extension", value=f"{ended} in {time.monotonic() - began:.0f} s")
    return ran.returncode
