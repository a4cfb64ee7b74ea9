"""Ctrl-C in a demo, and what is shown where."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.benchmark  # which logs that there is nvcc and no GPU, the first time

import fastroute
from fastroute import cli
from fastroute.compat import checkpoints
from fastroute.demos import DEMOS
from fastroute.loggers import RunLog

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

from fastroute.demos import training


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A process in the background of a shell ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of an optimizer's n-th step."""
    made, real = [], torch.optim.Adam.step

    def pressed(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", pressed)


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_leaves_a_whole_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its last whole epoch; and says so in one line, with the status of what SIGINT has ended."""
    steps = 25 if name == "capsules" else 1  # 23 make an epoch of its
    press_at(steps, monkeypatch)
    assert cli.main(["demo", name, "--device", "cpu", "--epochs", "3", "--out", str(tmp_path / "it.png")]) == 130
    said = capsys.readouterr()
    what = rf"the state(| of '.*') after {steps // 23} of 3 epochs is in {tmp_path}/it\.pt"
    assert re.fullmatch(rf"python -m fastroute demo: interrupted; {what}\n", said.err), said.err
    assert "Traceback" not in said.out and "━" not in said.out  # no terminal, no bar
    found = torch.load(tmp_path / "it.pt", weights_only=True)
    assert found["epoch"] == steps // 23
    state = found["optimizer"]["state"]
    assert {int(s["step"]) for s in state.values()} == ({23} if name == "capsules" else set())
    assert all(t.isfinite().all() for t in found["model"].values())
    assert {p.name for p in tmp_path.iterdir()} <= {"it.pt", "it.png"}


def test_elsewhere_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def press(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoints, "convert", press)
    monkeypatch.setattr(cli, "doctor", press)
    for argv in (["convert", "a", "b", "--from", "taskrouting"], ["doctor"]):
        assert cli.main(argv) == 130
        assert capsys.readouterr() == ("", f"python -m fastroute {argv[0]}: interrupted\n")
    assert not any(tmp_path.iterdir())


def test_convert_is_quiet_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(fastroute.TaskRouter(4, 2, 0.5).state_dict(), tmp_path / "in.pt")
    argv = ["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--from", "taskrouting"]
    for quiet, lines in (([], True), (["--quiet"], False)):
        assert cli.main([*argv, *quiet]) == 0
        said = capsys.readouterr()
        assert bool(said.out) == lines and said.err == ""  # no terminal, no spinner
    assert torch.load(tmp_path / "out.pt", weights_only=True)


def test_bars_are_for_terminals() -> None:
    def shown(quiet: bool, terminal: bool) -> str:
        console = training.console_for(quiet)
        console.file, console._force_terminal = io.StringIO(), terminal
        console.is_interactive = terminal and not quiet
        with training.training("net", 2, console, "loss {task.fields[loss]:.3f}") as epoch:
            epoch(loss=0.5)
        return console.file.getvalue()

    assert "net" in shown(False, True) and "loss 0.500" in shown(False, True)
    assert shown(True, True) == shown(False, False) == ""
    assert not training.console_for(True).is_interactive


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_our_letters(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr(cli, "doctor", lambda: "8 × 8 → ten")
    assert cli.main(["doctor"]) == 0
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) in ("8 ? 8 ? ten\n", "8 × 8 ? ten\n")  # type: ignore[attr-defined]


def test_a_name_that_is_no_utf_8_is_printed_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the terminal's encoding is strict, as in most locales."""
    folder = tmp_path / os.fsdecode(b"\xff")
    RunLog(folder).write({"loss": 1.0}, step=1)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", stream)
    assert cli.main(["report", str(folder)]) == 0
    assert stream.buffer.getvalue() == os.fsencode(folder / "report.html") + b"\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("argv", [["doctor"], ["--version"], [], ["convert", "{}/in.pt", "{}/out.pt", "--from"]])
def test_standard_streams_that_are_closed(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``>&- 2>&-``, in a daemon, and without a console on Windows."""
    torch.save(fastroute.EfficientVectorRouting(3, 2, 4, 5).state_dict(), tmp_path / "in.pt")
    argv = [a.format(tmp_path) for a in argv] + ["heinsen_routing"] * ("convert" in argv)
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert cli.main(argv) == (0 if argv else 2)
    assert (tmp_path / "out.pt").exists() == ("convert" in argv)
