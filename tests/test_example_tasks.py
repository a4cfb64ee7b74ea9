"""The examples of task routing run, on little data, and write what they say they write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.examples import cells, example, leave_no_trace, little_data

pytest.importorskip("sklearn")
pytest.importorskip("rich")

__all__ = ["leave_no_trace", "little_data"]  # fixtures of every test here


def test_many_tasks(tmp_path: Path) -> None:
    matplotlib_image = pytest.importorskip("matplotlib.image")
    page, picture = tmp_path / "page.md", tmp_path / "sigma.png"
    page.write_text("before\n<!-- begin many -->\nold\n<!-- end many -->\nafter\n")
    many = example("many_tasks")
    argv = ["--tasks", "3", "--epochs", "1", "--seeds", "2", "--sigmas", "0", "0.5", "--threads", "1"]
    assert many.main([*argv, "--out", str(page), "--picture", str(picture)]) == 0
    text = page.read_text()
    assert "old" not in text and text.endswith("<!-- end many -->\nafter\n")
    rows = cells(text)
    assert [row[0] for row in rows] == ["network", *many.NETWORKS, "sigma, live channels", "0", "0.5"]
    assert all(len(row) == len(rows[0]) for row in rows)
    parameters = {row[0]: int(row[-1].replace(",", "")) for row in rows[1:6]}
    assert parameters["separate networks"] > 2.9 * parameters["shared trunk"] == 2.9 * parameters["routed, masked"]
    assert matplotlib_image.imread(picture).std() > 0.05


def test_hundreds_of_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    hundreds = example("hundreds_of_tasks")
    assert hundreds.main(["--tasks", "2", "60", "--epochs", "1", "--threads", "1"]) == 0
    head, *rows = cells(capsys.readouterr().out)
    assert [row[:3] for row in rows] == [[t, "1", name] for t in ("2", "60") for name in hundreds.NETWORKS]
    for what in ("accuracy", "constant answer", "balanced accuracy"):
        assert all(0 <= float(row[head.index(what)]) <= 1 for row in rows)
    assert hundreds.main(["--tasks", "2", "--networks", "shared trunk", "--threads", "1"]) == 0
    head, row = cells(capsys.readouterr().out)
    assert row[:3] == ["2", "8", "shared trunk"]


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("many_tasks", ["--epochs", "0"], "--tasks, --epochs, --seeds, --threads: expected at least 1"),
        ("many_tasks", ["--sigmas", "1"], "--sigmas: expected shares from 0 to below 1"),
        ("hundreds_of_tasks", ["--tasks", "0"], "--tasks, --epochs, --threads: expected at least 1"),
    ],
)
def test_misuse(name: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example(name).main(argv)
    assert message in capsys.readouterr().err
