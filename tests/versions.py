"""The suite under every Python and torch that we claim, and one wheel under all of them: ``make test-versions``.

Each combination has a folder of its own outside the checkout, with a copy of the working tree and an environment, and
is built and tested there by the copy's Makefile. What is ready is used again; a failure stops nothing. The table in
docs/compatibility.md is rewritten row by row, when the whole suite was run.

VERSIONS_DIR     where the folders are; ~/.cache/fastroute/versions without it. An environment takes 1 to 6 GB
ONLY             which combinations: beginnings of a Python's and a torch's number, as in ONLY="3.12 2.11"
ARGS             what pytest gets
TORCH_ARGS       what pip gets, as in the Makefile
VERSIONS_KEEP=0  remove each environment after its run
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- begin versions -->", "<!-- end versions -->"
HEADER = ("Python", "torch", "Triton", "NumPy", "extension", "passed", "failed", "skipped", "the wheel", "date", "on")


class Combination(NamedTuple):
    python: str
    torch: str
    triton: str  #: the version that the torch's own metadata asks for: a CPU build asks for none


#: The first builds the wheel that all the others try. It has the newest headers, as a wheel that is built today has.
COMBINATIONS = (
    Combination("3.11", "2.14.1", "3.8.*"),
    Combination("3.10", "2.11.0", "3.6.0"),
    Combination("3.10", "2.12.1", "3.7.1"),
    Combination("3.12", "2.11.0", "3.6.0"),
    Combination("3.12", "2.12.1", "3.7.1"),
    Combination("3.11", "2.13.0", "3.7.1"),
    Combination("3.13", "2.13.0", "3.7.1"),
    Combination("3.13", "2.14.1", "3.8.*"),
)
#: What shows that a wheel's extension gives right numbers: every native op's gradients and values, in float64 or exact.
WHEEL_TESTS = ("tests/ops", "-k", "native and (gradcheck or float64 or same_as_plain_pytorch)")


class Failed(Exception):
    """Why a combination could not be run: one line."""


def interpreter(version: str) -> str:
    """A Python of this version: pyenv's, or the one on PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [*map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python"))), shutil.which(f"python{version}")]
    for path in filter(None, reversed(found)):
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    raise Failed(f"no Python {version} here")


