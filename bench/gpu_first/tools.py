"""compute-sanitizer over small launches and Nsight Compute over large ones. An absent tool is recorded as absent."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict

from bench.gpu_first import records

METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes.sum": "MB",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor pipe, %",
}
_UNITS = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1, "us": 1, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6}
_UNITS |= {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1, "Gbyte": 1e3, "%": 1}
SLOWEST = 3


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu_first", *arguments]


def _sanitize(tool: str, backend: str, seconds: float) -> None:
    name = f"{tool}, {backend}"
    path = shutil.which("compute-sanitizer")
    if path is None:
        records.write("tool", name=name, ended="absent")
        return
    asked = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "5", "--launch-timeout", "30"]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation, so its end is seen
    began = time.monotonic()
    try:
        ran = subprocess.run(
            [path, *asked, *_command("small", backend)], env=env, capture_output=True, text=True, timeout=seconds,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        records.write("tool", name=name, ended="time")
        return
    text = ran.stdout + ran.stderr
    found = [line for line in text.splitlines() if line.startswith("=========")]
    ended = "ok" if ran.returncode == 0 else f"exit {ran.returncode}"
    records.write("tool", name=name, ended=ended, seconds=round(time.monotonic() - began, 1),
                  message="\n".join(found[:20]) if ran.returncode else found[-1] if found else "")  # fmt: skip


def kernels_of(text: str) -> list[dict[str, float | str]]:
    """ncu's table, a line for each metric of each launch: the slowest kernels, over their launches."""
    lines = text.splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader(lines[start:]):
        metric = METRICS.get(row.get("Metric Name", ""))
        if metric is None:
            continue
        value = float(re.sub(r"[^\d.eE+-]", "", row["Metric Value"]) or "nan")
        seen[row["Kernel Name"]][metric].append(value * _UNITS.get(row["Metric Unit"], 1))
    found: list[dict[str, float | str]] = []
    for kernel, by in seen.items():
        times = by["us"]
        percent = by["tensor pipe, %"]
        found.append({"kernel": kernel, "launches": len(times), "us": sum(times), "MB": sum(by["MB"]),
                      "tensor pipe, %": sum(percent) / max(len(percent), 1)})  # fmt: skip
    return sorted(found, key=lambda k: -float(k["us"]))[:SLOWEST]


def _profile(what: str, seconds: float) -> None:
    path = shutil.which("ncu")
    if path is None:
        records.write("tool", name=f"ncu, {what}", ended="absent")
        return
    asked = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--metrics", ",".join(METRICS)]
    asked += ["--launch-count", "60", "--target-processes", "all"]
    try:
        ran = subprocess.run(
            [path, *asked, *_command("large", what)], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        records.write("tool", name=f"ncu, {what}", ended="time")
        return
    found = kernels_of(ran.stdout)
    ended = "ok" if found else f"exit {ran.returncode}"
    records.write("tool", name=f"ncu, {what}", ended=ended, kernels=found, message="" if found else ran.stdout[-1000:])


def large(what: str) -> None:
    """One warm call between profiler marks."""
    import torch

    from bench.gpu_first import workloads

    torch.backends.cuda.matmul.allow_tf32 = True
    calls = {
        "vector routing": lambda: workloads.vector_routing("cuda", 200_000, 100, 1024, 1024),
        "experts": lambda: workloads.experts("cuda", 32_768, 8, 128, 2048, 768, torch.bfloat16),
    }
    call = calls[what]()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def use(dry: bool, seconds: float = 58.0) -> None:
    """Most valuable first: each gets at most what is left."""
    end = time.monotonic() + seconds
    steps = [
        lambda s: _sanitize("memcheck", "native", s), lambda s: _sanitize("memcheck", "triton", s),
        lambda s: _profile("vector routing", s), lambda s: _sanitize("racecheck", "native", s),
        lambda s: _profile("experts", s), lambda s: _sanitize("racecheck", "triton", s),
    ]  # fmt: skip
    names = ["memcheck, native", "memcheck, triton", "ncu, vector routing", "racecheck, native", "ncu, experts",
             "racecheck, triton"]  # fmt: skip
    for name, step in zip(names, steps, strict=True):
        left = end - time.monotonic()
        if dry:
            records.write("tool", name=name, ended="absent")
        elif left < 5:
            records.write("tool", name=name, ended="no time left")
        else:
            step(min(left, 25))
