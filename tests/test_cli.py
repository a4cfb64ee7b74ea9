"""The command line: what it prints, and what it exits with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.benchmark  # which logs that there is nvcc and no GPU, the first time

import fastroute
from fastroute.cli import TYPICAL, main, typical
from fastroute.ops import backends


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastroute {fastroute.__version__}\n"


@pytest.mark.parametrize(
    "argv", [["--help"], *([c, "--help"] for c in ("demo", "train", "report", "run", "convert", "doctor"))]
)
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "usage: python -m fastroute" in capsys.readouterr().out


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert "demo" in said.err and "doctor" in said.err and said.out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dance"], "invalid choice: 'dance'"),
        (["doctor", "now"], "unrecognized arguments: now"),
        (["run"], "the following arguments are required: SCRIPT.py"),
        (["demo", "--fast"], "unrecognized arguments: --fast"),
        (["demo", "tunes"], "invalid choice: 'tunes'"),
        (["demo", "--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["demo", "--epochs", "many"], "--epochs: expected a whole number, got 'many'"),
        (["demo", "--threads", "999999"], "--threads: expected at most 1024, got 999999"),
        (["demo", "--seed", "9" * 20], "--seed: expected at most 9223372036854775807, got 99999"),
        (["train", "routed-cnn", "--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["demo", "--threads", "-1"], "--threads: expected at least 1, got -1"),
        (["demo", "--device", "abacus"], "invalid choice: 'abacus'"),
        (["demo", "--out", "picture.jpeg"], "--out: expected a name ending in .png, got picture.jpeg"),
        (["demo", "--out", "no/such/folder.png"], "--out: expected a file in an existing folder"),
    ],
)
def test_misuse(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["report", "x" * 300], "xxx: File name too long"),
        (["demo", "--data", "x" * 300], "xxx'"),
        (["train", "routed-cnn", "--out", "a-file"], "--out a-file: cannot be made (File exists)"),
        (
            ["train", "routed-cnn", "--seed", str(2**63 - 2)],
            "--seed 9223372036854775806: expected one from",
        ),
        (["train", "routed-cnn", "--epochs", "1", "--seeds", "1"], "folder: expected a folder, found a file"),
        (["run", "x" * 300], "cannot be read (File name too long)"),
        (["run", "-m", ".part"], "-m .part: expected a module, found none of that name"),
        (["run", "a.ipynb"], "a.ipynb: expected a notebook of nbformat 4"),
        (["run", "b.ipynb"], "b.ipynb: expected a notebook of nbformat 4"),
    ],
)
def test_files_that_cannot_be(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says it, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("")
    Path("fastroute-runs/routed-cnn").mkdir(parents=True)
    Path("fastroute-runs/routed-cnn/seed-0").write_text("")
    Path("a.ipynb").write_text('{"cells": [], "metadata": []}')
    Path("b.ipynb").write_text("[" * 100_000)
    before = sorted(Path().rglob("*"))
    assert main(argv) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"python -m fastroute {argv[0]}: ") and message in said.err and said.out == ""
    assert sorted(Path().rglob("*")) == before


def test_demo_without_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--data", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"python -m fastroute demo: {tmp_path}: expected train-images") and said.out == ""


@pytest.mark.parametrize(
    ("command", "size", "message"),
    [
        (["demo", "capsules"], (3, 9), "expected images of 4 x 4 pixels at least, got 3 x 9"),
        (["train", "routed-cnn"], (4, 6), "expected square images, got 4 x 6"),
    ],
)
def test_images_of_sizes_that_no_network_takes(
    command: list[str],
    size: tuple[int, int],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = fastroute.data.Digits(*(torch.zeros(2, *size), torch.zeros(2, dtype=torch.int64)) * 2)
    monkeypatch.setattr("fastroute.data.mnist", lambda _: found)
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--data", "here"]) == 1
    assert capsys.readouterr().err == f"python -m fastroute {command[0]}: here: {message}\n"


def test_demo_without_its_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich" or name == "fastroute.demos.capsules"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["demo"]) == 1
    assert "pip install 'fastroute[demo]'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_demo_on_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "cuda"]) == 1
    assert "--device cuda: expected a CUDA GPU, found none" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- doctor


def doctor(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["doctor"]) == 0
    return capsys.readouterr().out


def test_doctor_tells_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    said = doctor(capsys)
    facts = dict(line.split(maxsplit=1) for line in said.split("\n\n")[0].splitlines())
    assert facts["fastroute"] == fastroute.__version__ and facts["torch"] == torch.__version__
    assert facts["python"] == sys.version.split()[0] and facts["threads"] == str(torch.get_num_threads())
    assert {"platform", "triton", "gpu", "extension", "FASTROUTE_BACKEND", "numpy", "OMP_NUM_THREADS"} <= facts.keys()
    assert said.isascii() and "\x1b" not in said


def test_doctor_tells_every_backend_of_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    said = doctor(capsys)
    for op, offers in backends.offered().items():
        section = next(part for part in said.split("\n\n") if part.startswith(f"{op} on cpu"))
        rows = dict(line.split(maxsplit=1) for line in section.splitlines()[1:])
        assert rows.keys() == set(backends.BACKENDS) >= offers.keys()
        assert sum(row.startswith("taken: ") for row in rows.values()) == 1
    columns = {line.index("taken: ") if "taken: " in line else line.index("not: ") for line in section.splitlines()[1:]}
    assert len(columns) == 1, "aligned"


@pytest.mark.parametrize("op", backends.offered())
def test_triton_takes_what_doctor_asks_about(op: str) -> None:
    """On a machine with a GPU, which this one may not be."""
    assert TYPICAL.keys() == backends.offered().keys(), (
        "fastroute/cli.py: TYPICAL has the sizes of every op that offers"
    )
    offer = backends.offered()[op].get("triton")
    assert offer is not None, f"{op} offers no Triton backend: an op without one makes no offer at all"
    assert offer.refuses(typical(op, "cuda")) is None


def test_doctor_without_the_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        backends, "extension", lambda: (None, "the C++ extension fastroute._C is not built:\nno compiler")
    )
    said = doctor(capsys)
    lines = said.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("extension"))
    assert lines[at].endswith("is not built:") and lines[at + 1].strip() == "no compiler"
    assert "reference  taken: first that can" in said


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("reference", "reference  taken: FASTROUTE_BACKEND=reference"),
        ("quantum", "none  FASTROUTE_BACKEND: expected one of auto, triton, native, reference, got 'quantum'"),
    ],
)
def test_doctor_under_a_request(
    request_: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends._state, "requested", request_)
    assert message in doctor(capsys)


def test_it_is_a_module_one_can_run() -> None:
    ran = subprocess.run([sys.executable, "-m", "fastroute", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout == f"fastroute {fastroute.__version__}\n"