def copy_checkout(to: Path) -> None:
    """The working tree without what git ignores. Files that are the same are left alone, so that builds are reused."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    wanted = {name for name in listed.split("\0") if (ROOT / name).is_file()}
    note = to / ".copied"
    for name in set(note.read_text().split("\0") if note.exists() else ()) - wanted:
        (to / name).unlink(missing_ok=True)
    for name in wanted:
        target = to / name
        data = (ROOT / name).read_bytes()
        if not target.exists() or target.read_bytes() != data:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            shutil.copymode(ROOT / name, target)
    note.write_text("\0".join(sorted(wanted)))


class Run:
    """One combination in its folder."""

    def __init__(self, what: Combination, folder: Path) -> None:
        self.what = what
        self.folder = folder / f"{what.python}-{what.torch}"
        self.source, self.venv = self.folder / "source", self.folder / "venv"
        self.python = str(self.venv / "bin" / "python")

    def call(self, name: str, *command: str, cwd: Path | None = None) -> int:
        """Run with the output in the folder's NAME.log."""
        with (self.folder / f"{name}.log").open("w") as log:
            print("+", *command, file=log, flush=True)
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "VIRTUAL_ENV"))}
            environment["OMP_NUM_THREADS"] = "1"
            environment.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")  # where there is an nvcc: that it compiles
            cwd = cwd or self.source
            return subprocess.run(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode

    def make(self, name: str, target: str, args: str = "") -> int:
        what = self.what
        return self.call(
            name, "make", target, f"VENV={self.venv}", f"PYTHON={interpreter(what.python)}", "NO_VENV=",
            f"TORCH=torch=={what.torch}", f"TORCH_ARGS=triton=={what.triton} {os.environ.get('TORCH_ARGS', '')}",
            f"ARGS={args}",
        )  # fmt: skip

    def said(self, name: str) -> str:
        """The line of a log that says what went wrong, or its last."""
        lines = [line.strip() for line in (self.folder / f"{name}.log").read_text().splitlines() if line.strip()]
        return next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1])

    def prepare(self) -> None:
        """Environment and extension."""
        interpreter(self.what.python)
        self.source.mkdir(parents=True, exist_ok=True)
        copy_checkout(self.source)
        if self.make("install", f"{self.venv}/stamps/ready"):
            raise Failed(self.said("install"))

    def installed(self) -> tuple[str, str, str]:
        """Triton's and NumPy's versions, and whether there is an extension."""
        code = "from importlib.metadata import version; print(version('triton'), version('numpy'))"
        triton, numpy = subprocess.run([self.python, "-c", code], capture_output=True, text=True).stdout.split()
        built = json.loads((self.source / "fastroute" / "_build_info.json").read_text())
        extension = "C++ and CUDA" if built["cuda"] else "C++" if built["built"] else f"none: {built['reason']}"
        return triton, numpy, extension

    def pytest(self, name: str, command: Callable[[str], int]) -> tuple[int, int, int]:
        """(passed, failed, skipped) of a run that is told to write a report; prints what failed."""
        report = self.folder / f"{name}.xml"
        report.unlink(missing_ok=True)
        status = command(f"--junitxml={report}")
        if not report.exists():
            raise Failed(f"{name}: {self.said(name)}")
        suite = next(ElementTree.parse(report).iter("testsuite"))
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                print(f"    {case.get('classname')}::{case.get('name')}", flush=True)
        total, failures, errors, skipped = (int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped"))
        failed = failures + errors
        if status and not failed:
            raise Failed(f"{name}: {self.said(name)}")
        return total - failed - skipped, failed, skipped

    def build_wheel(self, folder: Path) -> None:
        """The wheel that all combinations try, if it uses nothing beyond the stable ABI of Python 3.10."""
        shutil.rmtree(self.source / "dist", ignore_errors=True)
        if self.make("wheel", "wheel"):
            raise Failed(f"wheel: {self.said('wheel')}")
        (made,) = (self.source / "dist").glob("*.whl")
        audit = [self.python, "-m", "abi3audit", "--strict", str(made)]
        install = [self.python, "-m", "pip", "install", "-q", "abi3audit"]
        if self.call("abi3audit", *install) or self.call("abi3audit", *audit):
            raise Failed(f"abi3audit: {self.said('abi3audit')}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copy2(made, folder)

    def try_wheel(self, wheel: Path) -> str:
        """The native ops' tests against the wheel's contents, in a folder without sources."""
        place = self.folder / "wheel"
        shutil.rmtree(place, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        shutil.copytree(self.source / "tests", place / "tests")
        shutil.copy2(self.source / "pyproject.toml", place)
        code = "import os, fastroute._C as C; assert os.path.dirname(C.__file__) == os.path.abspath('fastroute'), C"
        if self.call("wheel-import", self.python, "-c", code, cwd=place):
            return f"failed: {self.said('wheel-import')}"
        pytest = f"{self.python} -m pytest -q -p no:benchmark -n auto --maxprocesses 4 -m".split()

        def run(report: str) -> int:
            return self.call("wheel-tests", *pytest, "not gpu", report, *WHEEL_TESTS, cwd=place)

        passed, failed, _ = self.pytest("wheel-tests", run)
        return f"{failed} failed" if failed else f"{passed} passed"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def row_of(what: Combination, *cells: object) -> str:
    return "| " + " | ".join(map(str, (what.python, what.torch, *cells))) + " |"


def write_row(what: Combination, row: str) -> None:
    """Put a row in its place in the page's table; the other rows stay."""
    before, _, rest = PAGE.read_text().partition(BEGIN + "\n")
    table, _, after = rest.partition(END)
    rows = {tuple(line.split("|")[i].strip() for i in (1, 2)): line for line in table.splitlines()[2:]}
    rows[what.python, what.torch] = row
    order = {(c.python, c.torch): i for i, c in enumerate(COMBINATIONS)}
    lines = [
        f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|",
        *(rows[key] for key in sorted(rows, key=lambda key: order[key]) if key in order),
    ]  # fmt: skip
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


def main() -> int:
    folder = Path(os.environ.get("VERSIONS_DIR") or Path.home() / ".cache" / "fastroute" / "versions").resolve()
    if folder.is_relative_to(ROOT):
        raise SystemExit(f"VERSIONS_DIR: expected a directory outside the checkout, got {folder}")
    only, args = os.environ.get("ONLY", "").split(), os.environ.get("ARGS", "")
    chosen = [c for c in COMBINATIONS if all(c.python.startswith(o) or c.torch.startswith(o) for o in only)]
    if not chosen:
        raise SystemExit(f"ONLY: expected beginnings of {', '.join(f'{c.python} {c.torch}' for c in COMBINATIONS)}")
    today, machine = datetime.date.today().isoformat(), processor()
    good = 0
    for what in chosen:
        run = Run(what, folder)
        print(f"Python {what.python}, torch {what.torch}: {run.folder}", flush=True)
        try:
            run.prepare()
            versions = run.installed()
            if what == COMBINATIONS[0]:
                run.build_wheel(folder / "dist")
            counts = run.pytest("suite", lambda report: run.make("suite", "test", f"{report} {args}"))  # noqa: B023
            wheels = sorted((folder / "dist").glob("*.whl"))
            wheel = run.try_wheel(wheels[-1]) if wheels else "none"
            row = row_of(what, *versions, *counts, wheel, today, machine)
            good += not counts[1] and "failed" not in wheel
        except Failed as error:
            row = row_of(what, "", "", f"not run: {str(error).replace('|', '/')}", "", "", "", "", today, machine)
        print(row, flush=True)
        if not args:
            write_row(what, row)
        if os.environ.get("VERSIONS_KEEP") == "0":
            shutil.rmtree(run.folder, ignore_errors=True)
    print(f"{good} passed, {len(chosen) - good} failed")
    return int(good < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
