"""What docs/newcomer.md says of one process and its surroundings, in one process that has them all."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastroute.cli import main
from tests.helpers.subprocesses import ROOT

PROGRAM = """
import copy, io, pickle, sys, threading, warnings

import torch
from torch.torch_version import TorchVersion

version, torch.__version__ = torch.__version__, TorchVersion("2.10.0+cpu")
try:
    import fastroute
except ImportError as error:
    print(error)
torch.__version__ = version
for name in [name for name in sys.modules if name.partition(".")[0] == "fastroute"]:
    del sys.modules[name]

import fastroute

if torch.get_num_threads() != 1:
    sys.exit("threads")
layer, x = fastroute.EfficientVectorRouting(5, 2, 4, 3), torch.randn(3, 5, 4)
y = layer(x)
y.sum().backward()
layer.zero_grad()
for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
    if not torch.equal(again(x), y):
        sys.exit("another layer")
made = []
threads = [threading.Thread(target=lambda: made.append(layer(x))) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if len(made) != 4 or not all(torch.equal(m, y) for m in made):
    sys.exit("another result in a thread")
if layer(x[:0]).shape != (0, 2, 3):
    sys.exit("no samples")
try:
    fastroute.EfficientVectorRouting(10**9, 10**6, 4096, 4096)
except ValueError as error:
    print(error)
try:
    layer(torch.randn(3, 4, 4))
except ValueError as error:
    print(error)
import importlib

importlib.reload(fastroute)
for name in [name for name in sys.modules if name.partition(".")[0] == "fastroute"]:
    del sys.modules[name]
try:
    import fastroute
except ImportError as error:
    print(error)
"""


@pytest.mark.long
def test_one_process_with_all_of_it(tmp_path: Path) -> None:
    """-O, -W error, no UTF-8, a dead proxy, 2 GB, one thread, a path with a space; see the page's rows."""
    folder = tmp_path / "a path"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    surroundings = {
        "PATH": "/usr/bin:/bin", "HOME": str(folder), "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    options = ["-O", "-W", "error", "-W", "ignore:the C++ extension", "-bb"]
    done = subprocess.run(
        [sys.executable, *options, "program.py"], cwd=folder, env=surroundings, text=True, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    old, large, wrong, twice = done.stdout.splitlines()
    assert re.fullmatch(
        r"fastroute needs torch 2\.11 or newer, found 2\.10\.0\+cpu in .*: pip install --upgrade .*", old
    )
    assert large.startswith(
        "n_inp=1000000000, n_out=1000000, d_inp=4096, d_out=4096: expected sizes that fit into memory"
    )
    assert wrong == "n_inp: expected 5 input vectors, got 4 (x_inp is [3, 4, 4])"
    assert twice.startswith("fastroute: expected to be imported once in a process") and "registry.py" in twice


def test_an_unwritable_folder_is_told_before_the_training(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(["demo", "--epochs", "1"]) == 2
    assert "--out: expected a file in a folder that can be written, got fastroute-demo.png" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_name_of_the_file(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    def run(_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastroute.demos.capsules.run", run)
    assert main(["demo", "--out", "a.png"]) == 1
    assert "--out a.png: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr("fastroute.cli.doctor", lambda: run(None))
    assert main(["doctor"]) == 1
    assert "doctor: standard output: No space left on device" in capsys.readouterr().err


def test_a_reader_that_has_read_enough() -> None:
    """`python -m fastroute ... | head -1`: no traceback, in a process whose output is closed at once."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from fastroute import cli; cli.doctor = lambda: 'x' * 99999\n"
    )
    code += "sys.exit(cli.main(['doctor']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and said == b""


def test_the_page_has_thirty() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "newcomer.md").read_text(), re.MULTILINE)
    assert list(map(int, rows)) == list(range(1, len(rows) + 1)) and len(rows) >= 30
