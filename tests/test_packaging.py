"""What is installed, and how: the build backend, version and metadata, the typed package, wheel and source."""

from __future__ import annotations

import importlib.util
import os
import re
import site
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import fastroute
from fastroute.ops import backends
from tests.helpers.subprocesses import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = project["version"]
    assert fastroute.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == version
    assert f"\ndate-released: {newest[2]}\n" in (ROOT / "CITATION.cff").read_text()
    assert {"plots", "hf", "lightning", "demo", "test"} <= set(project["optional-dependencies"])


def test_the_papers_are_those_of_the_docs() -> None:
    cited = set(re.findall(r"arXiv:(\S+)\"", (ROOT / "CITATION.cff").read_text()))
    assert cited == {"2211.11754", "1911.00792", "1711.01239", "1903.12117"}
    prose = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert all(f"arXiv {number}" in prose for number in cited)


# ----------------------------------------------------------------------------------------------------- the backend


@pytest.fixture
def backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """As in pip's build environment: no torch is importable; a version of it may lie in site-packages."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find_spec(name))
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.delenv("FASTROUTE_BUILD", raising=False)
    monkeypatch.setenv("CXX", f"'{sys.executable}'")  # there is one

    def install(version: str) -> Path:
        (tmp_path / "torch").mkdir(exist_ok=True)
        text = f"__version__ = '{version}'\ncuda: str | None = {'None' if '+cpu' in version else repr('13.0')}\n"
        (tmp_path / "torch" / "version.py").write_text(text)
        return tmp_path / "torch"

    return install


def test_a_build_reads_the_torch_beside_it(backend: ModuleType, isolated: Callable[[str], Path]) -> None:
    place = isolated("2.13.0+cpu")
    assert backend.find_torch() == (place, "2.13.0+cpu", None)
    assert "torch>=2.11" not in backend.get_requires_for_build_wheel()
    isolated("2.13.0")
    assert backend.find_torch() == (place, "2.13.0", "13.0")


@pytest.mark.parametrize("version", [None, "2.5.1+cpu"])
def test_a_build_asks_for_a_torch(
    version: str | None, backend: ModuleType, isolated: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If there is none, or an old one; but only where the extension would be built."""
    if version:
        isolated(version)
    with pytest.raises(
        backend.NotBuilt, match=f"{version or 'no torch'}.*: pip install .*'torch>=2.11'".replace("+", ".")
    ):
        backend.find_torch()
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        assert hook()[-1] == "torch>=2.11"
    with monkeypatch.context() as without:
        without.setenv("CXX", "no-such-compiler")
        assert "torch>=2.11" not in backend.get_requires_for_build_wheel()
    monkeypatch.setenv("FASTROUTE_BUILD", "0")
    assert "torch>=2.11" not in backend.get_requires_for_build_wheel()


