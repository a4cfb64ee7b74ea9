"""``make test-isa``: the numeric part of the suite under every instruction set this processor has, on 1 to 3 threads.

By default a covering set: every instruction set and every number of threads in some run. FULL=1: all pairs.
AFTER_TEST=1: without what ``make test`` has, the best instruction set and one thread; where an instruction set is run
on 2 threads and on 3, the cases of every test are dealt out to the two. Arguments go to pytest.
Ends on a line like pytest's that counts the combinations.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.helpers.subprocesses import ROOT

#: What each library is told, the least first; what is not named is left as the best one there is. MKL obeys on Intel's
#: processors only.
SETTINGS: dict[str, dict[str, str]] = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}
CHOSEN = ("FASTROUTE_ISA", *{name: None for settings in SETTINGS.values() for name in settings})
THREADS = (1, 2, 3)

#: Threads, torch's instruction set, and that of our kernels if there are any.
PROBE = """
import torch
from fastroute.ops.backends import extension
ours = torch.ops.fastroute._isa() if extension()[0] else "none"
print(torch.get_num_threads(), torch.backends.cpu.get_cpu_capability().lower(), ours)
"""


#: Files about graphs, what other programs make of them, and what a benchmark does with its time and results.
_NOT_NUMERIC = {"test_compile.py", "test_export.py", "test_onnx.py", "test_gpu_first.py"}


@cache
def is_numeric(path: Path) -> bool:
    """Whether a test file compares numbers, by the helpers that it imports."""
    helpers = r"^from tests\.(helpers\.(budget|opcheck)|tasks\.nets) import"
    return path.name not in _NOT_NUMERIC and re.search(helpers, path.read_text(), re.MULTILINE) is not None


def numeric_files() -> list[Path]:
    """Without what goes through our variants itself, and what is run in Triton's interpreter."""
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    return [path for path in files if is_numeric(path) and path.name not in ("test_isa.py", "test_kernels.py")]


def probe(environment: dict[str, str]) -> list[str]:
    ran = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=environment, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(ran.stderr)
    return ran.stdout.split()


def environment(isa: str, threads: int) -> dict[str, str]:
    """This process's, with an instruction set and a number of threads, which may be more than there are cores."""
    clean = {k: v for k, v in os.environ.items() if k not in CHOSEN}
    count = str(threads)
    more = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "MKL_DYNAMIC": "FALSE", "FASTROUTE_ISA": isa}
    return {"OMP_WAIT_POLICY": "PASSIVE", **clean, **SETTINGS[isa], **more}


def combinations(isas: Sequence[str], full: bool = False, after_test: bool = False) -> list[tuple[str, int]]:
    """Of instruction sets, the best one last, and numbers of threads."""
    if full:
        return [(isa, n) for isa in isas for n in THREADS]
    threads = THREADS[1:] if after_test else THREADS
    isas = isas[:-1] or isas if after_test else isas
    last = max(len(isas), len(threads))
    return [(isas[min(i, len(isas) - 1)], threads[min(i, len(threads) - 1)]) for i in range(last)]


def shares(runs: Sequence[tuple[str, int]]) -> list[list[str]]:
    """What pytest is told in each run: every case once under each instruction set."""
    found = []
    for at, (isa, _) in enumerate(runs):
        alike = [k for k, (other, _) in enumerate(runs) if other == isa]
        found.append([f"--share={alike.index(at)}/{len(alike)}"] if len(alike) > 1 else [])
    return found


def run(isa: str, threads: int, arguments: Sequence[str]) -> bool:
    """Whether one combination passed; what failed is printed whole."""
    env = environment(isa, threads)
    count, capability, ours = probe(env)
    if (count, capability) != (str(threads), isa) or ours not in (isa, "none"):
        print(f"{isa}, {threads} threads: not so: torch has {count}, {capability}, the kernels {ours}", flush=True)
        return False
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "--tb=short", "-n", "auto"]
    command += ["--maxprocesses", "4", "--dist", "worksteal", "-m", "numeric and not gpu and not long"]
    command += ["--ignore", "tests/ops/test_isa.py", *arguments]  # which goes through our variants itself
    if not any((ROOT / each.split("::")[0]).exists() for each in arguments):  # no others are imported
        command += [str(path.relative_to(ROOT)) for path in numeric_files()]
    began = time.monotonic()
    ran = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = ran.stdout.rstrip().splitlines() or [f"exit status {ran.returncode}"]
    if ran.returncode:
        print(*lines[:-1], sep="\n")
    # pytest's own last line counts tests; in other words, so that only the last line of all looks like it
    told = f"ok, {lines[-1]}" if ran.returncode == 0 else f"FAILED, {lines[-1]}"
    print(f"{isa}, {threads} threads: {told} ({time.monotonic() - began:.0f} s)", flush=True)
    return ran.returncode == 0


def main(arguments: Sequence[str]) -> int:
    clean = {k: v for k, v in os.environ.items() if k not in CHOSEN}
    best = probe(clean)[1]
    isas = list(SETTINGS)[: list(SETTINGS).index(best) + 1] if best in SETTINGS else ["default"]
    full, after_test = (os.environ.get(name, "0") == "1" for name in ("FULL", "AFTER_TEST"))
    runs = combinations(isas, full, after_test)
    dealt = shares(runs) if after_test and not full else [[] for _ in runs]
    passed = [run(*each, [*arguments, *share]) for each, share in zip(runs, dealt, strict=True)]
    print(f"{passed.count(True)} passed, {passed.count(False)} failed")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