# ------------------------------------------------------------------------------------------------ outside the tree


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package of this name with a line of C++ and a setup.py that is the house's, under a path of many letters."""
    folder = tmp_path / "a café's #1"
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_text((ROOT / name).read_text())
    for name in ("fastroute/__init__.py", "kernels/__init__.py", "csrc/common/one.cpp"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("given, status, said", [
    ({"CXX": "no-such-compiler -m64"}, 0, r"not built \(no C\+\+ compiler found \(no-such-compiler -m64\)"),
    ({"CXX": "false"}, 0, r"not built \(compile error, exit status 1\)"),
    ({"CXX": "'g++"}, 0, r"not built \(CXX='g\+\+: No closing quotation\)"),
    ({"CXX": " ", "PATH": "/nowhere"}, 0, r"not built \(no C\+\+ compiler found \(c\+\+, g\+\+, clang\+\+\)"),
    ({"CXXFLAGS": "-O2 '", "CXX": "false"}, 0, r"not built \(CXXFLAGS=-O2 ': No closing quotation\)"),
    ({"CXX": "false", "FASTROUTE_BUILD": "require"}, 1, r"not built \(compile error"),
    ({"FASTROUTE_BUILD": "required"}, 1, "^FASTROUTE_BUILD: expected one of 1, 0, require, got 'required'"),
    ({"FASTROUTE_SANITIZE": "yes"}, 1, "^FASTROUTE_SANITIZE: expected one of 0, 1, got 'yes'"),
], ids=str)  # fmt: skip
def test_a_build_with_bad_settings(checkout: Path, given: dict[str, str], status: int, said: str) -> None:
    """Says in one line why there is no extension, and leaves a package that works without."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CXXFLAGS", "FASTROUTE_BUILD")} | given
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert re.search(said, done.stderr, re.MULTILINE) and "Traceback" not in done.stderr, done.stderr
    assert not list(checkout.glob("fastroute/*.so"))


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTROUTE_BUILD")} | environment
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


SMOKE = """
import pathlib, sys, warnings
warnings.simplefilter("error")
import fastroute, torch
from fastroute.compat import torchmtl
assert pathlib.Path(fastroute.__file__).is_relative_to(sys.prefix), fastroute.__file__
x, layer = torch.randn(3, 5, 4), fastroute.EfficientVectorRouting(5, 2, 4, 3)
layer(x).sum().backward()
fastroute.TaskRouter(4, 2, 0.5)(x[:, 0], task=1)
fastroute.MoE(4, 8, num_experts=3, k=2)(x)
from fastroute.ops import flops
import fastroute.kernels.vector_routing.plan
import fastroute.demos.tasks, fastroute.cli
print(fastroute.__version__, fastroute.explain(layer, x)[0].backend)
"""


@pytest.mark.long
def test_wheel_and_source(tmp_path: Path, backend: ModuleType) -> None:
    """A wheel of this tree in an environment of its own: it runs, and a user's program is typed by it."""
    built = backends.extension()[0] is not None
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    run(
        *pip,
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        tmp_path,
        ".",
        FASTROUTE_BUILD="require" if built else "0",
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"fastroute-{re.escape(fastroute.__version__)}-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tracked = run("git", "ls-files", "-z").split("\0")
    sources = {name for name in tracked if name.startswith(("fastroute/", "kernels/"))}
    assert {f"fastroute/{n}" if n.startswith("kernels/") else n for n in sources} <= set(names)
    libraries = [name for name in names if name.endswith(".so")]
    assert libraries == (["fastroute/_C.abi3.so"] if built else []), "and none of torch's"

    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    theirs = next(Path(p) for p in sys.path if (Path(p) / "torch").is_dir())
    (packages / "beside.pth").write_text(f"{theirs}\n")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    said = run(python, "-c", SMOKE, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert said.split() == [fastroute.__version__, "native" if built else "reference"]

    program = tmp_path / "program.py"
    text = (ROOT / "tests" / "helpers" / "typed_program.py").read_text()
    program.write_text(f"{text}\nwrong: int = fastroute.EfficientVectorRouting(4, 2, 8, 8)\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--python-executable", str(python)]
    command += ["--cache-dir", str(tmp_path / "mypy"), str(program)]
    wrong = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    last = len(program.read_text().splitlines())
    assert wrong.count("error:") == 1 and f"program.py:{last}: error:" in wrong, wrong  # and none in the program before
    assert '"EfficientVectorRouting"' in wrong

    name = backend.build_sdist(str(tmp_path)) if Path.cwd() == ROOT else None
    if name:
        with tarfile.open(tmp_path / name) as archive_:
            held = {member.partition("/")[2] for member in archive_.getnames()}
        wanted = {n for n in tracked if n.startswith(("fastroute/", "kernels/", "csrc/"))}
        wanted |= {
            "setup.py",
            "build_backend.py",
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "CHANGELOG.md",
            "CITATION.cff",
        }
        assert wanted <= held
